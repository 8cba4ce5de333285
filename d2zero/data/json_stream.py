"""JSON files too large to hold: their lists entry by entry, and entries by key, read again from disk.

The standard library parses each value. Text is first decoded a byte a character (Latin-1), so that places in it
are places in the file: all that JSON itself is made of is ASCII. Values with other letters are decoded again.
"""

import json
import re
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from d2zero.data.coco_values import Id
from d2zero_runtime import D2ZeroError

BLOCK = 1 << 20  # bytes read at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which Windows puts before UTF-8
_SPACES = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()

Entries = list[dict[str, Any]]


@contextmanager
def open_seekable(path: Path) -> Iterator[IO[bytes]]:
    """A file to read more than once; what comes through a pipe is copied to disk first.

    Raises:
        D2ZeroError: It is absent or a folder.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise D2ZeroError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise D2ZeroError(f"{path} is a folder, expected a JSON file") from error
    with stream:
        if stream.seekable():
            yield stream
            return
        with TemporaryFile() as copy:
            shutil.copyfileobj(stream, copy)
            copy.seek(0)
            yield copy


def read_json(path: Path) -> Any:
    """Read JSON whole, with an error that the user can act on.

    Raises:
        D2ZeroError: The file is absent or no JSON.
    """
    with open_seekable(path) as stream:
        try:
            return json.loads(stream.read())
        except (ValueError, RecursionError) as error:  # syntax, encoding, numbers of thousands of digits, nesting
            raise D2ZeroError(f"{path} is not JSON or is cut short: {error}") from error


class JsonStream:
    """Reads one JSON text from its beginning to its end.

    Args:
        stream: A binary file, at its beginning.
        path: The file's path, for messages.
    """

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream, self._path = stream, path
        self._at, self._start = 0, stream.tell()  # place of the text's first character
        head = stream.read(len(BYTE_ORDER_MARK))
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise D2ZeroError(f"{path} is in UTF-16 or UTF-32, expected UTF-8; save it as that")
        if head == BYTE_ORDER_MARK:
            self._start, head = stream.tell(), b""
        self._text = head.decode("latin-1")

    @property
    def position(self) -> int:
        """The byte that is read next."""
        return self._start + self._at

    def next(self) -> str:
        """The next character that is no space, not taken yet; nothing at the end."""
        while True:
            here = self._text[self._at : self._at + 1]
            if here and here not in " \t\n\r":
                return here
            spaces = _SPACES.match(self._text, self._at)
            self._at = spaces.end() if spaces else self._at
            if self._at == len(self._text) and not self._more():
                return ""

    def value(self) -> Any:
        """Take a whole value.

        Raises:
            D2ZeroError: There is none, or it is cut short.
        """
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self._error(error.msg, self._start + error.pos) from error
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise self._error(f"a value that is too long or nested too deep ({error})", self.position) from error
            if end + 2 >= len(self._text) and self._more():  # a number may go on, as 1e-
                continue
            if not self._text.isascii():
                value = self._in_utf8(end)
            self._at = end
            return value

    def elements(self) -> Iterator[tuple[Any, int, int]]:
        """Take a list: each element with the place where it begins and the place after its end.

        Raises:
            D2ZeroError: It is no list, or cut short.
        """
        for _ in self._separated("[", "]"):
            start = self.position
            yield self.value(), start, self.position

    def members(self) -> Iterator[str]:
        """Take an object: each key, whose value has to be taken before the next key is asked for.

        Raises:
            D2ZeroError: It is no object, or cut short.
        """
        for _ in self._separated("{", "}"):
            if self.next() != '"':
                raise self._error("Expecting a key in double quotes", self.position)
            key = self.value()
            self._take(":")
            yield str(key)

    def end(self) -> None:
        """Nothing but space follows.

        Raises:
            D2ZeroError: Something does.
        """
        if self.next():
            raise self._error("Extra data", self.position)

    def _separated(self, opening: str, closing: str) -> Iterator[None]:
        self._take(opening)
        if self.next() != closing:
            yield None
            while self.next() == ",":
                self._at += 1
                yield None
        self._take(closing)

    def _take(self, mark: str) -> None:
        if self.next() != mark:
            raise self._error(f"Expecting {mark!r}", self.position)
        self._at += 1

    def _in_utf8(self, end: int) -> Any:
        try:
            return json.loads(self._text[self._at : end].encode("latin-1").decode())
        except UnicodeDecodeError as error:
            raise self._error(f"no UTF-8 ({error.reason})", self.position + error.start) from error

    def _more(self) -> bool:
        """Read on, as much again as waits already: a long value is parsed again a few times, not often."""
        waiting = self._text[self._at :]
        block = self._stream.read(max(BLOCK, len(waiting)))
        if block:
            self._start += self._at
            self._text, self._at = waiting + block.decode("latin-1"), 0
        return bool(block)

    def _error(self, problem: str, place: int) -> D2ZeroError:
        return D2ZeroError(f"{self._path} is not JSON or is cut short: {problem} at byte {place}")


class EntriesOnDisk(Mapping[Id, Entries]):
    """Entries of a JSON file by a key, parsed again each time they are asked for.

    Memory holds two integers for each stretch of entries of one key, which commas part; in whatever order they are.

    Args:
        stream: The file, open for as long as this is used.
        prepare: What is made of each entry, which is as the file has it.
    """

    def __init__(self, stream: IO[bytes], prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        self._stream, self._prepare = stream, prepare
        self._places: dict[Id, array[int]] = {}  # begin, end, begin, end …
        self._last: Id | None = None

    def note(self, key: Id, start: int, end: int) -> None:
        """The file's next entry: its key and its place."""
        if key == self._last:
            self._places[key][-1] = end
            return
        self._last = key
        self._places.setdefault(key, array("q")).extend((start, end))

    def __getitem__(self, key: Id) -> Entries:
        places, found = self._places[key], []
        for start, end in zip(places[::2], places[1::2], strict=True):
            self._stream.seek(start)
            found += json.loads(b"[" + self._stream.read(end - start) + b"]")
        return list(map(self._prepare, found)) if self._prepare else found

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[Id]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
