"""What a `.pt2` says about itself: JSON inside the archive, beside the compiled network.

A `.pt2` is an uncompressed zip that torch writes (AOTInductor). Our description is one more entry, `extra/d2zero.json`:
the model's contract, the default vocabulary's embeddings, and what the code was compiled with and for. It is read
without torch.
"""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from d2zero_runtime.artifacts.metadata import Metadata
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.files import atomic_write
from d2zero_runtime.vocabulary import Vocabulary

ENTRY = "extra/d2zero.json"
_ZIP_ERRORS = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError, struct.error)


@dataclass(frozen=True)
class _Fields:
    """The archive's own fields as JSON has them."""

    device: Literal["cpu", "cuda"]
    hardware: str
    torch: str
    operators: tuple[str, ...]
    channels_last: bool = False  # files from before lack it


@dataclass(frozen=True, eq=False)
class Pt2Metadata(Metadata):
    """All that running a `.pt2` needs to know beside the compiled network.

    Args:
        device: What the code was compiled for, `cpu` or `cuda`.
        hardware: The name of the GPU or instruction set that it was compiled for.
        torch: The version that compiled it, which is the one that runs it.
        operators: The names of operators outside torch that it calls.
        channels_last: Whether its images are channels-last in memory.
    """

    device: str
    hardware: str
    torch: str
    operators: tuple[str, ...] = ()
    channels_last: bool = False

    FIELDS: ClassVar[type[Any]] = _Fields

    @classmethod
    def read(cls, path: Path) -> "Pt2Metadata":
        """The description inside a `.pt2`.

        Raises:
            D2ZeroError: The file is absent or damaged, or `d2zero export` did not make it.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(f"/{ENTRY}")]
                if not names:
                    raise D2ZeroError(f"{path} was not made by `d2zero export --format pt2`: it lacks {ENTRY}")
                entry = archive.getinfo(names[0])
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                    raise D2ZeroError(f"{path} is damaged: {ENTRY} claims {entry.file_size} bytes; export it again")
                text = archive.read(entry)
        except FileNotFoundError as error:
            raise D2ZeroError(f"model {path} does not exist") from error
        except D2ZeroError:
            raise
        except _ZIP_ERRORS as error:
            raise D2ZeroError(f"{path} is damaged or no .pt2 ({error}); copy it again or export it again") from error
        return cls.from_json(text, str(path))

    def add_to(self, path: Path) -> None:
        """Add the description to an archive that has none."""
        with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
            archive.writestr(f"{_root(archive)}/{ENTRY}", self.to_json())


def replace_pt2_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Replace the default vocabulary of a `.pt2`; what torch wrote is copied as it is. Atomic.

    Raises:
        D2ZeroError: The vocabulary's width or encoder does not fit, or its classes are constants.
    """
    changed = Pt2Metadata.read(path).with_vocabulary(vocabulary)
    with (
        atomic_write(path) as partial,
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as new,
    ):
        for entry in old.infolist():
            if not entry.filename.endswith(f"/{ENTRY}"):
                with old.open(entry) as source, new.open(entry.filename, "w", force_zip64=True) as target:
                    while block := source.read(1 << 24):
                        target.write(block)
        new.writestr(f"{_root(old)}/{ENTRY}", changed.to_json())


def _root(archive: zipfile.ZipFile) -> str:
    """The folder that all entries are in."""
    return archive.namelist()[0].split("/", 1)[0]
