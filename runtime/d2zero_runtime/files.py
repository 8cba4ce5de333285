"""Files that are whole or not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what is to become `path`, in the same folder, which is made; for one writer at a time.

    When the block ends, the file there takes the place of `path` in one step, with the permissions of what it replaces;
    of a link, the file that it names is replaced. Where anything fails, `path` stays what it was and no file is left
    behind.
    """
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:60]}.partial")  # names have at most 255 bytes
    try:
        yield partial
        if path.exists():
            partial.chmod(path.stat().st_mode & 0o7777)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; the folder is made."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
