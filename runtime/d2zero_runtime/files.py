"""Files that are whole or not there, and files for one process at a time."""

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from d2zero_runtime.errors import D2ZeroError

if sys.platform != "win32":
    import fcntl

PATIENCE = 5.0  # seconds in which a process that outlives its killed parent gives up its files


def check_output(path: Path | None, flag: str = "--output", folder: bool = False) -> None:
    """Refuse a place where nothing can be written, before the work whose result it shall hold.

    Args:
        path: Where to write; nothing is checked if it is None.
        flag: The flag that it was given with, for the message.
        folder: Whether it is to be a folder, not a file.

    Raises:
        D2ZeroError: It is a folder where a file should be, or the reverse; or its folder cannot be written to.
    """
    if path is None:
        return
    if path.exists() and path.is_dir() != folder:
        wanted, found = ("folder", "file") if folder else ("file", "folder")
        raise D2ZeroError(f"{flag} takes a {wanted}, {path} is a {found}")
    existing = next(place for place in (path, *path.parents) if place.exists() and (place != path or folder))
    if not existing.is_dir():
        raise D2ZeroError(f"{flag} {path} cannot be written: {existing} is no folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise D2ZeroError(f"{flag} {path} cannot be written: no permission to write in {existing}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Where to write what is to become `path`, in the same folder, which is made; for one writer at a time.

    When the block ends, the file there takes the place of `path` in one step, with the permissions of what it replaces,
    or of a new file; of a link, the file that it names is replaced. Where anything fails, `path` stays what it was and
    no file is left behind.
    """
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:60]}.partial")  # names have at most 255 bytes
    try:
        partial.touch()  # with the permissions of the umask, which not every writer keeps
        permissions = (path if path.exists() else partial).stat().st_mode & 0o7777
        yield partial
        partial.chmod(permissions)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; the folder is made."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path, message: str) -> Iterator[IO[bytes]]:
    """A file to append to, made if it is not there, for one process at a time.

    It is free again when the block or the process ends, however it does. Where files cannot be locked, it never is
    another's.

    Args:
        path: The file.
        message: What to say where another process has it.

    Raises:
        D2ZeroError: Another process has it.
    """
    with path.open("ab+") as stream:
        _lock(stream, message)
        yield stream


def _lock(stream: IO[bytes], message: str) -> None:
    if sys.platform == "win32":
        return
    deadline = time.monotonic() + PATIENCE
    with suppress(OSError):  # some file systems have no locks
        while True:
            try:
                return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise D2ZeroError(message) from None
                time.sleep(0.05)
