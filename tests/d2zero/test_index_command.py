"""`d2zero index` and `d2zero relabel`, as users call them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command

from d2zero.demo.run import packaged_checkpoint
from d2zero_runtime import Vocabulary
from d2zero_runtime.index import Index
from d2zero_runtime.index.index import shards_in

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def photos(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted((shapes_data / "val").iterdir())[:9]:
        shutil.copy(path, folder)
    return folder


def entries(folder: Path) -> list[tuple[str, Any]]:
    """Instances by file name, without their ids."""
    content = json.loads((folder / "detections.json").read_text())
    names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
    return sorted(
        (names[entry["image_id"]], [entry["category_id"], entry["segmentation"]["counts"], entry["score"]])
        for entry in content["annotations"]
    )


@pytest.mark.slow
def test_relabel_writes_what_predict_writes(
    exported: Path, shapes_data: Path, photos: Path, tmp_path: Path, command: Command
) -> None:
    words = Vocabulary.load(shapes_data / "vocabulary.npz")
    words.select([*words.names[5:20], *words.names[-8:]]).save(tmp_path / "words.npz")
    index, (ours, theirs) = tmp_path / "index", (tmp_path / name for name in ("ours", "theirs"))
    outcome = command("index", photos, "-m", exported, "-o", index, "--features", "float32")
    assert outcome.code == 0 and "9 images; 9 in" in outcome.out, outcome.err
    options = ("-v", tmp_path / "words.npz", "--mode", "gzsis-copy-paste", "--score", "0.05")
    outcome = command("relabel", index, "-o", ours, *options, "--pictures", "*/1000003.png")
    assert outcome.code == 0 and "9 images in" in outcome.out, outcome.err
    outcome = command("predict", photos, "-m", exported, "-o", theirs, *options)
    assert outcome.code == 0, outcome.err
    found, expected = entries(ours), entries(theirs)
    assert [(name, entry[:2]) for name, entry in found] == [(name, entry[:2]) for name, entry in expected]
    assert max(abs(left[1][2] - right[1][2]) for left, right in zip(found, expected, strict=True)) <= 1e-6
    drawn = [path.name for path in ours.glob("*.jpg")]
    assert drawn == ["00003-1000003.jpg"] and (ours / drawn[0]).read_bytes() == (theirs / drawn[0]).read_bytes()


@pytest.mark.slow
def test_a_checkpoint_makes_an_index_that_needs_no_torch(
    photos: Path, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    outcome = command("index", photos, "-m", packaged_checkpoint(), "-o", tmp_path / "index")
    assert outcome.code == 0, outcome.err
    truth = shapes_data / "annotations/instances_val_gzsi_shapes.json"
    script = (
        "import sys; from d2zero.cli.main import main\n"
        f"try: main(['relabel', {str(tmp_path / 'index')!r}, '-o', {str(tmp_path / 'out')!r},"
        f" '--results-for', {str(truth)!r}, '--score', '0'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr
    assert len(json.loads((tmp_path / "out/results.json").read_text())) > 300


@pytest.mark.slow
def test_damaged_images_are_named_and_come_later(
    exported: Path, photos: Path, tmp_path: Path, command: Command
) -> None:
    folder, index = tmp_path / "photos", tmp_path / "index"
    shutil.copytree(photos, folder)
    whole = (folder / "1000004.png").read_bytes()
    (folder / "1000004.png").write_bytes(whole[:100])
    outcome = command("index", folder, "-m", exported, "-o", index)
    assert outcome.code == 2 and "1 of 9 files could not be read" in outcome.err
    assert "1000004.png is damaged" in outcome.err and len(Index(index)) == 8
    (folder / "1000004.png").write_bytes(whole)
    outcome = command("index", folder, "-m", exported, "-o", index)
    assert outcome.code == 0 and "9 images; 1 in" in outcome.out
    assert sorted(map(Path, Index(index).paths())) == sorted(folder.iterdir())
    shard = shards_in(index)[0]
    shard.write_bytes(shard.read_bytes()[:-50])
    outcome = command("relabel", index, "-o", tmp_path / "out")
    assert outcome.code == 2 and "1 of 2 shards could not be used" in outcome.err
    assert f"{shard} is cut short" in outcome.err and "1 images in" in outcome.out
    outcome = command("index", folder, "-m", exported, "-o", index)
    assert outcome.code == 0 and "it was renamed to shard-00000.parquet.bad" in outcome.err
    assert "9 images; 8 in" in outcome.out
    outcome = command("index", folder / ".." / "photos", "-m", exported, "-o", index)
    assert outcome.code == 0 and "9 images; 0 in" in outcome.out
    assert command("relabel", index, "-o", tmp_path / "out").code == 0
    before = (tmp_path / "out/detections.json").read_bytes()
    Vocabulary(("a",), np.ones((1, 5), np.float32)).save(tmp_path / "wrong.npz")
    outcome = command("relabel", index, "-o", tmp_path / "out", "-v", tmp_path / "wrong.npz")
    assert outcome.code == 2 and (tmp_path / "out/detections.json").read_bytes() == before
    outcome = command("relabel", index, "-o", tmp_path / "out", "--pictures", "100*")
    assert outcome.code == 0 and "no image's path fits 100*" in outcome.err
    (folder / "1000003.png").write_bytes(whole)
    outcome = command("relabel", index, "-o", tmp_path / "out", "--pictures", "*/1000003*")
    assert "1000003.png: image has changed since it was segmented" in outcome.err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_a_killed_index_loses_and_doubles_nothing(exported: Path, photos: Path, tmp_path: Path) -> None:
    folder, index = tmp_path / "photos", tmp_path / "index"
    folder.mkdir()
    for number, photo in enumerate(sorted(photos.iterdir()) * 8):
        shutil.copy(photo, folder / f"{number:03d}.png")
    script = (
        "import sys; from d2zero_runtime.index import index; index.SECONDS = 0.2; from d2zero.cli.main import main;"
        f" main(['index', {str(folder)!r}, '-m', {str(exported)!r}, '-o', {str(index)!r}, '--threads', '1'])"
    )
    lengths, finished = [0], False
    while not finished:
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
        try:
            if len(lengths) < 5:
                before = len(shards_in(index))
                while process.poll() is None and len(shards_in(index)) == before:
                    time.sleep(0.02)
                process.send_signal(signal.SIGKILL)
            process.wait()
        finally:
            process.kill()
        lengths.append(len(Index(index)))
        finished = process.returncode == 0
        assert finished or process.returncode == -signal.SIGKILL
        assert len(lengths) < 12
    assert lengths == sorted(lengths) and len(lengths) >= 5, lengths
    assert sorted(map(Path, Index(index).paths())) == sorted(folder.iterdir())
    queries = [rows.queries_NQC for rows in Index(index)._rows(100)]
    assert np.isfinite(np.concatenate(queries)).all()


def test_wrong_inputs_are_one_line_each(photos: Path, tmp_path: Path, command: Command) -> None:
    missing, out = tmp_path / "none.onnx", ("-o", tmp_path / "out")
    for arguments, message in (
        (("index", photos, "-m", missing, *out), "none.onnx does not exist"),
        (("index", photos, "-m", missing, *out, "--features", "int8"), "--features is float16 or float32, got 'int8'"),
        (("relabel", tmp_path, *out), "is no index: it has no index.json"),
        (("relabel", tmp_path, *out, "--names", "cat"), "--names and --text-encoder go together"),
        (("relabel", tmp_path, *out, "--mode", "best"), "mode must be one of"),
    ):
        outcome = command(*arguments)
        assert outcome.code == 2 and message in outcome.err and len(outcome.err.splitlines()) == 1, outcome.err
