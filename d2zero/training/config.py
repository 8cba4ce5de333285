"""What a training run does, as data: recipes, and settings changed by name.

A recipe says nothing about data: the vocabulary says which classes are seen.
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from d2zero.data.augment import AugmentConfig
from d2zero.losses.config import LossConfig
from d2zero.model import ModelConfig
from d2zero.model.deformable import DeformableImpl
from d2zero.processes import usable_cores
from d2zero_runtime import D2ZeroError
from d2zero_runtime.checked_json import checked
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.images import Preprocessing

logger = logging.getLogger("d2zero")

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("steps", "cosine")
DEFORMABLE = (DeformableImpl.GRID_SAMPLE, DeformableImpl.GATHER, DeformableImpl.TRITON)  # those with a backward


def default_workers() -> int:
    """Four, or as many as there are cores that this process may use."""
    return min(4, usable_cores())


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. The defaults are the published recipe."""

    lr: float = 1e-4
    backbone_lr_factor: float = 0.1
    weight_decay: float = 0.05  # none on norms and embeddings
    clip_norm: float = 0.01  # L2 norm of the whole model's gradient
    warmup_steps: float = 10  # below 1: a share of the run
    schedule: str = "steps"  # or "cosine"
    milestones: tuple[float, ...] = ()  # steps at which lr is multiplied by `gamma`; below 1: shares of the run
    gamma: float = 0.1
    final_factor: float = 0.02  # what the cosine schedule ends at

    def __post_init__(self) -> None:
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise D2ZeroError(f"optim.{name} must be positive, got {getattr(self, name)}")
        for name in ("backbone_lr_factor", "weight_decay", "warmup_steps", "gamma", "final_factor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise D2ZeroError(f"optim.{name} must not be negative, got {getattr(self, name)}")
        if not all(isinstance(milestone, (int, float)) and 0 < milestone < math.inf for milestone in self.milestones):
            raise D2ZeroError(
                "optim.milestones must be steps, such as [1000, 2000], or shares of the run, such as [0.9, 0.95], got"
                f" {list(self.milestones)}"
            )
        if self.schedule not in SCHEDULES:
            raise D2ZeroError(f"optim.schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")

    def with_warmup_within(self, steps: int) -> "OptimConfig":
        """The same with a warm-up of at most a tenth of so many steps."""
        return self if self.warmup_steps < 1 else replace(self, warmup_steps=min(self.warmup_steps, steps / 10))


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    steps: int = 0  # 0: as many as the epochs take
    epochs: float = 100.0  # passes over the data set, unless steps are given
    batch_size: int = 16  # of all processes together
    accumulate: int = 1  # parts of a batch whose gradients are added up, where the whole takes too much memory
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    seed: int = 0
    precision: str = "auto"  # float16 on a GPU, float32 on a CPU
    tf32: bool = False  # TF32 in float32 convolutions and matmuls on a GPU, e.g. of the float32 pixel decoder
    channels_last: bool = True
    deformable: str = "auto"  # or one of DEFORMABLE; auto is the Triton kernel on a GPU, grid_sample on a CPU
    compile: bool = False  # torch.compile of the network: minutes at the start, then faster steps
    freeze: tuple[str, ...] = ()  # parts that are not trained, such as backbone or pixel_decoder
    ema: float = 0.0  # decay of a moving average of the weights, which is then evaluated and saved; 0 for none
    workers: int = field(default_factory=default_workers)  # processes that read images; 0 reads in the training process
    cache: bool = False  # keep decoded images in memory (small data sets)
    log_every: int = 20
    checkpoint_every: int = 1000
    keep_every: int = 0  # steps between checkpoints that are kept, in checkpoints/; 0 keeps none
    picture_every: int = 5000  # 0 for none
    eval_every: int = 0  # steps between evaluations, of which the best model is kept; 0 for none
    eval_images: int = 0  # at most so many images; 0 for all

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise D2ZeroError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "seed", "workers", "keep_every", "picture_every", "eval_every", "eval_images"):
            if getattr(self, name) < 0:
                raise D2ZeroError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.epochs < math.inf:
            raise D2ZeroError(f"epochs must be positive, got {self.epochs}")
        if not 0 <= self.ema < 1:
            raise D2ZeroError(f"ema must be from 0 to below 1, such as 0.999, got {self.ema}")
        if self.precision not in PRECISIONS:
            raise D2ZeroError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.deformable != "auto":
            DeformableImpl.parse(self.deformable, DEFORMABLE, "deformable must be auto or one of")

    def for_images(self, count: int) -> "TrainConfig":
        """The configuration with the number of steps that its epochs take over so many images."""
        if self.steps:
            return self
        steps = max(1, round(self.epochs * count / self.batch_size))
        return replace(self, steps=steps, optim=self.optim.with_warmup_within(steps))


def default() -> TrainConfig:
    """The published optimiser and schedule over a hundred epochs, for a data set of any size."""
    return TrainConfig(optim=OptimConfig(milestones=(0.9, 0.95)))


def coco_48_17() -> TrainConfig:
    """The published 48/17 run."""
    return TrainConfig(steps=140_350, optim=OptimConfig(milestones=(126_315, 133_333)))


def coco_65_15() -> TrainConfig:
    """The published 65/15 run."""
    return TrainConfig(steps=210_525, optim=OptimConfig(milestones=(189_472, 200_000)))


def shapes() -> TrainConfig:
    """The demo: a small model for the drawn data set, trained on two CPU cores."""
    model = ModelConfig(
        backbone="test_resnet",
        backbone_options={"channels": [48, 96, 128, 96]},
        frozen_backbone_norm=False,
        hidden_dim=128,
        num_heads=4,
        encoder_layers=1,
        encoder_ffn_dim=256,
        num_queries=15,
        decoder_layers=3,
        decoder_ffn_dim=256,
        text_dim=64,
        semantic_dim=128,
        adaptation_ffn_dim=256,
        adaptation_dropout=0.0,
        logit_scale=20.0,
        softmax_temperature=1.0,
        preprocessing=Preprocessing(shortest_edge=96, longest_edge=160),
    )
    return TrainConfig(
        steps=2000,
        model=model,
        loss=LossConfig(num_points=256),
        optim=OptimConfig(lr=1e-3, backbone_lr_factor=1.0, clip_norm=1.0, warmup_steps=100, schedule="cosine"),
        augment=AugmentConfig(size=96, scale_range=(1.0, 1.0), vertical_flip=True, quarter_turns=True),
        workers=0,
        cache=True,
        channels_last=True,
        checkpoint_every=250,
        picture_every=500,
    )


PRESETS = {"default": default, "coco-48-17": coco_48_17, "coco-65-15": coco_65_15, "shapes": shapes}


def find_preset(name: str) -> TrainConfig:
    """The preset of that name.

    Raises:
        D2ZeroError: There is no such preset.
    """
    if name not in PRESETS:
        raise D2ZeroError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()


def with_length(config: TrainConfig, steps: int = 0, epochs: float = 0.0) -> TrainConfig:
    """A recipe for another number of steps, or of epochs.

    Milestones keep their share of the run. The warm-up keeps its steps, but takes at most a tenth of them.
    """
    optim, length = config.optim, config.steps
    if length:  # milestones after the end are never reached
        shares = (entry if entry < 1 else entry / length for entry in optim.milestones)
        optim = replace(optim, milestones=tuple(share for share in shares if share < 1))
    if steps:
        milestones = (float(round(entry * steps)) if entry < 1 else entry for entry in optim.milestones)
        optim = replace(optim, milestones=tuple(milestones)).with_warmup_within(steps)
    return replace(config, steps=steps, epochs=epochs or config.epochs, optim=optim)


def with_batch_size(config: TrainConfig, batch_size: int) -> TrainConfig:
    """A recipe for another batch size: the learning rate grows and falls with it."""
    lr = config.optim.lr * batch_size / config.batch_size
    return replace(config, batch_size=batch_size, optim=replace(config.optim, lr=lr))


def with_settings(config: TrainConfig, settings: list[str]) -> TrainConfig:
    """Change settings given as `key=value`, such as `optim.lr=2e-4` or `model.backbone=convnext_tiny`.

    Another backbone begins without options; give its own after it.

    Raises:
        D2ZeroError: A setting is malformed, unknown, or has a value of the wrong kind.
    """
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise D2ZeroError(f"--set takes key=value, such as optim.lr=2e-4, got {setting!r}")
        if key == "epochs" and config.steps:
            raise D2ZeroError("epochs count only without steps, which this recipe has; give --epochs instead")
        changed = _changed(config, key.split("."), key, text)
        if changed.model.backbone != config.model.backbone and config.model.backbone_options:
            logger.warning(
                "model.backbone_options of %s are dropped: %s", config.model.backbone, config.model.backbone_options
            )
            changed = replace(changed, model=replace(changed.model, backbone_options={}))
        config = changed
    return config


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain data that survives JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def config_from_dict(values: dict[str, Any], where: str) -> TrainConfig:
    """Read what `config_to_dict` made; settings that are absent have their defaults.

    Args:
        values: What JSON made.
        where: The file, for error messages.

    Raises:
        D2ZeroError: A setting is unknown, of another type, or has a value that cannot be.
    """
    values = {key: value for key, value in values.items() if key != "split"}  # in files from before 2026-11-28
    _refuse_unknown(TrainConfig, values, where, "")
    if isinstance(values.get("model"), dict):
        values["model"] = asdict(ModelConfig.from_dict(values["model"]))
    return checked(TrainConfig, values, where, remedy="correct it")


def _refuse_unknown(kind: type[Any], values: dict[str, Any], where: str, prefix: str) -> None:
    known: dict[str, Any] = {entry.name: entry.type for entry in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise D2ZeroError(f"{where} has the setting {prefix}{key}, which this d2zero does not know")
        if is_dataclass(known[key]) and isinstance(value, dict) and key != "model":
            _refuse_unknown(known[key], value, where, f"{prefix}{key}.")


def _changed(config: Any, path: list[str], key: str, text: str) -> Any:
    assert is_dataclass(config) and not isinstance(config, type)
    names = [entry.name for entry in fields(config)]
    if path[0] not in names:
        raise D2ZeroError(f"no setting {key!r}; here there are {join_truncated(names, 30)}")
    current = getattr(config, path[0])
    if len(path) > 1:
        if not is_dataclass(current):
            raise D2ZeroError(f"no setting {key!r}: {path[0]} has no parts")
        return replace(config, **{path[0]: _changed(current, path[1:], key, text)})
    if is_dataclass(current):
        raise D2ZeroError(
            f"{key!r} is a group of settings; name one of {join_truncated([f.name for f in fields(current)], 30)}"
        )
    return replace(config, **{path[0]: _parsed(key, text, current)})


def _parsed(key: str, text: str, current: Any) -> Any:
    if isinstance(current, str):
        return text
    try:
        value = json.loads(text.lower() if isinstance(current, bool) else text)
    except json.JSONDecodeError:
        value = text
    if isinstance(current, tuple) and isinstance(value, (list, str)):
        return tuple(value if isinstance(value, list) else value.split(","))
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(current):
        raise D2ZeroError(f"{key} must be of type {type(current).__name__} (now {current!r}), got {text!r}")
    return value
