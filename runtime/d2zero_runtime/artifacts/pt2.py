"""What a `.pt2` says about itself: JSON inside the archive, beside the compiled network.

A `.pt2` is an uncompressed zip that torch writes (AOTInductor). Our description is one more entry, `extra/d2zero.json`:
the model's contract, the default vocabulary's embeddings, and what the code was compiled with and for. It is read
without torch.
"""

import json
import struct
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.contract import ModelContract, embeddings_from_json, embeddings_to_json
from d2zero_runtime.checked_json import checked, parse_object, refuse_newer
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.files import whole_file
from d2zero_runtime.vocabulary import Vocabulary

DESCRIPTION_VERSION = 1
ENTRY = "extra/d2zero.json"
_ZIP_ERRORS = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError, struct.error)


@dataclass(frozen=True)
class _Written:
    """The fields in JSON."""

    version: int
    device: Literal["cpu", "cuda"]
    hardware: str
    torch: str
    operators: tuple[str, ...]
    contract: dict[str, Any]
    embeddings: dict[str, Any]
    channels_last: bool = False


@dataclass(frozen=True, eq=False)
class Pt2Description:
    """All that running a `.pt2` needs to know beside the compiled network.

    Args:
        contract: of the model.
        embeddings: (K, D) float32, of the default vocabulary.
        device: `cpu` or `cuda`: what the code was compiled for.
        hardware: name of the GPU or instruction set that it was compiled for.
        torch: version that compiled it, which is the one that runs it.
        operators: names of operators outside torch that it calls.
        channels_last: whether its images are channels-last in memory.
        version: of the description.
    """

    contract: ModelContract
    embeddings: NDArray[np.float32]
    device: str
    hardware: str
    torch: str
    operators: tuple[str, ...] = ()
    channels_last: bool = False  # files from before lack it
    version: int = DESCRIPTION_VERSION

    @property
    def vocabulary(self) -> Vocabulary:
        """The default vocabulary."""
        return self.contract.vocabulary(self.embeddings)

    def to_json(self) -> str:
        """For the archive."""
        return json.dumps(
            {
                "version": self.version,
                "device": self.device,
                "hardware": self.hardware,
                "torch": self.torch,
                "operators": list(self.operators),
                "channels_last": self.channels_last,
                "contract": json.loads(self.contract.to_json()),
                "embeddings": embeddings_to_json(self.embeddings),
            }
        )

    @classmethod
    def from_json(cls, text: bytes, where: str) -> "Pt2Description":
        """Read and check a description.

        Raises:
            D2ZeroError: it is damaged or of a newer version.
        """
        values = parse_object(text, where)
        refuse_newer(values.get("version", 0), DESCRIPTION_VERSION, where, "the description")
        written = checked(_Written, values, where, remedy="export it again")
        return cls(
            contract=ModelContract.from_json(json.dumps(written.contract), where),
            embeddings=embeddings_from_json(written.embeddings, where),
            **{name: getattr(written, name) for name in ("device", "hardware", "torch", "operators", "channels_last")},
        )

    @classmethod
    def read(cls, path: Path) -> "Pt2Description":
        """The description inside a `.pt2`.

        Raises:
            D2ZeroError: the file is absent or damaged, or `d2zero export` did not make it.
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
        D2ZeroError: the vocabulary's width or encoder does not fit, or its classes are constants.
    """
    description = Pt2Description.read(path)
    contract = description.contract
    contract.require_fit(vocabulary, description.vocabulary)
    changed = replace(description, contract=contract.with_vocabulary(vocabulary), embeddings=vocabulary.embeddings)
    with (
        whole_file(path) as partial,
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
