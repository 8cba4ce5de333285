"""Vocabularies: round trips, subsets, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.vocabulary import random_embeddings


def small() -> Vocabulary:
    return Vocabulary(
        ("cat", "dog", "mug"),
        np.eye(3, 4, dtype=np.float32),
        seen=np.array([True, False, False]),
        source={"encoder": "test", "templates": ["a {}"]},
    )


def test_round_trip(tmp_path: Path) -> None:
    words = small().with_active(["dog"])
    again = Vocabulary.load(words.save(tmp_path / "deep" / "v.npz"))
    assert again.names == words.names and again.source == words.source
    np.testing.assert_array_equal(again.embeddings, words.embeddings)
    np.testing.assert_array_equal(again.seen, words.seen)
    assert again.active.tolist() == [False, True, False]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["v.npz"]  # nothing partial left behind


def test_active_keeps_the_context_and_select_does_not() -> None:
    assert len(small().with_active(["dog"])) == 3
    chosen = small().select(["mug", "cat"])
    assert chosen.names == ("mug", "cat") and chosen.seen.tolist() == [False, True]
    assert small().unseen_names == ("dog", "mug") and small().seen_names == ("cat",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ()}, "at least one class name"),
        ({"names": ("a", " ", "c")}, "number 1 is"),
        ({"names": ("a", "b", "a")}, "a given more than once"),
        ({"names": ("a", "b")}, r"\(K=2, D\).*got \(3, 4\)"),
        ({"embeddings": np.eye(3, 4) * np.nan}, "NaN or infinity for a, b, c"),
        ({"embeddings": np.zeros((3, 4))}, "all zero for a"),
        ({"embeddings": np.zeros(3)}, "one row per class name"),
        ({"seen": np.ones(5, bool)}, r"seen must have shape \(3,\)"),
        ({"active": np.zeros(3, bool)}, "at least one active"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    with pytest.raises(D2ZeroError, match=message):
        Vocabulary(**{"names": ("a", "b", "c"), "embeddings": np.eye(3, 4), **change})


def test_unknown_names_are_refused() -> None:
    with pytest.raises(D2ZeroError, match="cow not in the vocabulary; it has cat, dog, mug"):
        small().with_active(["cow"])
    with pytest.raises(D2ZeroError, match="cow not in"):
        small().select(["cow"])


def test_bad_files(tmp_path: Path) -> None:
    path = small().save(tmp_path / "v.npz")
    with pytest.raises(D2ZeroError, match="does not exist"):
        Vocabulary.load(tmp_path / "w.npz")
    with pytest.raises(D2ZeroError, match=r"saved as \.npz"):
        small().save(tmp_path / "v.json")
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:200])
    with pytest.raises(D2ZeroError, match="damaged"):
        Vocabulary.load(tmp_path / "cut.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(D2ZeroError, match="lacks active, embeddings"):
        Vocabulary.load(tmp_path / "other.npz")
    np.savez(tmp_path / "pickled.npz", names=np.array([{"a": 1}], dtype=object))
    with pytest.raises(D2ZeroError, match="not a vocabulary"):
        Vocabulary.load(tmp_path / "pickled.npz")
    content = dict(np.load(path))
    np.savez(tmp_path / "newer.npz", **{**content, "format_version": np.array(99)})
    with pytest.raises(D2ZeroError, match=r"version 99.*upgrade"):
        Vocabulary.load(tmp_path / "newer.npz")


def test_cost_grows_with_the_number_of_classes_and_not_with_its_square() -> None:
    """Compared pair by pair, 10 000 names took two seconds; looked up, a hundredth of one (docs/notebook)."""
    comparisons = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal comparisons
            comparisons += 1
            return str.__eq__(self, other)

    names = tuple(Name(f"class {number}") for number in range(2000))
    rows = np.random.default_rng(0).standard_normal((len(names), 8)).astype(np.float32)
    words = Vocabulary(names, rows).with_synonyms({names[1]: names[3], names[5]: names[4]})
    chosen = words.with_active(names[:4]).select(names[::-2])
    assert comparisons < 10 * len(names)
    assert chosen.names == names[::-2]  # the odd ones
    np.testing.assert_array_equal(chosen.embeddings, rows[::-2])
    assert np.flatnonzero(chosen.active[::-1]).tolist() == [0, 1]  # names 1 and 3
    assert chosen.synonyms == {names[1]: names[3]}  # the class of name 5 was not chosen


@pytest.mark.parametrize("row", [[0, 0.5, 0.5], [1, 1, 0], [0, 2, 0], [-1, 1, 1]])
def test_rows_of_a_closed_vocabulary_are_one_hot(row: list[float]) -> None:
    closed = Vocabulary(("a", "b"), np.eye(2, 3, dtype=np.float32), source={"encoder": "closed"})
    rows = np.array([[0, 0, 1], row], np.float32)
    with pytest.raises(D2ZeroError, match=r"one element of each row is 1, the others are 0.*not so for b"):
        replace(closed, embeddings=rows)
    drawn = random_embeddings(np.random.default_rng(0), 20, closed)
    assert Vocabulary(tuple(map(str, range(20))), drawn, source=closed.source).width == 3
