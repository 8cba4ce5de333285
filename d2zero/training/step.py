"""One training step: forward, the losses of all heads, backward, clipping, AdamW.

The loop (`d2zero.training.loop`) and the study of it (`benchmarks/studies/training.py`) run the same code. Where
batches come from, and what becomes of a step's losses, is left to them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from d2zero.data.training_set import Batch
from d2zero.losses.criterion import Criterion
from d2zero.model import D2Zero, HeadOutput
from d2zero.model.deformable import FUNCTIONS, DeformableFunction, DeformableImpl
from d2zero.processes import Processes
from d2zero.training.config import TrainConfig
from d2zero.training.optim import ScaleWatch, build_optimizer, lr_factor, set_lr
from d2zero_runtime import D2ZeroError
from d2zero_runtime.backends.torch_math import float32_math
from d2zero_runtime.errors import join_truncated

PARTS = ("forward", "backward", "optimiser")  # what a step consists of, in order; forward has the losses in it


class TrainingStep:
    """A model, its optimiser, and how they take a step.

    Args:
        config: Precision, memory layout, implementation of deformable attention, compilation, loss, optimiser.
        model: Moved to the device and trained in place.
        processes: This one among all, and its device.

    Raises:
        D2ZeroError: The device cannot do what the configuration asks for.
    """

    def __init__(self, config: TrainConfig, model: D2Zero, processes: Processes) -> None:
        device = processes.device
        if config.batch_size // processes.count % config.accumulate:
            raise D2ZeroError(
                f"a process's batch of {config.batch_size // processes.count} images cannot be divided into"
                f" {config.accumulate} equal parts; change accumulate or batch_size"
            )
        self.config, self.model, self.processes = config, model, processes
        self.precision = precision_on(config.precision, device)
        model.to(device)
        model.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
        model.set_deformable(deformable_function(config.deformable))
        self.frozen = frozen_parts(model, config.freeze)
        self.optimizer = build_optimizer(model, config.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.scale_watch = ScaleWatch(self.scaler)
        vocabulary = model.vocabulary
        embeddings = torch.from_numpy(vocabulary.embeddings).to(device)
        seen = torch.from_numpy(vocabulary.seen).to(device)
        self.criterion = Criterion(config.loss, embeddings[seen], embeddings[~seen])
        with_unseen = bool(config.loss.unseen_weight) and bool((~seen).any())
        self.text = torch.cat([embeddings[seen], embeddings[~seen]]) if with_unseen else embeddings[seen]
        preprocessing = config.model.preprocessing
        self.mean = torch.tensor(preprocessing.mean, device=device)[:, None, None]
        self.std = torch.tensor(preprocessing.std, device=device)[:, None, None]
        self.network: Callable[..., list[HeadOutput]] = model
        self.distributed: DistributedDataParallel | None = None  # what `network` wraps, with several processes
        self.averaged = _averaged(model, config.ema)

    @property
    def shown(self) -> D2Zero:
        """The model to evaluate and to save: with the average of the weights, if there is one."""
        averaged = self.averaged.module if self.averaged else None
        return averaged if isinstance(averaged, D2Zero) else self.model

    def average_state(self) -> dict[str, Any]:
        """What a resume needs of the average of the weights; empty without one."""
        if not self.averaged:
            return {}
        return {"model": self.averaged.module.state_dict(), "updates": int(self.averaged.n_averaged)}

    def load_average(self, state: dict[str, Any] | None) -> None:
        """Go on from what `average_state` returned."""
        if self.averaged and state:
            self.averaged.module.load_state_dict(state["model"])
            self.averaged.n_averaged.fill_(state["updates"])

    def train(self) -> None:
        """Put the model into training mode, except its frozen parts."""
        self.model.train()
        for part in self.frozen:
            part.eval()

    def prepare(self) -> None:
        """Join the processes and compile, once the model has the weights to begin with."""
        config, processes = self.config, self.processes
        if processes.count > 1:
            on_gpu = processes.device.type == "cuda"
            if on_gpu and not config.model.frozen_backbone_norm:
                convert_sync_batchnorm(self.model)
            ids = [processes.device.index] if on_gpu else None
            self.network = self.distributed = DistributedDataParallel(self.model, device_ids=ids)
        if config.compile:
            # A wrapper around the model and not the model itself: pictures are drawn at other sizes, uncompiled.
            self.network = torch.compile(self.network, dynamic=False)

    def __call__(
        self, step: int, batch: Batch, finished: Callable[[str], None] = lambda part: None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Take a step.

        Args:
            step: How many were done before; with the configuration's seed it decides all that is random.
            batch: This process's images and targets.
            finished: Called with each of `PARTS` when it is done; after the backward, gradients are not yet clipped.

        Returns:
            The losses by name, of all processes together, their sum first as `loss`; and the gradient's norm.

        Raises:
            D2ZeroError: The loss or the gradient is not finite; or, one step late, float16's gradients are not
                whatever they are scaled by.
        """
        with self._math():
            return self._step(step, batch, finished)

    @contextmanager
    def _math(self) -> Iterator[None]:
        """How a GPU is to compute a step, restored after it; compiled code is traced under it, too."""
        if self.processes.device.type != "cuda":
            yield
            return
        with float32_math(torch, self.config.tf32), without_cudnn_attention():
            yield

    def _step(self, step: int, batch: Batch, finished: Callable[[str], None]) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(self.config.seed * 1_000_003 + step * 1009 + self.processes.rank)  # dropout
        set_lr(self.optimizer, lr_factor(step, self.config.steps, self.config.optim))
        self.optimizer.zero_grad(set_to_none=True)
        batches = batch.parts(self.config.accumulate)
        parts = [self._gradients(step, index, part, finished) for index, part in enumerate(batches)]
        losses = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
        self.scaler.unscale_(self.optimizer)
        gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        if not self.scaler.is_enabled():  # with float16, the scaler skips such a step and scales down
            self._check_finite(gradient_norm, {"gradient": gradient_norm}, batch, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged:
            self.averaged.update_parameters(self.model)
        finished("optimiser")
        return self._of_all_processes(losses), gradient_norm

    def _gradients(self, step: int, index: int, part: Batch, finished: Callable[[str], None]) -> dict[str, Tensor]:
        """Add up the gradients of a part of a batch, each part weighing the same; returns its share of the losses."""
        count = self.config.accumulate
        with self._synchronised(last=index == count - 1):
            losses = {name: loss / count for name, loss in self._losses(part).items()}
            total = torch.stack(list(losses.values())).sum()
            self._check_finite(total, losses, part, step)  # waits for the device
            if index == 0:
                self.scale_watch.check(step)
            finished("forward")
            self.scaler.scale(total).backward()
            finished("backward")
        return {"loss": total.detach(), **{name: loss.detach() for name, loss in losses.items()}}

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Gradients cross between the processes with the last part of a batch."""
        if last or self.distributed is None:
            return nullcontext()
        synchronised: AbstractContextManager[None] = self.distributed.no_sync()
        return synchronised

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        device = self.processes.device
        images = self._normalised(batch.images)
        targets = [target.to(device) for target in batch.targets]
        generators = [torch.Generator(device).manual_seed(seed) for seed in batch.seeds]
        autocast = nullcontext() if self.precision is None else torch.autocast(device.type, self.precision)
        with autocast:
            heads = self.network(images, self.text, all_heads=True)
        return self.criterion(heads, targets, generators)

    def _normalised(self, images_B3HW: Tensor) -> Tensor:
        images = images_B3HW.to(self.processes.device, non_blocking=True)
        images = (images.float() - self.mean) / self.std
        return images.to(memory_format=torch.channels_last) if self.config.channels_last else images

    def _check_finite(self, total: Tensor, losses: dict[str, Tensor], batch: Batch, step: int) -> None:
        finite = torch.isfinite(total.detach()).to(torch.float32)
        if self.processes.count > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if finite:
            return
        broken = [name for name, value in losses.items() if not torch.isfinite(value)]
        raise D2ZeroError(
            f"the loss is not finite at step {step + 1} ({join_truncated(broken, 3) or 'in another process'}), images"
            f" {join_truncated(batch.file_names, 32)}. Nothing of it was saved: look at these images, or begin a new"
            " run with a lower optim.lr"
        )

    def _of_all_processes(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each loss averaged over the processes: that of the whole batch."""
        values = torch.stack([value.detach() for value in losses.values()])
        if self.processes.count > 1:
            dist.all_reduce(values)
            values = values / self.processes.count
        return dict(zip(losses, values.unbind(), strict=True))


def frozen_parts(model: D2Zero, names: Sequence[str]) -> list[nn.Module]:
    """Parts of a model by their names, such as `backbone`, whose parameters need no gradient from now on.

    Raises:
        D2ZeroError: There is no such part, or nothing is left to train.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in names if not name or name not in modules]
    if unknown:
        known = join_truncated([name for name, _ in model.named_children()], 10)
        raise D2ZeroError(f"freeze names {unknown[0]!r}, which the model lacks; its parts are {known}")
    parts = [modules[name] for name in names]
    for part in parts:
        part.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise D2ZeroError("freeze leaves nothing to train")
    return parts


def _averaged(model: D2Zero, decay: float) -> AveragedModel | None:
    """A copy of the model whose weights follow it; its buffers are the model's."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN out of `scaled_dot_product_attention`; restored after the block.

    On Hopper it makes NaN gradients of masked attention where keys are 64 modulo 128 (pytorch#196678), and the
    recipe's 960x960 images have 14 400.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def deformable_function(name: str) -> DeformableFunction | None:
    """How deformable attention is computed; `auto`, None, takes the fastest where the tensors are."""
    return None if name == "auto" else FUNCTIONS[DeformableImpl(name)]


def precision_on(name: str, device: torch.device) -> torch.dtype | None:
    """What mixed precision computes in; None for float32 throughout.

    Raises:
        D2ZeroError: The device has no such precision.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else None
    if name == "float16" and device.type == "cpu":
        raise D2ZeroError("precision float16 needs a GPU; use --set precision=float32 or bfloat16 on a CPU")
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
