"""What a D2Zero model is made of, as data. Saved in every checkpoint."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from d2zero_runtime import D2ZeroError
from d2zero_runtime.checked_json import checked, refuse_unknown, require_finite
from d2zero_runtime.images import Preprocessing, with_new_names
from d2zero_runtime.masks.postprocess import SOFTMAX_TEMPERATURE

LEVELS = 3  # of the pixel decoder's memory: strides 32, 16, 8

HeadName = Literal["semantic", "closed"]
LARGEST = 1 << 16  # of a model's widths and counts
MOST_LAYERS = 256


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a model. The defaults are the published ResNet-50, word2vec model."""

    backbone: str = "resnet50"  # any timm model with features at strides 4, 8, 16 and 32
    backbone_options: dict[str, Any] = field(default_factory=dict)  # passed to timm.create_model
    frozen_backbone_norm: bool = True  # batch norm as fixed scale and shift
    backbone_output_norm: bool = False  # layer norm on each of the backbone's maps, as Mask2Former's Swin has
    hidden_dim: int = 256  # C, of pixel decoder, queries and mask features
    num_heads: int = 8  # of pixel decoder and decoder attention
    encoder_layers: int = 6  # deformable layers of the pixel decoder
    encoder_points: int = 4  # samples per head, level and query
    encoder_ffn_dim: int = 1024
    num_queries: int = 100  # Q
    decoder_layers: int = 9  # masked-attention layers, cycling strides 32, 16, 8
    decoder_ffn_dim: int = 2048
    head: HeadName = "semantic"  # classes by their text, or "closed": a linear layer with one output per class
    text_dim: int = 300  # D, width of the class embeddings; of a closed head, its number of classes
    semantic_dim: int = 512  # where queries and classes are compared
    adaptation_layers: int = 1  # input-conditional adaptation of the classes; 0 leaves it out
    adaptation_heads: int = 8
    adaptation_ffn_dim: int = 2048
    adaptation_dropout: float = 0.1
    logit_scale: float = 100.0  # class logits are logit_scale · cosine
    softmax_temperature: float = SOFTMAX_TEMPERATURE  # factor on the logits at inference
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        if self.head not in get_args(HeadName):
            raise D2ZeroError(f"model.head must be one of {', '.join(get_args(HeadName))}, got {self.head!r}")
        for name in (
            "hidden_dim",
            "num_heads",
            "num_queries",
            "text_dim",
            "semantic_dim",
            "encoder_points",
            "adaptation_heads",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "adaptation_ffn_dim",
        ):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise D2ZeroError(f"model.{name} must be at least 1 and at most {LARGEST}, got {getattr(self, name)}")
        for name in ("encoder_layers", "decoder_layers", "adaptation_layers"):
            layers = getattr(self, name)
            if not 0 <= layers <= MOST_LAYERS:
                raise D2ZeroError(f"model.{name} must not be negative or above {MOST_LAYERS}, got {layers}")
        for name in ("logit_scale", "softmax_temperature"):
            require_finite(f"model.{name}", getattr(self, name), above=0)
        if not 0 <= self.adaptation_dropout < 1:
            raise D2ZeroError(f"model.adaptation_dropout must be from 0 to below 1, got {self.adaptation_dropout}")
        if self.hidden_dim % self.num_heads or self.hidden_dim % 4 or self.hidden_dim % 32:
            raise D2ZeroError(
                f"model.hidden_dim must be a multiple of 32 and of num_heads ({self.num_heads}), got {self.hidden_dim}"
            )
        if self.semantic_dim % self.adaptation_heads:
            raise D2ZeroError(
                f"model.semantic_dim must be a multiple of adaptation_heads ({self.adaptation_heads}),"
                f" got {self.semantic_dim}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint's metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read what `to_dict` wrote.

        Raises:
            D2ZeroError: A key is unknown (written by a newer version, most likely).
        """
        refuse_unknown(cls, values, "model settings")
        if isinstance(values.get("preprocessing"), dict):
            values = {**values, "preprocessing": with_new_names(values["preprocessing"])}
            refuse_unknown(Preprocessing, values["preprocessing"], "preprocessing")
        return checked(cls, values, "the model's configuration")
