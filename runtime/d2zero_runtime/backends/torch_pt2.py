"""Running a `.pt2`, a network compiled by AOTInductor, where torch is installed: on a CPU or a GPU.

On a GPU every shape has, from its second run on, a CUDA graph; shapes that were used last are kept. Mask logits stay on
the GPU, and masks are made there (`masks.device`). Calls from several threads take turns.

Letters: B batch, K classes, D text width, H and W the padded input's sides.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.pt2 import Pt2Metadata
from d2zero_runtime.backends.base import Backend, LatestUpload, Raw
from d2zero_runtime.backends.inputs import Input, PixelBatch
from d2zero_runtime.backends.torch_math import float32_math
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.masks.device import DeviceLogits

MAX_SHAPES = 8  # graphs kept
OPERATORS = "d2zero.operators"  # entry points: modules that bring operators outside torch

Network = Callable[..., Any]  # (images, embeddings) -> what `ModelContract.outputs` names; all tensors


class Pt2Backend(Backend[Input]):
    """A compiled network on the device that it was compiled for.

    Args:
        path: The archive.
        description: The archive's description.
        device: CUDA's number of the GPU, where it was compiled for one.
        cuda_graphs: Replay a captured graph from a shape's second run on.
        threads: CPU threads; torch's choice if left out.

    Raises:
        D2ZeroError: Torch or the GPU is absent, or the archive is not for them.
    """

    def __init__(
        self,
        path: Path,
        description: Pt2Metadata,
        device: int = 0,
        cuda_graphs: bool = True,
        threads: int | None = None,
    ) -> None:
        self._torch = torch = _torch()
        _check_compatible(path, description, torch)
        on_gpu = self.on_gpu = self.accepts_uint8 = description.device == "cuda"
        self._device = torch.device("cuda", device) if on_gpu else torch.device("cpu")
        if threads:
            torch.set_num_threads(threads)
        _load_operators(description.operators, torch)
        self._contract = description.contract
        self._channels_last = description.channels_last
        self.precision = self._contract.precision_on_gpu if on_gpu else self._contract.precision
        self._uploaded = LatestUpload(lambda array: torch.tensor(array, device=self._device))
        self._lock = threading.Lock()
        with self._ready():
            network = _loaded(path, torch, device if on_gpu else -1)
        static = bool(self._contract.preprocessing.static_size and self._contract.batch)
        self._network = GraphedNetwork(network, torch, search=static) if on_gpu and cuda_graphs else network
        where = torch.cuda.get_device_name(self._device) if on_gpu else "CPU"
        self.name = (
            f"torch {torch.__version__}, AOTInductor ({where}{', CUDA graphs' if on_gpu and cuda_graphs else ''})"
        )

    def run(self, images_B3HW: Input, embeddings_KD: NDArray[np.float32] | None) -> Raw:
        """Run the network; see `Backend`. On a GPU, mask logits stay there."""
        with self._ready():
            class_logits, mask_logits, *features = self._network(*self._moved(images_B3HW, embeddings_KD))
            masks = DeviceLogits(mask_logits) if mask_logits.is_cuda else mask_logits.numpy()
            return Raw.of(class_logits.cpu().numpy(), masks, *(part.cpu().numpy() for part in features))

    def resident(self, images_B3HW: Input, embeddings_KD: NDArray[np.float32] | None) -> Callable[[], None]:
        """See `Backend`."""
        with self._ready():
            arguments = self._moved(images_B3HW, embeddings_KD)

        def run_once() -> None:
            with self._ready():
                self._network(*arguments)
                if self.accepts_uint8:
                    self._torch.cuda.synchronize(self._device)

        return run_once

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """One thread at a time, on the right device, with the float32 math that the contract says."""
        on_device = self._torch.cuda.device(self._device) if self.accepts_uint8 else nullcontext()
        with self._lock, self._torch.inference_mode(), on_device, float32_math(self._torch, self._contract.tf32):
            yield

    def _moved(self, images_B3HW: Input, embeddings_KD: NDArray[np.float32] | None) -> tuple[Any, ...]:
        """The network's arguments, on its device."""
        torch = self._torch
        if isinstance(images_B3HW, PixelBatch):
            images = images_B3HW.normalised_on(self._device, torch, self._channels_last)
        else:
            images = torch.from_numpy(np.ascontiguousarray(images_B3HW)).to(self._device)
            if self._channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
        if embeddings_KD is None or self._contract.baked:
            return (images,)
        return images, self._uploaded(embeddings_KD)


class GraphedNetwork:
    """A network whose shapes are captured as CUDA graphs when they come a second time.

    Padding to a few common shapes is no way to have fewer graphs: position embeddings and attention see the padding.

    Args:
        network: Takes and returns tensors on the GPU; launches the same work whenever shapes are the same.
        torch: The module.
        search: Let cuDNN time its convolution kernels before a capture: about a second per shape, so for static shapes.
    """

    def __init__(self, network: Network, torch: Any, search: bool = False) -> None:
        self._network, self._torch, self._search = network, torch, search
        self._seen: OrderedDict[tuple[Any, ...], _Graph | None] = OrderedDict()  # None: run once
        # One memory for all graphs: they replay one after the other, and results are copied out.
        self._pool_and_stream: tuple[Any, Any] | None = None
        self._capturing = True

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run the network on inputs of any shape; results are the caller's to keep."""
        shape = tuple(tuple(entry.shape) for entry in inputs)
        first = shape not in self._seen  # the warm-up that capturing needs
        self._seen.setdefault(shape, None)
        self._seen.move_to_end(shape)
        self._forget()
        if self._seen[shape] is None and self._capturing and not first:
            self._seen[shape] = self._captured(inputs)
        graph = self._seen[shape]
        return tuple(self._network(*inputs)) if graph is None else graph(*inputs)

    def _captured(self, inputs: tuple[Any, ...]) -> "_Graph | None":
        """A graph; or None with a warning, and none is captured from there on."""
        cuda = self._torch.cuda
        before = cuda.current_stream()
        try:
            with self._chosen_convolutions(inputs):
                self._pool_and_stream = self._pool_and_stream or (cuda.graph_pool_handle(), cuda.Stream())
                return _Graph(self._network, inputs, self._torch, *self._pool_and_stream)
        except RuntimeError as error:
            cuda.set_stream(before)  # torch leaves the capture's own stream in place when ending it fails
            self._capturing = False
            warnings.warn(f"no CUDA graph could be captured, running without: {error}", stacklevel=3)
            return None

    @contextmanager
    def _chosen_convolutions(self, inputs: tuple[Any, ...]) -> Iterator[None]:
        """A search by cuDNN in a run before the capture; the capture then finds what it chose."""
        if not self._search:
            yield
            return
        cudnn = self._torch.backends.cudnn
        before, cudnn.benchmark = cudnn.benchmark, True
        try:
            self._network(*inputs)
            yield
        finally:
            cudnn.benchmark = before

    def _forget(self) -> None:
        while len(self._seen) > MAX_SHAPES:
            self._seen.popitem(last=False)


class _Graph:
    """One shape's captured work, with memory of its own for inputs; what is computed is in the pool."""

    def __init__(self, network: Network, inputs: tuple[Any, ...], torch: Any, pool: Any, stream: Any) -> None:
        self._inputs = [entry.clone() for entry in inputs]
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):  # other threads go on
            self._outputs = tuple(network(*self._inputs))

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)  # the next replay overwrites them


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise D2ZeroError("a .pt2 is run by torch, which is not installed: pip install torch") from error
    return torch


def _check_compatible(path: Path, description: Pt2Metadata, torch: Any) -> None:
    made, here = (version.split("+")[0].rsplit(".", 1)[0] for version in (description.torch, torch.__version__))
    if made != here:
        raise D2ZeroError(
            f"{path} was compiled by torch {description.torch} and runs only with {made}.*, this is"
            f" {torch.__version__}; export it again here"
        )
    if description.device == "cuda":
        if not torch.cuda.is_available():
            raise D2ZeroError(f"{path} was compiled for a GPU ({description.hardware}), and torch sees none here")
        found = torch.cuda.get_device_name()
        if found != description.hardware:
            raise D2ZeroError(f"{path} was compiled for {description.hardware}, this is {found}; export it again here")


def _load_operators(names: tuple[str, ...], torch: Any) -> None:
    """Import the modules that register operators; d2zero itself is no dependency of the runtime."""
    known = {entry.name: entry for entry in entry_points(group=OPERATORS)}
    for name in names:
        space, _, operator = name.partition("::")
        if hasattr(getattr(torch.ops, space), operator):
            continue
        if name not in known:
            raise D2ZeroError(
                f"the model calls the operator {name}, which nothing here brings: pip install 'd2zero[train]'"
            )
        known[name].load()


def _loaded(path: Path, torch: Any, device: int) -> Network:
    from torch._inductor import aoti_load_package  # where torch's documentation has it

    try:
        # Its guards for several threads wait for events, which a CUDA graph cannot hold; the backend has a lock.
        network: Network = aoti_load_package(str(path), run_single_threaded=True, device_index=device)
    except Exception as error:  # torch raises RuntimeError and many others
        raise D2ZeroError(f"torch cannot load {path}: {str(error).splitlines()[0]}; export it again here") from error
    return network
