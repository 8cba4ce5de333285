"""Vocabularies evaluated over an index have the metrics of full evaluations with the network."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from small_index import write_index

from d2zero.data.coco import CocoFile, read_coco
from d2zero.data.coco_values import Id
from d2zero.evaluation.index_run import IndexRun, summaries_by_vocabulary
from d2zero.evaluation.metrics import ZeroShotScores, in_order
from d2zero.evaluation.run import EvaluationRun
from d2zero_runtime import D2ZeroError, Mode, Vocabulary, load
from d2zero_runtime.index.index import Index

pytest.importorskip("pyarrow")
pytest.importorskip("pycocotools")

MODES = (Mode.GZSIS, Mode.ZSIS)
Summaries = dict[str, dict[Mode, dict[str, Any]]]


@pytest.fixture(scope="module")
def truth_file(shapes_data: Path) -> Path:
    return shapes_data / "annotations/instances_val_gzsi_shapes.json"


@pytest.fixture(scope="module")
def vocabularies(shapes_data: Path) -> dict[str, Vocabulary]:
    """The model's own, one of other prompts, and one with a synonym of a seen and of an unseen class."""
    own = Vocabulary.load(shapes_data / "vocabulary.npz")
    drawn = (np.random.default_rng(0).standard_normal((len(own) + 2, own.width)) / 50).astype(np.float32)
    seen, unseen = own.seen_names[0], own.unseen_names[0]
    rows = [own.names.index(name) for name in (seen, unseen)]
    return {
        "own": own,
        "other": replace(own, embeddings=own.embeddings + drawn[: len(own)]),
        "synonyms": Vocabulary(
            (*own.names, "a word", "another"),
            np.concatenate([own.embeddings, own.embeddings[rows]]) + drawn,
            np.append(own.seen, [True, False]),
            source=own.source,
            synonyms={"a word": seen, "another": unseen},
        ),
    }


@pytest.fixture(scope="module")
def expected(
    exported: Path, shapes_data: Path, truth_file: Path, vocabularies: dict[str, Vocabulary],
    tmp_path_factory: pytest.TempPathFactory,
) -> Summaries:  # fmt: skip
    """Of full evaluations."""
    found: Summaries = {}
    with load(exported, threads=1) as model:
        for name, vocabulary in vocabularies.items():
            model.set_vocabulary(vocabulary)
            output = tmp_path_factory.mktemp("full")
            found[name] = EvaluationRun(model, read_coco(truth_file), shapes_data / "val", output, MODES).run()
    return found


@pytest.fixture(scope="module")
def exact(exported: Path, shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with features in float32, of three shards; not to be changed."""
    images = sorted((shapes_data / "val").iterdir())
    return write_index(tmp_path_factory.mktemp("exact") / "index", exported, images, features="float32")


@pytest.fixture(scope="module")
def half(exported: Path, shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with features in float16, its images in an order that is not that of their ids; not to be changed."""
    images = sorted((shapes_data / "val").iterdir())
    order = np.random.default_rng(0).permutation(len(images))
    return write_index(tmp_path_factory.mktemp("half") / "index", exported, [images[place] for place in order])


@pytest.fixture
def truth(truth_file: Path) -> CocoFile:
    return read_coco(truth_file)


def numbers(summary: dict[str, Any]) -> dict[str, float | None]:
    """All metrics by name, those of each class too."""
    found: dict[str, float | None] = {key: summary[key] for key in ("images", "annotations")}
    for kind in ("segm", "bbox"):
        found |= {f"{kind} {key}": value for key, value in summary[kind].items() if key != "per_class"}
        for name, row in summary[kind]["per_class"].items():
            found |= {f"{kind} {name} {key}": value for key, value in row.items()}
    return found


@pytest.mark.parametrize("name", ["own", "other", "synonyms"])
def test_metrics_equal_those_of_a_full_evaluation(
    name: str, exact: Path, truth: CocoFile, vocabularies: dict[str, Vocabulary], expected: Summaries
) -> None:
    run = IndexRun(Index(exact, 1), truth)
    for mode in MODES:
        found, full = run.summary(vocabularies[name], mode), expected[name][mode]
        assert found["missing"] == [] and found["mode"] == full["mode"]
        assert numbers(found) == pytest.approx(numbers(full), abs=1e-9) and found["segm"]["ap50"] > 20
        assert found["detections"] <= full["detections"]


@pytest.mark.parametrize("name", ["own", "other", "synonyms"])
def test_features_in_half_precision_have_the_metrics_within_a_tenth(
    name: str, half: Path, truth: CocoFile, vocabularies: dict[str, Vocabulary], expected: Summaries
) -> None:
    found = summaries_by_vocabulary(IndexRun(Index(half, 1), truth), {name: vocabularies[name]}, MODES)
    for mode in MODES:
        ours, full = ({k: v for k, v in s[name][mode]["segm"].items() if k != "per_class"} for s in (found, expected))
        assert ours == pytest.approx(full, abs=0.1)


def test_images_are_added_by_rising_ids(
    half: Path, exact: Path, truth: CocoFile, vocabularies: dict[str, Vocabulary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As COCO's evaluation goes, in which the first of equal scores counts as the better."""
    added: list[tuple[Id, int]] = []
    monkeypatch.setattr(ZeroShotScores, "add", lambda _, number, found: added.append((number, len(found))))
    for index in (half, exact):
        IndexRun(Index(index, 1), truth).summary(vocabularies["own"], Mode.GZSIS)
    assert [number for number, _ in added] == in_order(truth.images) * 2
    assert added[:24] == added[24:] and all(count for _, count in added)


def test_images_without_each_other(
    exported: Path, exact: Path, shapes_data: Path, truth: CocoFile, vocabularies: dict[str, Vocabulary], tmp_path: Path
) -> None:
    """Those that only the index has are ignored; those that it lacks count as without detections."""
    own, ids = vocabularies["own"], list(truth.images)
    part = replace(truth, images={number: truth.images[number] for number in ids[:10]})
    of_more = IndexRun(Index(exact, 1), part).summary(own, Mode.GZSIS)
    names = [truth.images[number]["file_name"] for number in ids]
    fewer = write_index(
        tmp_path / "few", exported, [shapes_data / "val" / name for name in names[1:10]], features="float32"
    )
    same = IndexRun(Index(fewer, 1), replace(part, images={number: truth.images[number] for number in ids[1:10]}))
    assert of_more["images"] == 10 and of_more["missing"] == []
    found = IndexRun(Index(fewer, 1), part).summary(own, Mode.GZSIS)
    assert found["images"] == 10 and found["missing"] == names[:1]
    assert found["annotations"] == of_more["annotations"]
    assert found["detections"] == same.summary(own, Mode.GZSIS)["detections"] < of_more["detections"]
    with pytest.raises(D2ZeroError, match=r"none of the 14 images of .* is in the index"):
        IndexRun(Index(fewer, 1), replace(truth, images={number: truth.images[number] for number in ids[10:]}))


def test_images_that_do_not_fit(exact: Path, truth: CocoFile, vocabularies: dict[str, Vocabulary]) -> None:
    number, entry = next(iter(truth.images.items()))
    wrong = replace(truth, images={**truth.images, number: {**entry, "height": 95}})
    with pytest.raises(D2ZeroError, match=r"is \(96, 96\) \(height, width\), its annotations say \(95, 96\)"):
        IndexRun(Index(exact, 1), wrong).summary(vocabularies["own"], Mode.GZSIS)
    twice = replace(
        truth, images={**truth.images, 10**9: {**entry, "id": 10**9, "file_name": f"b/{entry['file_name']}"}}
    )
    with pytest.raises(D2ZeroError, match=f"has several of {entry['file_name']}"):
        IndexRun(Index(exact, 1), twice)


@pytest.fixture
def files(vocabularies: dict[str, Vocabulary], tmp_path: Path) -> list[Path]:
    return [vocabularies[name].save(tmp_path / f"{name}.npz") for name in ("own", "other")]


def test_command_compares_vocabularies(
    exact: Path, truth_file: Path, files: list[Path], expected: Summaries, tmp_path: Path, command: Command
) -> None:
    given = ("eval", "--index", exact, "--annotations", truth_file, "-v", files[0], "-v", files[1])
    outcome = command(*given, "--mode", "gzsis,zsis", "--json", tmp_path / "all.json", "--per-class")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "all.json").read_text())
    for name in ("own", "other"):
        for mode in MODES:
            assert numbers(found[f"{name}.npz"][mode]) == pytest.approx(numbers(expected[name][mode]), abs=1e-9)
    lines = [line for line in outcome.out.splitlines() if line.startswith(("│ own.npz", "│ other.npz"))]
    shown = [f"{expected[name][Mode.GZSIS]['segm']['hm_ap50']:.2f}" for name in ("own", "other")]
    assert all(value in line for value, line in zip(shown, lines[:2], strict=True))
    best = max(range(2), key=lambda row: expected[("own", "other")[row]][Mode.GZSIS]["segm"]["hm_ap50"])
    assert "best" in lines[best] and "best" not in lines[1 - best]
    assert "best by HM AP50" in outcome.out and "best by unseen AP50" in outcome.out
    assert "unseen" in outcome.out and "magenta ring" in outcome.out
    (tmp_path / "more").mkdir()
    namesake = Vocabulary.load(files[1]).save(tmp_path / "more/own.npz")
    outcome = command(*given[:-2], "-v", namesake, "--json", tmp_path / "named.json")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "named.json").read_text()).keys() == {str(files[0]), str(namesake)}
    outcome = command(*given, "--json", tmp_path / "one_mode.json")
    assert outcome.code == 0 and json.loads((tmp_path / "one_mode.json").read_text())["own.npz"]["mode"] == "gzsis"


def test_command_with_one_vocabulary_or_none(
    exact: Path, truth_file: Path, files: list[Path], tmp_path: Path, command: Command
) -> None:
    given = ("eval", "--index", exact, "--annotations", truth_file, "--per-class", "--json", tmp_path / "m.json")
    outputs, contents = [], []
    for flags in ((), ("-v", files[0])):
        outcome = command(*given, *flags)
        assert outcome.code == 0, outcome.err
        outputs.append(outcome.out)
        contents.append(json.loads((tmp_path / "m.json").read_text()))
    assert outputs[0] == outputs[1] and "boxes" in outputs[0] and "magenta ring" in outputs[0]
    assert contents[0] == contents[1] and contents[0]["segm"]["ap50"] > 20


def test_command_names_what_is_missing(
    exported: Path, shapes_data: Path, truth_file: Path, tmp_path: Path, command: Command
) -> None:
    """Images that the index lacks, and those of a shard that is cut short, which fails at the end."""
    images = sorted((shapes_data / "val").iterdir())[:6]
    folder = write_index(tmp_path / "index", exported, images, rows=3)
    given = ("eval", "--index", folder, "--annotations", truth_file)
    outcome = command(*given)
    assert outcome.code == 0 and outcome.err.count("\n") == 1
    assert "warning: 18 of 24 images of instances_val_gzsi_shapes.json are not in" in outcome.err
    shard = sorted(folder.glob("shard-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    outcome = command(*given, "--mode", "gzsis,zsis")
    assert outcome.code == 2 and outcome.err.count("\n") == 3 and "21 of 24 images" in outcome.err
    assert "1 of 2 shards could not be used" in outcome.err and "seen AP50" in outcome.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--index", "i"), "--index needs --annotations FILE"),
        (("--index", "i", "--annotations", "a.json"), "i is no index: it has no index.json"),
        (("--index", "i", "m.onnx"), "give a checkpoint, --detections FILE or --index FOLDER, one of them"),
        (("--index", "i", "--detections", "d.json"), "one of them"),
        (("--index", "i", "--annotations", "a.json", "--limit", 3), "leave out flags that are for a network"),
        (("--index", "i", "--annotations", "a.json", "-v", "v", "-v", "v"), "v is given more than once"),
        (("m.onnx", "-v", "v.npz", "-v", "w.npz"), "2 vocabularies are compared over an --index; give one"),
    ],
)
def test_flags_that_do_not_go_together(flags: tuple[object, ...], message: str, command: Command) -> None:
    outcome = command("eval", *flags)
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1


def test_wrong_files(exact: Path, truth_file: Path, files: list[Path], tmp_path: Path, command: Command) -> None:
    own = Vocabulary.load(files[0])
    seen = own.select(own.seen_names).save(tmp_path / "seen.npz")
    narrow = Vocabulary(own.names, own.embeddings[:, :8]).save(tmp_path / "narrow.npz")
    only_seen = replace(own, seen=np.ones(len(own), bool)).save(tmp_path / "only_seen.npz")
    for flags, message in (
        (
            ("-v", files[0], "-v", seen),
            "seen.npz: instances_val_gzsi_shapes.json has classes that the vocabulary lacks",
        ),
        (("-v", files[0], "-v", narrow), "narrow.npz: the model reads class embeddings of width 64"),
        (("-v", files[0], "-v", only_seen, "--mode", "zsis"), "only_seen.npz: mode zsis needs unseen classes"),
        (("-v", tmp_path / "none.npz"), "none.npz does not exist"),
        (("--split", "coco-48-17"), "the vocabulary is of split shapes, this needs coco-48-17"),
    ):
        outcome = command("eval", "--index", exact, "--annotations", truth_file, *flags)
        assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome.err
    outcome = command("eval", "--index", exact, "--annotations", tmp_path / "none.json")
    assert outcome.code == 2 and "none.json does not exist" in outcome.err
