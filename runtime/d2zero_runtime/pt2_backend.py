"""Running a `.pt2`, a network compiled by AOTInductor, where torch is installed: on a CPU or a GPU.

On a GPU every shape has, from its second run on, a CUDA graph; shapes that were used last are kept. Mask logits stay on
the GPU, and masks are made there (`device_masks`). Calls from several threads take turns.

Letters: B batch, K classes, D text width, H and W the padded input's sides.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.device_images import PixelBatch
from d2zero_runtime.device_masks import DeviceLogits
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.pt2_file import Pt2Description

MAX_SHAPES = 8  # graphs kept
OPERATORS = "d2zero.operators"  # entry points: modules that bring operators outside torch

Network = Callable[..., Any]  # (images, embeddings) -> class logits, mask logits; all tensors


class Pt2Backend:
    """A compiled network on the device that it was compiled for.

    Args:
        path: the archive.
        description: of the archive.
        device: CUDA's number of the GPU, where it was compiled for one.
        cuda_graphs: replay a captured graph from a shape's second run on.
        threads: of a CPU; torch's choice if left out.

    Raises:
        D2ZeroError: torch or the GPU is absent, or the archive is not for them.
    """

    def __init__(
        self,
        path: Path,
        description: Pt2Description,
        device: int = 0,
        cuda_graphs: bool = True,
        threads: int | None = None,
    ) -> None:
        self._torch = torch = _torch()
        _require_fit(path, description, torch)
        on_gpu = self.takes_pixels = description.device == "cuda"
        self._device = torch.device("cuda", device) if on_gpu else torch.device("cpu")
        if threads:
            torch.set_num_threads(threads)
        _load_operators(description.operators, torch)
        network = _loaded(path, torch, device if on_gpu else -1)
        self._network = GraphedNetwork(network, torch) if on_gpu and cuda_graphs else network
        self._baked, self._default = description.contract.baked, description.embeddings
        self._embeddings: tuple[NDArray[np.float32], Any] | None = None  # as given, and on the device
        self._lock = threading.Lock()
        self._on_device = torch.cuda.device(self._device) if on_gpu else nullcontext()
        where = torch.cuda.get_device_name(self._device) if on_gpu else "CPU"
        self.name = (
            f"torch {torch.__version__}, AOTInductor ({where}{', CUDA graphs' if on_gpu and cuda_graphs else ''})"
        )

    def run(
        self, images_B3HW: NDArray[np.float32] | PixelBatch, embeddings_KD: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], Any]:
        """Run the network; see `d2zero_runtime.segmenter.Backend`. On a GPU, mask logits stay there."""
        torch = self._torch
        with self._lock, torch.inference_mode(), self._on_device:
            if isinstance(images_B3HW, PixelBatch):
                images = images_B3HW.normalised_on(self._device, torch)
            else:
                images = torch.from_numpy(np.ascontiguousarray(images_B3HW)).to(self._device)
            arguments = (images,) if self._baked else (images, self._uploaded(embeddings_KD))
            class_logits, mask_logits = self._network(*arguments)
            return class_logits.cpu().numpy(), DeviceLogits(mask_logits) if images.is_cuda else mask_logits.numpy()

    def _uploaded(self, embeddings_KD: NDArray[np.float32] | None) -> Any:
        wanted = self._default if embeddings_KD is None else embeddings_KD
        if self._embeddings is None or self._embeddings[0] is not wanted:
            self._embeddings = wanted, self._torch.tensor(wanted, device=self._device)
        return self._embeddings[1]


class GraphedNetwork:
    """A network whose shapes are captured as CUDA graphs when they come a second time.

    Padding to a few common shapes is no way to have fewer graphs: position embeddings and attention see the padding.

    Args:
        network: takes and returns tensors on the GPU; launches the same work whenever shapes are the same.
        torch: the module.
    """

    def __init__(self, network: Network, torch: Any) -> None:
        self._network, self._torch = network, torch
        self._seen: OrderedDict[tuple[Any, ...], _Graph | None] = OrderedDict()  # None: run once, or not capturable
        # One memory for all graphs: they replay one after the other, and results are copied out.
        self._pool_and_stream: tuple[Any, Any] | None = None
        self._failed: set[tuple[Any, ...]] = set()

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run the network on inputs of any shape; results are the caller's to keep."""
        shape = tuple(tuple(entry.shape) for entry in inputs)
        if shape not in self._seen or shape in self._failed:  # the first run is the warm-up that capturing needs
            self._seen[shape] = None
            self._forget()
            return tuple(self._network(*inputs))
        self._seen.move_to_end(shape)
        graph = self._seen[shape]
        if graph is None:
            graph = self._seen[shape] = self._captured(shape, inputs)
        return tuple(self._network(*inputs)) if graph is None else graph(*inputs)

    def _captured(self, shape: tuple[Any, ...], inputs: tuple[Any, ...]) -> "_Graph | None":
        try:
            cuda = self._torch.cuda
            self._pool_and_stream = self._pool_and_stream or (cuda.graph_pool_handle(), cuda.Stream())
            return _Graph(self._network, inputs, self._torch, *self._pool_and_stream)
        except RuntimeError as error:
            self._failed.add(shape)
            warnings.warn(f"no CUDA graph could be captured, running without: {error}", stacklevel=3)
            return None

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
        return tuple(output.clone() for output in self._outputs)  # the next replay writes them anew


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise D2ZeroError("a .pt2 is run by torch, which is not installed: pip install torch") from error
    return torch


def _require_fit(path: Path, description: Pt2Description, torch: Any) -> None:
    made, here = (version.split("+")[0].rsplit(".", 1)[0] for version in (description.torch, torch.__version__))
    if made != here:
        raise D2ZeroError(
            f"{path} was compiled by torch {description.torch} and runs with {made}.* alone, this is"
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
