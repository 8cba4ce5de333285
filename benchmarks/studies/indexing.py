"""What an index of segmented images costs, and what it saves.

    python benchmarks/studies/indexing.py --model demo.onnx --images 5000

With the demo's model (an `.onnx` of it; it is exported if left out) over drawn images: time, memory and size of
`d2zero index`, at a tenth of the images and at all; the same killed ten times, and whether anything was lost, doubled
or changed; time and memory of `d2zero relabel`; and five vocabularies evaluated from the index and by five full
evaluations. Then the published architecture with drawn weights and drawn features: how many images a second the
classifier names, and how many its network segments, interleaved.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from d2zero.checkpoints.files import load_model
from d2zero.data.shapes import ShapesConfig, write_dataset
from d2zero.demo.run import packaged_checkpoint
from d2zero.model import D2Zero, ModelConfig, build
from d2zero_runtime import D2ZeroError, Segments, Vocabulary, load
from d2zero_runtime.index import Index, IndexDescription, IndexWriter
from d2zero_runtime.index.index import shards_in
from d2zero_runtime.masks import rle
from studies.study import header, parser_of, run, write

KILLS = 10
SEED = 0
HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "d2zero"]
NETWORK_SIZE = (800, 1216)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=5000, help="drawn images that are indexed")
    parser.add_argument("--model", type=Path, help="an .onnx of the demo's checkpoint")
    parser.add_argument("--published", type=Path, help="an .onnx of the published architecture; none runs if left out")
    parser.add_argument("--rows", type=int, default=1000, help="images of the published architecture's index")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each rate, interleaved")
    parser.add_argument("--only", choices=("archive", "vocabularies", "published"), help="one part")
    parser.add_argument("--json", type=Path, help="write all that was measured")
    return run(measure, parser, arguments)


def measure(given: argparse.Namespace) -> None:
    """All parts that were asked for; what was measured is printed and written, whatever comes after."""
    parts: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
        "archive": archive, "vocabularies": vocabularies, "published": published,
    }  # fmt: skip
    found: dict[str, Any] = {}
    try:
        for name, part in parts.items():
            if given.only in (None, name):
                with TemporaryDirectory() as folder:
                    found[name] = part(given, Path(folder))
                print(f"{name}:")
                for key, value in found[name].items():
                    print(f"  {key}: {value}")
    finally:
        settings = {"images": given.images, "rows": given.rows, "seed": SEED}
        write(given.json, {"kind": "indexing", **header(__file__, given, **settings), **found})


def archive(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Indexing many images: at once, and killed ten times."""
    model, found = _demo(given, folder), dict[str, Any]()
    for count in (given.images // 10, given.images):
        write_dataset(folder / str(count), ShapesConfig(train_images=0, val_images=count))
        index = folder / f"index-{count}"
        taken = _taken("index", folder / str(count) / "val", "-m", model, "-o", index)
        size = sum(path.stat().st_size for path in shards_in(index))
        found[f"index of {count}"] = {**taken, "images_per_s": count / taken["wall_s"], "bytes_per_image": size / count}
    whole, photos = folder / f"index-{given.images}", folder / str(given.images) / "val"
    found["killed"] = _killed(photos, model, folder / "killed", found[f"index of {given.images}"]["wall_s"])
    found["killed"] |= _compared(Index(whole), Index(folder / "killed"), photos)
    for count in (given.images // 10, given.images):
        taken = _taken("relabel", folder / f"index-{count}", "-o", folder / f"out-{count}")
        found[f"relabel of {count}"] = {**taken, "images_per_s": count / taken["wall_s"]}
    return found


def vocabularies(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Five vocabularies over the demo's 600 images: from one index, and by five full evaluations."""
    model, data = _demo(given, folder), folder / "data"
    write_dataset(data, ShapesConfig(train_images=0))
    own, files = Vocabulary.load(data / "vocabulary.npz"), []
    for number, words in enumerate(_prompts(own)):
        files.append(words.save(folder / f"words-{number}.npz"))
    truth = data / "annotations/instances_val_gzsi_shapes.json"
    started = time.perf_counter()
    _run("index", data / "val", "-m", model, "-o", folder / "index", "--features", "float32")
    indexed = time.perf_counter() - started
    started = time.perf_counter()
    chosen = [part for file in files for part in ("-v", file)]
    _run("eval", "--index", folder / "index", "--annotations", truth, *chosen, "--json", folder / "index.json")
    named = time.perf_counter() - started
    ours, differences, full = json.loads((folder / "index.json").read_text()), [], 0.0
    for file in files:
        started = time.perf_counter()
        _run(
            "eval", model, "--annotations", truth, "--images", data / "val", "-v", file, "-o", folder / "full",
            "--json", folder / "full.json",
        )  # fmt: skip
        full += time.perf_counter() - started
        theirs = json.loads((folder / "full.json").read_text())
        differences.append(_largest(_metrics(ours[file.name]), _metrics(theirs)))
    return {"index_s": indexed, "from_index_s": named, "full_s": full, "points_apart": differences}


def published(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Naming at the published sizes: images a second, the network's beside it."""
    random_state, found = np.random.default_rng(SEED), dict[str, Any]()
    model = build(ModelConfig(), _words(80, 300, random_state)).eval()
    size = _write_drawn(model, folder / "index", given.rows, folder)
    found["bytes_per_image"] = size / given.rows
    index, network = Index(folder / "index"), load(given.published) if given.published else None
    rates: dict[str, list[float]] = {}
    for _ in range(given.repeats):
        for classes in (17, 80, 1203):
            words, count = _words(classes, 300, random_state), given.rows if classes < 1000 else 64
            rates.setdefault(f"relabel, {classes} classes", []).append(_relabelled(index, words, count, folder))
        if network:
            image = random_state.integers(0, 256, (*NETWORK_SIZE, 3), np.uint8)
            network.predict_raw([image])
            started = time.perf_counter()
            for _ in range(3):
                network.predict_raw([image])
            rates.setdefault("network", []).append(3 / (time.perf_counter() - started))
    found |= {name: {"images_per_s": median(values), "all": values} for name, values in rates.items()}
    if network:
        found["80 classes to network"] = median(rates["relabel, 80 classes"]) / median(rates["network"])
    return found


def _demo(given: argparse.Namespace, folder: Path) -> Path:
    if given.model:
        return Path(given.model)
    from d2zero_export.onnx_export import export_onnx

    export_onnx(load_model(packaged_checkpoint()), folder / "demo.onnx")
    return folder / "demo.onnx"


def _run(*words: object) -> None:
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise D2ZeroError(f"{words[0]} ended with code {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}")


def _taken(*words: object) -> dict[str, float]:
    """What a command took: wall and processor seconds, peak memory in 1e6 bytes."""
    command = [sys.executable, str(HERE / "launch.py"), *COMMAND, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    if answer["code"]:
        raise D2ZeroError(f"{words[0]} ended with code {answer['code']}: {(done.stderr.splitlines() or [''])[-1]}")
    taken: dict[str, float] = answer["taken"]
    return taken


def _killed(photos: Path, model: Path, index: Path, seconds: float) -> dict[str, Any]:
    """Index with kills at random moments until it is whole."""
    draw, lengths = random.Random(SEED), list[int]()
    while True:
        process = subprocess.Popen(
            [*COMMAND, "index", str(photos), "-m", str(model), "-o", str(index)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if len(lengths) < KILLS:
            try:
                process.wait(3 + draw.uniform(0, 1.5) * seconds / KILLS)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        code = process.wait()
        lengths.append(len(Index(index)) if shards_in(index) else 0)
        if code == 0:
            return {"kills": len(lengths) - 1, "images_after_each": lengths}
        if code != -signal.SIGKILL:
            raise D2ZeroError(f"index ended with code {code}")


def _compared(whole: Index, other: Index, photos: Path) -> dict[str, Any]:
    paths, expected = list(other.paths()), {str(path) for path in photos.iterdir()}
    ours = {image.path: (found.scores, found.masks) for image, found in whole.name(score_threshold=0)}
    changed = sum(
        not np.array_equal(found.scores, ours[image.path][0]) or found.masks != ours[image.path][1]
        for image, found in other.name(score_threshold=0)
    )
    return {"lost": len(expected - set(paths)), "doubled": len(paths) - len(set(paths)), "changed": changed}


def _prompts(own: Vocabulary) -> list[Vocabulary]:
    """Five vocabularies that name the same classes: prompts that are a little off, and a larger context."""
    drawn, found = np.random.default_rng(SEED), [own]
    for strength in (0.3, 0.6, 1.0):
        noise = drawn.standard_normal(own.embeddings.shape).astype(np.float32) / own.width**0.5
        found.append(replace(own, embeddings=own.embeddings + strength * noise))
    extra = _words(20, own.width, drawn)
    more = np.concatenate([own.embeddings, extra.embeddings])
    flags: dict[str, Any] = {
        name: np.concatenate([getattr(own, name), np.zeros(20, bool)]) for name in ("seen", "active")
    }
    return [*found, replace(own, names=(*own.names, *extra.names), embeddings=more, **flags)]


def _words(count: int, width: int, drawn: np.random.Generator) -> Vocabulary:
    rows = drawn.standard_normal((count, width)).astype(np.float32) / width**0.5
    return Vocabulary(tuple(f"word {number}" for number in range(count)), rows)


def _metrics(summary: dict[str, Any]) -> dict[str, float | None]:
    return {
        f"{kind} {key}": value
        for kind in ("segm", "bbox")
        for key, value in summary[kind].items()
        if not isinstance(value, dict)
    }


def _largest(ours: dict[str, float | None], theirs: dict[str, float | None]) -> float:
    pairs = [(ours[key], theirs[key]) for key in theirs]
    return max(abs((left or 0.0) - (right or 0.0)) for left, right in pairs)


def _write_drawn(model: D2Zero, folder: Path, count: int, scratch: Path) -> int:
    """An index of drawn features, with masks of drawn shapes at 480 x 640; its size in bytes."""
    from d2zero_export.classifier import classifier_onnx

    drawn, contract = np.random.default_rng(SEED), model.contract(checkpoint="drawn")
    description = IndexDescription(
        contract=contract,
        embeddings=model.vocabulary.embeddings,
        classifier=classifier_onnx(model),
        features="float16",
        model=contract.identity,
    )
    photo = scratch / "photo.jpg"
    photo.write_bytes(b"drawn")
    queries = contract.num_queries
    with IndexWriter(folder, description) as writer:
        for _ in range(count):
            masks = tuple(_blob(drawn) for _ in range(queries))
            background = drawn.standard_normal(contract.query_dim).astype(np.float32)
            segments = Segments(
                queries=drawn.standard_normal((queries, contract.query_dim)).astype(np.float32),
                background=background / np.linalg.norm(background),
                boxes=drawn.uniform(0, 480, (queries, 4)).astype(np.float32),
                qualities=drawn.uniform(0.5, 1, queries).astype(np.float32),
                masks=masks,
                image_size=(480, 640),
                model=contract.identity,
            )
            writer.add(photo, segments)
    return sum(path.stat().st_size for path in shards_in(folder))


def _blob(drawn: np.random.Generator) -> rle.RLE:
    """A ragged ellipse: run lengths about as long as those of COCO's annotations, of which 93 had 325 characters."""
    height, width = drawn.integers(40, 240), drawn.integers(40, 320)
    top, left = drawn.integers(0, 480 - height), drawn.integers(0, 640 - width)
    columns = np.linspace(-1, 1, width)
    half = 0.5 * height * np.sqrt(1 - columns**2) * (1 + 0.05 * drawn.standard_normal(width))
    rows = np.arange(height)[:, None] - height / 2
    return rle.encode_window(np.abs(rows) < half, int(top), int(left), 480, 640)


def _relabelled(index: Index, words: Vocabulary, count: int, folder: Path) -> float:
    """Images a second: read, named, written as `d2zero relabel` does."""
    from d2zero.cli.results import CocoWriter

    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    next(index.name(words))  # opens the classifier
    started, done = time.perf_counter(), 0
    with CocoWriter(folder / "out/detections.json", words.names) as written:
        for image, found in index.name(words, score_threshold=0.05):
            written.add(image.path, found)
            done += 1
            if done == count:
                break
    return done / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
