"""What an exported model says about itself: JSON under `d2zero` in the file's metadata."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.errors import D2ZeroError, listed
from d2zero_runtime.images import Preprocessing
from d2zero_runtime.postprocess import SOFTMAX_TEMPERATURE
from d2zero_runtime.vocabulary import Vocabulary

CONTRACT_KEY = "d2zero"
CONTRACT_VERSION = 1
EMBEDDINGS_INPUT = "class_embeddings"  # an input with a default: the vocabulary inside


@dataclass(frozen=True)
class ModelContract:
    """All that inference needs to know beside the weights and the embeddings.

    Args:
        class_names: names of the default vocabulary.
        seen: a flag a name.
        active: a flag a name.
        vocabulary_source: where its embeddings come from.
        text_dim: width of the class embeddings.
        num_queries: Q.
        preprocessing: how images become input.
        softmax_temperature: of the class probabilities.
        precision: of the graph, such as `float32`.
        deform_attn: the form of deformable attention in the graph.
        opset: of ONNX.
        checkpoint: SHA-256 of the checkpoint's file, if it came from one.
        tools: versions of what made the file.
        version: of this contract.
    """

    class_names: tuple[str, ...]
    seen: tuple[bool, ...]
    active: tuple[bool, ...]
    vocabulary_source: dict[str, Any]
    text_dim: int
    num_queries: int
    preprocessing: Preprocessing
    softmax_temperature: float = SOFTMAX_TEMPERATURE
    precision: str = "float32"
    deform_attn: str = "gridsample"
    opset: int = 18
    checkpoint: str = ""
    tools: dict[str, str] = field(default_factory=dict)
    version: int = CONTRACT_VERSION

    def to_json(self) -> str:
        """For the file's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> "ModelContract":
        """Read and check a contract.

        Args:
            text: what `to_json` wrote.
            where: the file, for error messages.

        Raises:
            D2ZeroError: it is of a newer version, or lacks a field.
        """
        values = json.loads(text)
        if values.get("version", 0) > CONTRACT_VERSION:
            raise D2ZeroError(
                f"{where} follows version {values['version']} of the model contract, this d2zero reads up to"
                f" {CONTRACT_VERSION}; upgrade d2zero"
            )
        names = [entry.name for entry in fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise D2ZeroError(f"{where}: the model contract lacks {listed(missing)}; export the model again")
        preprocessing = values["preprocessing"]
        return cls(
            **{
                **{name: values[name] for name in names},
                "class_names": tuple(values["class_names"]),
                "seen": tuple(values["seen"]),
                "active": tuple(values["active"]),
                "preprocessing": Preprocessing(
                    **{**preprocessing, "mean": tuple(preprocessing["mean"]), "std": tuple(preprocessing["std"])}
                ),
            }
        )

    def vocabulary(self, embeddings: NDArray[np.float32]) -> Vocabulary:
        """The default vocabulary, with the embeddings that the file holds."""
        return Vocabulary(
            self.class_names,
            embeddings,
            seen=np.array(self.seen),
            active=np.array(self.active),
            source=self.vocabulary_source,
        )
