"""What the descriptions of engines and `.pt2` files share: the model's contract, its default vocabulary, and JSON."""

import base64
import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.contract import (
    ModelContract,
    bytes_from_base64,
    embeddings_from_json,
    embeddings_to_json,
)
from d2zero_runtime.checked_json import checked, parse_object, refuse_newer
from d2zero_runtime.vocabulary import Vocabulary

VERSION = 1


@dataclass(frozen=True, eq=False)
class Metadata:
    """A description of a compiled network; subclasses add fields that JSON can hold.

    Args:
        contract: The model's contract.
        embeddings: (K, D) float32, the default vocabulary's.
        classifier: The model's classifier by itself, an ONNX file; empty if there is none.
    """

    contract: ModelContract
    embeddings: NDArray[np.float32]
    classifier: bytes = field(default=b"", kw_only=True)

    FIELDS: ClassVar[type[Any]]
    """The dataclass of the subclass's own fields."""

    REMEDY: ClassVar[str] = "export it again"
    """What to do about a damaged description."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The default vocabulary."""
        return self.contract.vocabulary(self.embeddings)

    def with_vocabulary(self, vocabulary: Vocabulary) -> Self:
        """The description with another default vocabulary.

        Raises:
            D2ZeroError: The vocabulary's width or encoder does not fit, or its classes are constants.
        """
        self.contract.check_compatible(vocabulary, self.vocabulary)
        return replace(self, contract=self.contract.with_vocabulary(vocabulary), embeddings=vocabulary.embeddings)

    def to_json(self, indent: int | None = None) -> str:
        """The description as JSON."""
        return json.dumps(
            {
                "version": VERSION,
                **self._own_fields(),
                "contract": asdict(self.contract),
                "embeddings": embeddings_to_json(self.embeddings),
                "classifier": base64.b64encode(self.classifier).decode(),
            },
            indent=indent,
        )

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Read and check a description.

        Args:
            text: What `to_json` wrote.
            where: The file, for error messages.

        Raises:
            D2ZeroError: It is damaged, of a newer version, or lacks a field.
        """
        values = parse_object(text, where)
        refuse_newer(values.get("version", 0), VERSION, where, "the description")
        shared = checked(_Shared, values, where, remedy=cls.REMEDY)
        own = vars(checked(cls.FIELDS, values, where, remedy=cls.REMEDY))
        return cls(
            contract=ModelContract.from_json(json.dumps(shared.contract), where),
            embeddings=embeddings_from_json(shared.embeddings, where),
            classifier=bytes_from_base64(shared.classifier, f"{where} is damaged: its classifier"),
            **cls._arguments(own, where),
        )

    def _own_fields(self) -> dict[str, Any]:
        """The subclass's fields as JSON has them."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self.FIELDS)}

    @classmethod
    def _arguments(cls, own: dict[str, Any], where: str) -> dict[str, Any]:
        """The reverse of `_own_fields`."""
        return own


@dataclass(frozen=True)
class _Shared:
    """The fields that all descriptions have, as JSON has them."""

    version: int
    contract: dict[str, Any]
    embeddings: dict[str, Any]
    classifier: str = ""  # files from before lack it
