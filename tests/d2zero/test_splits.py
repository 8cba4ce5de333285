"""Splits as files: read, written, refused, and used by the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import Command

from d2zero.data.splits import Split, find_split, read_split, with_unseen
from d2zero_runtime import D2ZeroError, Vocabulary

PETS = Split("pets", ("no", "1984", "café"), ("cat, tabby", "on"), {"rare": ("on",)})


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_a_split_is_what_was_saved(tmp_path: Path, suffix: str) -> None:
    assert read_split(PETS.save(tmp_path / f"s{suffix}")) == PETS
    assert find_split(str(tmp_path / f"s{suffix}")) == PETS


def test_a_split_as_a_vocabulary() -> None:
    words = PETS.as_vocabulary()
    assert (words.seen_names, words.unseen_names) == (PETS.seen, PETS.unseen)


def test_names_of_a_hand_written_file_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seen: [no, 1984, yes]\nunseen: [null]\n")
    assert read_split(path) == Split("mine", ("no", "1984", "yes"), ("null",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "seen: [a, a]", "names a more than once"),
        ("a.yaml", "seen: [a]\nunseen: [a]", "more than once, or as seen and unseen"),
        ("a.yaml", "seen: []", "has no seen classes"),
        ("a.yaml", "unseen: [a]", "a.yaml lacks seen"),
        ("a.yaml", "seen: a", "is damaged: Expected array"),
        ("a.yaml", "seen: [a", r"a\.yaml is not YAML: while parsing"),
        ("a.yaml", "- a", "is no split: expected name, seen and unseen, got list"),
        ("a.yaml", "seen: [a]\nunsen: [b]", "unknown fields in .* unsen"),
        ("a.yaml", "name: ../x\nseen: [a]", "a split's name has letters"),
        ("a.yaml", "seen: [a]\ngroups: {rare: [b]}", "group rare of split a has b"),
        ("a.yaml", "seen: &x [*x]", "is not YAML|is damaged"),
        ("a.json", '{"seen": [1]}', "is damaged: Expected str"),
        ("a.json", "{", "is not JSON"),
        ("a.txt", "a", "a split is a file of .yaml"),
    ],
)
def test_what_is_no_split_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(D2ZeroError, match=message) as caught:
        read_split(tmp_path / name)
    assert "\n" not in str(caught.value) and (str(tmp_path) in str(caught.value) or name == "a.txt")


def test_a_split_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(D2ZeroError, match=r"does not exist; expected a packaged one \(coco-48-17"):
        find_split(str(tmp_path / "none.yaml"))


def test_unseen_classes_by_name(tmp_path: Path, command: Command) -> None:
    np.save(tmp_path / "e.npy", np.eye(3, dtype=np.float32))
    outcome = command(
        "vocab", "npy", tmp_path / "e.npy", "--names", "mug,cat,dog", "--unseen", "cat,dog", "-o", tmp_path / "v.npz"
    )
    assert outcome.code == 0 and "1 seen and 2 unseen" in outcome.out, outcome.err
    words = Vocabulary.load(tmp_path / "v.npz")
    assert words.unseen_names == ("cat", "dog")
    with pytest.raises(D2ZeroError, match="--unseen names cow, which the vocabulary lacks"):
        with_unseen(words, ["cow"])
    Split("pets", ("dog", "mug"), ("cat",)).save(tmp_path / "pets.yaml")
    for flags, message in (
        (("--split", tmp_path / "pets.yaml", "--unseen", "cat"), "either --split or --unseen"),
        (("--split", tmp_path / "none.yaml"), "does not exist"),
    ):
        outcome = command(
            "vocab", "npy", tmp_path / "e.npy", "--names", "mug,cat,dog", *flags, "-o", tmp_path / "w.npz"
        )
        assert outcome.code == 2 and message in outcome.err
    outcome = command(
        "vocab", "npy", tmp_path / "e.npy", "--names", "mug,cat,dog", "--split", tmp_path / "pets.yaml", "-o",
        tmp_path / "v.npz",
    )  # fmt: skip
    words = Vocabulary.load(tmp_path / "v.npz")
    assert words.names == ("dog", "mug", "cat") and words.source["split"] == "pets"


def test_one_annotation_file_becomes_training_and_test_files(shared: Path, tmp_path: Path, command: Command) -> None:
    source = json.loads((shared / "data/coco_tiny/annotations/instances_val2017.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(source))
    flags = ("--unseen", "person,dog", "--name", "people", "-o", tmp_path / "out")
    outcome = command("data", "split", tmp_path / "mine.json", *flags)
    assert outcome.code == 0, outcome.err
    train, gzsi, unseen = (
        json.loads((tmp_path / f"out/mine_{part}_people.json").read_text()) for part in ("seen", "gzsi", "unseen")
    )
    split = find_split(tmp_path / "out/people.yaml")
    assert split.unseen == ("person", "dog") and len(split.names) == len(source["categories"])
    ids = {entry["id"] for entry in source["categories"] if entry["name"] in split.unseen}
    hidden = {entry["image_id"] for entry in source["annotations"] if entry["category_id"] in ids}
    assert {entry["id"] for entry in train["images"]}.isdisjoint(hidden)
    assert {entry["id"] for entry in gzsi["images"]} == {entry["id"] for entry in unseen["images"]} == hidden
    (tmp_path / "people.yaml").write_text("seen: [a]")  # somebody's own
    for wrong, message in (
        (("data", "split", tmp_path / "mine.json", *flags[:4], "-o", tmp_path), "people.yaml exists already"),
        (("data", "split", tmp_path / "mine.json", "-o", tmp_path), "either --split NAME"),
        (("data", "split", tmp_path / "mine.json", "--unseen", "dodo", "-o", tmp_path), "unseen classes dodo are not"),
        (("data", "split", "--unseen", "dog", "-o", tmp_path), "give an annotation file, --data DIR"),
        (("data", "split", tmp_path / "mine.json", "--unseen", "dog"), "say where to write"),
        (("data", "split", tmp_path / "mine.json", "--data", tmp_path, "--unseen", "dog"), "not both"),
    ):
        outcome = command(*wrong)
        assert outcome.code == 2 and message in outcome.err, outcome.err
