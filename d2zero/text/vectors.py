"""Vocabularies from files of word vectors: word2vec (text and binary), GloVe, and fastText's `.vec`.

Such files have gigabytes and a vocabulary a few words, so a file is read once, from its start, and only the vectors of
words that the names need are kept. Libraries that read them (gensim) hold all of a file in memory.

Formats: a line `words width` and then one entry per word, as text (word2vec, fastText) or in binary (word2vec: the
word, a space, little-endian float32); or only the entries, as text (GloVe). Each may be compressed by gzip.
"""

import gzip
import io
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2zero.text.word2vec import NORM
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.text.prompts import class_names, normalised, synonyms_of

Entries = Iterator[tuple[bytes, NDArray[np.float32]]]
Reader = gzip.GzipFile | io.BufferedReader

LONGEST_LINE = 1 << 20  # bytes
LONGEST_WORD = 1 << 12  # bytes, in binary
WIDEST = 1 << 14  # values of a vector
CHUNK = 1 << 20  # bytes
GZIP, ZIP, FASTTEXT = b"\x1f\x8b", b"PK\x03\x04", b"\xba\x16\x4f\x2f"  # the first bytes of files


def read_vectors(path: Path, names: Sequence[str], encoder: str = "") -> Vocabulary:
    """A vocabulary of class names from a file of word vectors.

    A name of several words has the vector of the joined form (`red_mug`, `red-mug`), or else the mean of its words'.
    Words are looked up as given, in lower case, Capitalised and in upper case. Synonyms (`sofa|couch`) are averaged.
    Rows have the length of those in the published word2vec files.

    Args:
        path: The file.
        names: Class names; `a|b` are synonyms, the first of which names the class.
        encoder: Recorded in the vocabulary; by the format if empty: `word2vec`, `glove` (no first line with the
            number of words), or `fasttext` (`.vec`).

    Raises:
        D2ZeroError: The file is absent, damaged or of another format, or lacks words.
    """
    classes = class_names(names)
    words = list(dict.fromkeys(chain.from_iterable(synonyms_of(name) for name in names)))
    with _opened(path) as stream:
        entries, recorded = _entries(stream, path, {spelling for word in words for spelling in _needed(word)})
        found = _found(entries, {_spellings(word)[0] for word in words})
    vectors = {word: _vector(word, found) for word in words}
    unknown = {part for word, vector in vectors.items() if vector is None for part in _unknown(word, found)}
    if unknown:
        raise D2ZeroError(
            f"{path} has no vectors of {join_truncated(sorted(unknown), 20)}; use other words, or leave these names out"
        )
    groups = [[vectors[word] for word in synonyms_of(name)] for name in names]
    rows_KD = np.stack([normalised(np.stack([v for v in group if v is not None])).mean(axis=0) for group in groups])
    return Vocabulary(classes, NORM * normalised(rows_KD), source={"encoder": encoder or recorded})


def _spellings(word: str) -> list[bytes]:
    """How a word, or a name as one word, may be written in a file; the best first."""
    parts = _parts(word)
    forms = [word] if len(word.split()) == 1 else []
    forms += ["_".join(parts), "-".join(parts)]
    cased = [case(form) for case in (str, str.lower, str.title, str.capitalize, str.upper) for form in forms]
    return [form.encode(errors="replace") for form in dict.fromkeys(cased)]


def _parts(word: str) -> list[str]:
    return [part for part in re.split(r"[\s_-]+", word) if part] or [word]


def _needed(word: str) -> list[bytes]:
    return [*_spellings(word), *chain.from_iterable(_spellings(part) for part in _parts(word))]


def _first(word: str, found: dict[bytes, NDArray[np.float32]]) -> NDArray[np.float32] | None:
    return next((found[spelling] for spelling in _spellings(word) if spelling in found), None)


def _vector(word: str, found: dict[bytes, NDArray[np.float32]]) -> NDArray[np.float32] | None:
    whole = _first(word, found)
    if whole is not None:
        return whole
    parts = [vector for part in _parts(word) if (vector := _first(part, found)) is not None]
    return np.mean(parts, axis=0, dtype=np.float32) if len(parts) == len(_parts(word)) else None


def _unknown(word: str, found: dict[bytes, NDArray[np.float32]]) -> list[str]:
    return [part for part in _parts(word) if _first(part, found) is None]


def _found(entries: Entries, best: Collection[bytes]) -> dict[bytes, NDArray[np.float32]]:
    """The first entry of each word; reading ends where every name is found as it is best written."""
    found: dict[bytes, NDArray[np.float32]] = {}
    missing = set(best)
    for word, vector in entries:
        found.setdefault(word, vector)
        missing.discard(word)
        if not missing:
            break
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Reader]:
    """The file's content, decompressed.

    Raises:
        D2ZeroError: It is absent, its compressed content is damaged, or it is of another format.
    """
    if not path.is_file():
        raise D2ZeroError(f"file of word vectors {path} does not exist")
    with path.open("rb") as raw:
        start = raw.read(4)
    if start == ZIP:
        raise D2ZeroError(f"{path} is a zip archive; unpack it, and give the file inside")
    try:
        with gzip.open(path) if start.startswith(GZIP) else path.open("rb") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise D2ZeroError(f"{path} was cut short, or is damaged: it cannot be decompressed ({error})") from error


def _entries(stream: Reader, path: Path, needed: Collection[bytes]) -> tuple[Entries, str]:
    """The needed entries of a file, and the encoder's name by its format.

    Raises:
        D2ZeroError: It is no such file.
    """
    first = stream.readline(LONGEST_LINE)
    if first.startswith(FASTTEXT):
        raise D2ZeroError(f"{path} is a fastText model; give its word vectors (.vec)")
    header = first.split()
    if len(header) == 2 and all(field.isdigit() and len(field) < 12 for field in header):
        count, width = int(header[0]), int(header[1])
        if not 1 <= width <= WIDEST:
            raise D2ZeroError(f"{path} says that its vectors have {width} values, expected 1 to {WIDEST}")
        second = stream.readline(LONGEST_LINE)
        if _is_text(second, width):
            return _text(
                _lines(stream, second), path, width, count, needed
            ), "fasttext" if ".vec" in path.suffixes else "word2vec"
        return _binary(stream, second, path, width, count, needed), "word2vec"
    width = len(first.split(b" ")) - 1
    if not 2 <= width <= WIDEST or not _is_text(first, width):
        raise D2ZeroError(f"{path} holds no word vectors as word2vec, GloVe or fastText (.vec) write them")
    return _text(_lines(stream, first), path, width, None, needed), "glove"


def _lines(stream: Reader, first: bytes) -> Iterator[bytes]:
    """The rest of a text, and what has been read of it; without empty lines."""
    lines = chain([first], iter(lambda: stream.readline(LONGEST_LINE), b""))
    return (line for line in lines if not line.isspace())


def _is_text(line: bytes, width: int) -> bool:
    fields = line.rstrip().rsplit(b" ", width)
    try:
        return len([float(field) for field in fields[1:]]) == width
    except ValueError:
        return False


def _text(lines: Iterator[bytes], path: Path, width: int, count: int | None, needed: Collection[bytes]) -> Entries:
    """Entries of needed words, one per line; `count` is what the first line says."""
    read, line = 0, b""
    for line in lines:
        read += 1
        word, _, rest = line.partition(b" ")
        if word not in needed or len(values := rest.split()) > width:  # or GloVe's words of several parts
            continue
        try:
            vector = np.array([float(value) for value in values], np.float32)
        except ValueError as error:
            raise D2ZeroError(f"{path} is damaged: the vector of {_shown(word)} holds no number ({error})") from error
        if len(vector) != width:
            raise D2ZeroError(
                f"{path} was cut short, or is damaged: {_shown(word)} has {len(vector)} of {width} values"
            )
        yield word, vector
    if len(line.split()) <= width or read < (count or 0):
        expected = f"; its first line says {count} words" if count else ""
        raise D2ZeroError(f"{path} was cut short, or is damaged: it ends in word {read}{expected}")


def _binary(stream: Reader, buffer: bytes, path: Path, width: int, count: int, needed: Collection[bytes]) -> Entries:
    """Entries of needed words; `buffer` is what has been read of them."""
    position, size = 0, 4 * width
    for number in range(1, count + 1):
        while (end := buffer.find(b" ", position)) < 0 or len(buffer) < end + 1 + size:
            more = stream.read(CHUNK)
            if not more or (end < 0 and len(buffer) - position > LONGEST_WORD):
                raise D2ZeroError(
                    f"{path} was cut short, or is damaged: it ends in word {number}; its first line says {count} words"
                )
            buffer, position = buffer[position:] + more, 0
        word = buffer[position:end].lstrip(b"\n")
        position = end + 1 + size
        if word in needed:
            yield word, np.frombuffer(buffer, "<f4", width, end + 1).astype(np.float32)


def _shown(word: bytes) -> str:
    return repr(word.decode(errors="replace"))
