"""Vocabularies from files of word vectors, in each format."""

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from commands import Command

from d2zero.text import vectors
from d2zero.text.vectors import read_vectors
from d2zero.text.word2vec import NORM
from d2zero_runtime import D2ZeroError, Vocabulary

WIDTH = 5
WORDS = [
    "</s>",
    "the",
    "cat",
    "Cat",
    "red",
    "mug",
    "tennis_racket",
    "hot-dog",
    "New_York",
    "TV",
    "t-shirt",
    "kitty",
    "été",
]
ROWS = np.random.default_rng(0).standard_normal((len(WORDS), WIDTH)).astype(np.float32)
ROW = dict(zip(WORDS, ROWS, strict=True))


def lines() -> bytes:
    return "".join(f"{word} {' '.join(map(repr, row.tolist()))}\n" for word, row in ROW.items()).encode()


def packed(end: bytes) -> bytes:
    return b"".join(word.encode() + b" " + row.astype("<f4").tobytes() + end for word, row in ROW.items())


HEADER = f"{len(WORDS)} {WIDTH}\n".encode()
CONTENT = {
    "word2vec.txt": HEADER + lines(),
    "word2vec.bin": HEADER + packed(b"\n"),
    "gensim.bin": HEADER + packed(b""),
    "glove.txt": lines(),
    "cc.en.vec": HEADER + lines().replace(b"\n", b" \n"),  # as fastText and word2vec write them
    "windows.txt": HEADER + lines().replace(b"\n", b"\r\n"),
}
ENCODERS = {"glove.txt": "glove", "cc.en.vec": "fasttext"}


def scaled(row: np.ndarray) -> np.ndarray:
    return NORM * row / np.linalg.norm(row)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("file", CONTENT)
def test_formats_are_read_alike(file: str, compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "CHUNK", 7)  # entries lie across chunks
    path = tmp_path / (f"{file}.gz" if compressed else file)
    path.write_bytes(gzip.compress(CONTENT[file]) if compressed else CONTENT[file])
    made = read_vectors(path, ["cat", "red mug", "tennis racket", "été", "t-shirt"])
    expected = [ROW["cat"], ROW["red"] + ROW["mug"], ROW["tennis_racket"], ROW["été"], ROW["t-shirt"]]
    np.testing.assert_allclose(made.embeddings, [scaled(row) for row in expected], rtol=1e-5)
    assert made.source == {"encoder": ENCODERS.get(file, "word2vec")}
    assert made.names == ("cat", "red mug", "tennis racket", "été", "t-shirt")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "w2v.bin"
    path.write_bytes(CONTENT["word2vec.bin"])
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", ROW["cat"]),
        ("Cat", ROW["Cat"]),
        ("CAT", ROW["cat"]),
        ("tv", ROW["TV"]),
        ("new york", ROW["New_York"]),
        ("Hot dog", ROW["hot-dog"]),
        ("hot_dog", ROW["hot-dog"]),
        ("Red-Mug", ROW["red"] + ROW["mug"]),
        ("the tv", ROW["the"] + ROW["TV"]),
        ("T-shirt", ROW["t-shirt"]),
        ("cat|kitty", scaled(ROW["cat"]) + scaled(ROW["kitty"])),
    ],
)
def test_words_are_found(file: Path, name: str, expected: np.ndarray) -> None:
    made = read_vectors(file, [name])
    np.testing.assert_allclose(made.embeddings, [scaled(expected)], rtol=1e-5)
    assert made.names == (name.split("|")[0],)


def test_published_vectors_have_the_same_length(shared: Path) -> None:
    table = np.loadtxt(shared / "data/embeddings/word_w2v_withbg_48_17.txt", delimiter=",")
    np.testing.assert_allclose(np.linalg.norm(table[:, 1:], axis=0), NORM, rtol=1e-5)


def test_unknown_words_are_named_together(file: Path) -> None:
    message = "has no vectors of horse, purple, zebra; use other words"
    with pytest.raises(D2ZeroError, match=message):
        read_vectors(file, ["cat", "purple mug", "zebra|horse"])


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w2v.txt"
    path.write_bytes(HEADER + lines()[: lines().index(b"mug")] + b"damaged")
    assert read_vectors(path, ["cat", "red"]).names == ("cat", "red")


def test_words_of_several_parts_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_bytes(b"the 1 2 3\n. . . 7 7 7\n. 4 5 6\n")
    np.testing.assert_allclose(read_vectors(path, ["."]).embeddings, [scaled(np.array([4, 5, 6]))], rtol=1e-5)


def test_command(file: Path, tmp_path: Path, command: Command) -> None:
    output = tmp_path / "v.npz"
    outcome = command("vocab", "vectors", file, "--names", "red mug, cat|kitty", "-o", output)
    assert outcome.code == 0 and "recorded as embeddings of word2vec" in outcome.out, outcome.err
    assert Vocabulary.load(output).names == ("red mug", "cat")
    outcome = command("vocab", "vectors", file, "--names", "cat", "--encoder", "mine", "-o", output)
    assert outcome.code == 0 and Vocabulary.load(output).encoder == "mine"
    outcome = command("vocab", "vectors", file, "--names", "cat", "--split", "coco-48-17", "-o", output)
    assert outcome.code == 2 and "the names lack 64 classes" in outcome.err
    outcome = command("vocab", "vectors", file, "--names", "cat, dog", "-o", output)
    assert outcome.code == 2 and "has no vectors of dog" in outcome.err and outcome.err.count("\n") == 1


TEXT, BINARY = CONTENT["word2vec.txt"], CONTENT["word2vec.bin"]
WRONG = {
    "absent": (None, "does not exist"),
    "empty": (b"", "holds no word vectors"),
    "other text": (b"hello\n", "holds no word vectors"),
    "published": (b"0.1,0.2,0.3\n", "holds no word vectors"),
    "tabs": (b"cat\t1\t2\n", "holds no word vectors"),
    "only a header": (HEADER, r"it ends in word 1; its first line says 13 words"),
    "text, cut between lines": (TEXT[: TEXT.index(b"kitty")], r"it ends in word 11; its first line says 13 words"),
    "text, cut within a line": (TEXT[: TEXT.index(b"kitty") + 20], r"it ends in word 12; its first line says 13 words"),
    "glove, cut within a line": (lines()[:-70], r"was cut short, or is damaged: it ends in word 13"),
    "text, a wanted line cut": (HEADER + b"a 1 2 3 4 5\ncat 1 2\n", r"'cat' has 2 of 5 values"),
    "text, no numbers": (HEADER + b"a 1 2 3 4 5\ncat 1 2 x 4 5\n", r"the vector of 'cat' holds no number"),
    "binary, cut": (BINARY[:-30], r"it ends in word 12; its first line says 13 words"),
    "binary, no spaces": (HEADER + b"x" * 9000, r"it ends in word 1; its first line says 13 words"),
    "not finite": (HEADER.replace(b"13", b"1") + b"dog nan 2 3 4 5\n", "NaN or infinity for dog"),
    "width": (b"3 99999999\ncat 1\n", "says that its vectors have 99999999 values, expected 1 to 16384"),
    "zip": (b"PK\x03\x04...", "is a zip archive; unpack it"),
    "fasttext": (struct.pack("<II", 793712314, 12), r"is a fastText model; give its word vectors \(.vec\)"),
    "gzip, cut": (gzip.compress(TEXT)[:-40], "it cannot be decompressed"),
    "gzip, changed": (gzip.compress(TEXT)[:60] + b"\0" * 100, "it cannot be decompressed"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_and_damaged_files_are_refused(kind: str, tmp_path: Path) -> None:
    content, message = WRONG[kind]
    path = tmp_path / "vectors.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(D2ZeroError, match=message) as raised:
        read_vectors(path, ["dog"] if kind == "not finite" else ["cat", "dog"])
    assert "\n" not in str(raised.value) and re.search(r"vectors\.txt|dog", str(raised.value))


def test_no_file_is_held_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    path, rows = tmp_path / "w2v.bin", 20000
    values = np.ones(300, "<f4").tobytes()
    with path.open("wb") as stream:
        stream.write(f"{rows} 300\n".encode())
        stream.writelines(f"word{number} ".encode() + values for number in range(rows))
    tracemalloc.start()
    assert read_vectors(path, ["word19999"]).width == 300
    assert tracemalloc.get_traced_memory()[1] < 6e6 < path.stat().st_size / 3
    tracemalloc.stop()
