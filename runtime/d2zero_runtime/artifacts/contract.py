"""What an exported model says about itself: JSON under `d2zero` in the file's metadata."""

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.checked_json import checked, parse_object, refuse_newer, refuse_unknown, require_finite
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.images import Preprocessing, with_new_names
from d2zero_runtime.masks.postprocess import MAX_DETECTIONS, SOFTMAX_TEMPERATURE, Mode, selection
from d2zero_runtime.vocabulary import Vocabulary, check_encoder, check_vocabulary

CONTRACT_KEY = "d2zero"
CONTRACT_VERSION = 1
LARGEST_BATCH = 1024
# Added within version 1: files from before lack them, and need none.
_LATER = frozenset({"calibration", "tf32", "decoder_layers", "end_to_end", "query_dim"})
IMAGES_INPUT = "images"
PIXELS_INPUT = "pixels"  # of end-to-end files
ACTIVE_INPUT = "active"  # of end-to-end files: the classes that compete, an input with a default
EMBEDDINGS_INPUT = "class_embeddings"  # an input with a default: the vocabulary inside
OUTPUTS = ("class_logits", "mask_logits")
FEATURES = ("queries", "background")  # further outputs of the network, which its classifier takes
MaskOutput = Literal["packed", "logits"]
END_TO_END_MODES = (Mode.GZSIS, Mode.ZSIS)
_BAKED = (
    "the model was exported with --bake: its classes are constants, only names and flags can change; export it without"
    " --bake for other classes"
)


@dataclass(frozen=True)
class EndToEnd:
    """What an end-to-end file does after the network (docs/end-to-end.md).

    Args:
        masks: `packed`, (B, N, H, ⌈W/8⌉) uint8, eight pixels per byte, the leftmost in the highest bit; or `logits`,
            (B, N, h, w) float32 at a quarter of the padded size.
        max_detections: N at most.
        mode: `gzsis` or `zsis`.

    Raises:
        D2ZeroError: A field has another value.
    """

    masks: MaskOutput = "packed"
    max_detections: int = MAX_DETECTIONS
    mode: Mode = Mode.GZSIS

    def __post_init__(self) -> None:
        if self.masks not in get_args(MaskOutput):
            raise D2ZeroError(f"masks must be one of {', '.join(get_args(MaskOutput))}, got {self.masks!r}")
        if self.mode not in END_TO_END_MODES:
            raise D2ZeroError(f"an end-to-end file has one of the modes {', '.join(END_TO_END_MODES)}, got {self.mode}")
        if self.max_detections < 1:
            raise D2ZeroError(f"max_detections must be at least 1, got {self.max_detections}")

    def competing(self, vocabulary: Vocabulary) -> NDArray[np.bool_]:
        """Which of a vocabulary's (K,) classes compete in the file's mode.

        Raises:
            D2ZeroError: The mode does not allow the vocabulary.
        """
        return selection(vocabulary, self.mode).competing


@dataclass(frozen=True)
class ModelContract:
    """All that inference needs to know beside the weights and the embeddings.

    Args:
        class_names: Names of the default vocabulary.
        seen: One flag per name.
        active: One flag per name.
        vocabulary_source: Where its embeddings come from.
        synonyms: Other words for its classes, as in `Vocabulary`.
        text_dim: Width of the class embeddings.
        num_queries: Q.
        preprocessing: How images become input.
        softmax_temperature: Factor on the class logits before the softmax.
        precision: The graph's, such as `float32`.
        deform_attn: The implementation of deformable attention in the graph.
        calibration: How a quantized graph was calibrated: images, method, tool, and what it is for.
        batch: Images per run, if the graph was made for one number only.
        baked: Whether the class embeddings are constants of the graph, not an input.
        tf32: Whether GPUs may round the factors of float32 matmuls and convolutions to ten bits.
        decoder_layers: How many the network has, which may be fewer than its checkpoint's; 0 in older files, which have
            all.
        end_to_end: What the file does after the network, if it goes from pixels to detections.
        query_dim: C, the width of the queries and the background that the network hands over; 0 in end-to-end files and
            older ones, which hand over none.
        opset: ONNX's version.
        checkpoint: SHA-256 of the checkpoint's file, if it came from one.
        tools: Versions of what made the file.
        version: The version of this contract.
    """

    class_names: tuple[str, ...]
    seen: tuple[bool, ...]
    active: tuple[bool, ...]
    vocabulary_source: dict[str, Any]
    text_dim: int
    num_queries: int
    preprocessing: Preprocessing
    synonyms: dict[str, str] = field(default_factory=dict)
    softmax_temperature: float = SOFTMAX_TEMPERATURE
    precision: str = "float32"
    deform_attn: str = "gridsample"
    calibration: dict[str, Any] = field(default_factory=dict)
    batch: int | None = None
    baked: bool = False
    tf32: bool = False
    decoder_layers: int = 0
    end_to_end: EndToEnd | None = None
    query_dim: int = 0
    opset: int = 18
    checkpoint: str = ""
    tools: dict[str, str] = field(default_factory=dict)
    version: int = CONTRACT_VERSION

    def __post_init__(self) -> None:
        for name in ("seen", "active"):
            if len(getattr(self, name)) != len(self.class_names):
                raise D2ZeroError(
                    f"expected one flag per class in {name}, got {len(getattr(self, name))} for {len(self.class_names)}"
                )
        for name in ("text_dim", "num_queries", *(["batch"] if self.batch is not None else [])):
            if getattr(self, name) < 1:
                raise D2ZeroError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch is not None and self.batch > LARGEST_BATCH:
            raise D2ZeroError(f"batch must be at most {LARGEST_BATCH}, got {self.batch}")
        require_finite("softmax_temperature", self.softmax_temperature, above=0)

    def to_json(self) -> str:
        """For the file's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> "ModelContract":
        """Read and check a contract.

        Args:
            text: What `to_json` wrote.
            where: The file, for error messages.

        Raises:
            D2ZeroError: It is of a newer version, or lacks a field.
        """
        described, remedy = f"{where}: the model contract", "export the model again"
        values = parse_object(text, described)
        refuse_newer(values.get("version", 0), CONTRACT_VERSION, where, "the model contract")
        if isinstance(values.get("preprocessing"), dict):
            values["preprocessing"] = with_new_names(values["preprocessing"])
            refuse_unknown(Preprocessing, values["preprocessing"], f"preprocessing in {where}:")
            checked(Preprocessing, values["preprocessing"], f"{described}: preprocessing", ("static_size",), remedy)
        if values.get("end_to_end") == {}:  # none, in files of 2026-11-28
            del values["end_to_end"]
        return checked(cls, values, described, _LATER, remedy)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a file of the network hands over, in order."""
        return (*OUTPUTS, *FEATURES) if self.query_dim else OUTPUTS

    @property
    def identity(self) -> str:
        """A digest of what the features of an image depend on: equal for files of one model and precision."""
        parts = (self.checkpoint, self.precision, self.decoder_layers, self.num_queries, self.query_dim)
        described = json.dumps([*parts, asdict(self.preprocessing), self.calibration])
        return hashlib.sha256(described.encode()).hexdigest()

    @property
    def precision_on_gpu(self) -> str:
        """What a GPU computes in: `tf32` where a float32 model allows it."""
        return "tf32" if self.tf32 and self.precision == "float32" else self.precision

    def vocabulary(self, embeddings: NDArray[np.float32]) -> Vocabulary:
        """The default vocabulary, with the embeddings that the file holds."""
        return Vocabulary(
            self.class_names,
            embeddings,
            seen=np.array(self.seen),
            active=np.array(self.active),
            source=self.vocabulary_source,
            synonyms=self.synonyms,
        )

    def with_vocabulary(self, vocabulary: Vocabulary) -> "ModelContract":
        """The contract of the same model with another default vocabulary (see `check_compatible`)."""
        return replace(
            self,
            class_names=vocabulary.names,
            seen=tuple(vocabulary.seen.tolist()),
            active=tuple(vocabulary.active.tolist()),
            vocabulary_source=vocabulary.source,
            synonyms=vocabulary.synonyms,
        )

    def check_compatible(self, vocabulary: Vocabulary, default: Vocabulary) -> None:
        """Refuse a vocabulary that the model cannot use in place of its default one.

        Raises:
            D2ZeroError: Its width or encoder do not fit, nor (where they are constants) its embeddings, nor (in an
                end-to-end file) its synonyms or flags.
        """
        check_vocabulary(vocabulary, self.text_dim, default)
        if self.end_to_end:
            if vocabulary.synonyms:
                raise D2ZeroError("an end-to-end file cannot add up synonyms; use a vocabulary that has none")
            competing = self.end_to_end.competing(vocabulary)
            if self.baked and not np.array_equal(competing, self.end_to_end.competing(default)):
                raise D2ZeroError("the classes that compete are constants of this end-to-end file; export it again")
        if self.baked and not np.array_equal(vocabulary.embeddings, default.embeddings):
            raise D2ZeroError(_BAKED)

    def check_encoder(self, width: int, encoder: str, default: Vocabulary) -> None:
        """Refuse a text encoder whose vocabularies the model cannot use, before names are encoded.

        Raises:
            D2ZeroError: Its width or name do not fit, or the model's embeddings are constants.
        """
        check_encoder(width, encoder, self.text_dim, default.encoder, "the text encoder")
        if self.baked:
            raise D2ZeroError(_BAKED)


def embeddings_to_json(embeddings_KD: NDArray[np.float32]) -> dict[str, Any]:
    """Embeddings for a description in JSON: shape and little-endian float32 as base64."""
    content = base64.b64encode(np.ascontiguousarray(embeddings_KD, "<f4").tobytes()).decode()
    return {"shape": list(embeddings_KD.shape), "float32": content}


def embeddings_from_json(values: object, where: str) -> NDArray[np.float32]:
    """What `embeddings_to_json` wrote.

    Raises:
        D2ZeroError: It is damaged.
    """
    written = checked(_Embeddings, values, f"{where}: class embeddings")
    rows, width = written.shape
    content = bytes_from_base64(written.float32, f"{where} is damaged: its class embeddings")
    if min(rows, width) < 1 or len(content) != 4 * rows * width:
        raise D2ZeroError(
            f"{where} is damaged: {len(content)} bytes of class embeddings are no {rows}x{width} float32 numbers"
        )
    return np.frombuffer(content, "<f4").reshape(rows, width)


def bytes_from_base64(text: str, what: str) -> bytes:
    """Decode.

    Args:
        text: Base64.
        what: The beginning of the message: whose bytes these are.

    Raises:
        D2ZeroError: It is damaged.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise D2ZeroError(f"{what} cannot be read ({error})") from error


@dataclass(frozen=True)
class _Embeddings:
    shape: tuple[int, int]
    float32: str  # base64
