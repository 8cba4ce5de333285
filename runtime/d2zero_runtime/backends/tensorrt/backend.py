"""Running an engine of TensorRT or TensorRT-RTX without torch: NumPy in, NumPy out.

Memory grows to the largest shape seen and is used again. Every shape has an execution context of its own and,
from its second run on, a CUDA graph: NVIDIA's advice is one context per captured graph, all sharing the memory
for activations. The first run at a shape is the warm-up that capturing needs. TensorRT-RTX captures by itself.

Letters: B batch, Q queries, K classes, D text width, H and W the padded input's sides.
"""

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.contract import EMBEDDINGS_INPUT, IMAGES_INPUT
from d2zero_runtime.artifacts.engine import EngineMetadata
from d2zero_runtime.artifacts.profile import Shape
from d2zero_runtime.backends.base import Backend, Images, Raw
from d2zero_runtime.backends.tensorrt.environment import SDKS, Environment, collector, numbers, require_tensorrt
from d2zero_runtime.backends.tensorrt.issues import known_issues
from d2zero_runtime.backends.tensorrt.memory import Memory, Tensor
from d2zero_runtime.backends.tensorrt.rtx import KernelCache, runtime_config, why_invalid
from d2zero_runtime.errors import D2ZeroError

MAX_SHAPES = 8  # contexts and graphs kept, of the shapes used last
_VERSION_NUMBERS = 4  # of TensorRT's version; plans are read by exactly the version that wrote them


class TensorrtBackend(Backend[Images]):
    """An engine on one GPU. Calls from several threads take turns.

    Args:
        path: The plan.
        metadata: The plan's description.
        device: CUDA's number of the GPU.
        cuda_graphs: Replay a captured graph from a shape's second run on.

    Raises:
        D2ZeroError: TensorRT or the GPU is absent, or the plan is not for them, damaged, or not the metadata's.
    """

    on_gpu = True

    def __init__(self, path: Path, metadata: EngineMetadata, device: int = 0, cuda_graphs: bool = True) -> None:
        self._environment = require_tensorrt(device, SDKS[metadata.sdk])
        library = self._environment.library
        self._metadata, self._capture = metadata, cuda_graphs and not library.sdk.portable
        self.profile = metadata.profile
        self.known_issues = known_issues(metadata.contract, library.sdk, metadata.tensorrt)
        _check_compatible(path, metadata, self._environment)
        self._messages = collector(library.tensorrt)
        self._runtime, self._engine = _deserialized(path, metadata, self._environment, self._messages)
        self._inputs = (IMAGES_INPUT,) if metadata.contract.baked else (IMAGES_INPUT, EMBEDDINGS_INPUT)
        self._outputs = metadata.contract.outputs
        _check_tensors(path, self._engine, library.tensorrt, self._inputs, self._outputs)
        self._config = self._kernels = None  # TensorRT-RTX's
        if library.sdk.portable:
            self._config = runtime_config(library.tensorrt, self._engine, cuda_graphs)
            self._kernels = KernelCache(self._config, path.with_name(f"{path.name}.kernels"))
        self._cuda = self._environment.cuda
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.runtime.cudaStreamNonBlocking)
        self._tensors = {name: Tensor(self._cuda) for name in (*self._inputs, *self._outputs)}
        self._activations = Memory(self._cuda, "cudaMalloc", "cudaFree")
        self._prepared: OrderedDict[Shape, _Prepared] = OrderedDict()
        self._uploaded: NDArray[np.float32] | None = None  # the embeddings that the GPU holds
        self._lock = threading.Lock()
        version = ".".join(str(number) for number in numbers(library.version)[:2])
        self.precision = replace(metadata.contract, tf32=metadata.tf32).precision_on_gpu
        self.name = f"{library.sdk.name} {version} on {self._environment.gpu.name}"

    def run(self, images_B3HW: NDArray[np.float32], embeddings_KD: NDArray[np.float32] | None) -> Raw:
        """Run the network once.

        Args:
            images_B3HW: Normalised and padded.
            embeddings_KD: Class embeddings; None where they are constants of the plan.

        Raises:
            D2ZeroError: The engine was not built for such a shape, or CUDA or TensorRT failed.
        """
        shape = self._shape(images_B3HW, embeddings_KD)
        with self._lock:
            if self._engine is None:
                raise D2ZeroError("this engine was closed; load it again")
            self._environment.select()
            prepared = self._prepare(shape)
            self._upload(IMAGES_INPUT, images_B3HW)
            if embeddings_KD is not None and EMBEDDINGS_INPUT in self._inputs:
                self._upload_embeddings(embeddings_KD)
            self._launch(prepared)
            outputs = [self._download(name, prepared.shapes[name]) for name in self._outputs]
            self._call("cudaStreamSynchronize", self._stream)
            return Raw.of(*(output.copy() for output in outputs))  # the pinned memory is used again

    def resident(
        self, images_B3HW: NDArray[np.float32], embeddings_KD: NDArray[np.float32] | None
    ) -> Callable[[], None]:
        """See `Backend`; until the next `run`, which has the same memory for its inputs."""
        self.run(images_B3HW, embeddings_KD)
        shape = self._shape(images_B3HW, embeddings_KD)

        def run_once() -> None:
            with self._lock:
                self._environment.select()
                self._launch(self._prepare(shape))
                self._call("cudaStreamSynchronize", self._stream)

        return run_once

    def close(self) -> None:
        """Give all memory back. Closing twice does nothing."""
        with self._lock:
            if self._engine is None:
                return
            self._environment.select()
            if self._kernels:
                self._kernels.save()
            self._forget()
            for memory in (self._activations, *(part for t in self._tensors.values() for part in (t.host, t.device))):
                memory.free()
            self._engine = self._runtime = self._config = self._kernels = None
            self._call("cudaStreamDestroy", self._stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        return self._cuda(getattr(self._cuda.runtime, function), *arguments)

    def _shape(self, images: NDArray[np.float32], embeddings: NDArray[np.float32] | None) -> Shape:
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.float32:
            raise D2ZeroError(f"images must be (B, 3, H, W) float32, got {images.shape} {images.dtype}")
        profile, width = self._metadata.profile, self._metadata.contract.text_dim
        classes = profile.opt.classes
        if not self._metadata.contract.baked:
            if embeddings is None:
                raise D2ZeroError(f"this engine takes class embeddings (K, {width}) float32, got none")
            if embeddings.ndim != 2 or embeddings.shape[1] != width or embeddings.dtype != np.float32:
                raise D2ZeroError(
                    f"class embeddings must be (K, {width}) float32, got {embeddings.shape} {embeddings.dtype}"
                )
            classes = len(embeddings)
        shape = Shape(len(images), images.shape[2], images.shape[3], classes)
        profile.require(shape)
        return shape

    def _prepare(self, shape: Shape) -> "_Prepared":
        """The shape's context, with memory of sufficient size."""
        if shape in self._prepared:
            self._prepared.move_to_end(shape)
            return self._prepared[shape]
        context, shapes = self._context(shape)
        activations = int(context.update_device_memory_size_for_shapes())
        sizes = {name: 4 * math.prod(dims) for name, dims in shapes.items()}
        tensors = [(self._tensors[name], size) for name, size in sizes.items()]
        if activations > self._activations.size or any(size > tensor.device.size for tensor, size in tensors):
            self._forget()  # contexts and graphs know the addresses that now change
        self._activations.reserve(activations)
        for tensor, size in tensors:
            tensor.reserve(size)
        context.set_device_memory(self._activations.address, self._activations.size)
        for name in shapes:
            self._require(context.set_tensor_address(name, self._tensors[name].device.address), f"place {name}")
        self._prepared[shape] = _Prepared(context, shapes)
        if len(self._prepared) > MAX_SHAPES:
            self._drop(self._prepared.popitem(last=False)[1])
        return self._prepared[shape]

    def _context(self, shape: Shape) -> tuple[Any, dict[str, tuple[int, ...]]]:
        strategy = self._environment.library.tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(self._config or strategy)
        self._require(context is not None, "make an execution context")
        shapes: dict[str, tuple[int, ...]] = {IMAGES_INPUT: (shape.batch, 3, shape.height, shape.width)}
        if not self._metadata.contract.baked:
            shapes[EMBEDDINGS_INPUT] = (shape.classes, self._metadata.contract.text_dim)
        for name, dims in shapes.items():
            self._require(context.set_input_shape(name, dims), f"take {name} of shape {dims}")
        unknown = context.infer_shapes()
        self._require(not unknown, f"infer shapes from {', '.join(unknown)}")
        for name in self._outputs:
            shapes[name] = tuple(context.get_tensor_shape(name))
        return context, shapes

    def _upload(self, name: str, array: NDArray[np.float32]) -> None:
        tensor = self._tensors[name]
        np.copyto(tensor.view(array.shape), array)
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", tensor.device.address, tensor.host.address, array.nbytes, kind, self._stream)

    def _upload_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        if self._uploaded is None or not np.array_equal(self._uploaded, embeddings):
            self._uploaded = None  # should the copy fail, nothing is known of what the GPU holds
            self._upload(EMBEDDINGS_INPUT, embeddings)
            self._uploaded = embeddings.copy()

    def _download(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        tensor = self._tensors[name]
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        size = 4 * math.prod(shape)
        self._call("cudaMemcpyAsync", tensor.host.address, tensor.device.address, size, kind, self._stream)
        return tensor.view(shape)

    def _launch(self, prepared: "_Prepared") -> None:
        if prepared.warm and prepared.graph is None and self._capture:
            prepared.graph = self._captured(prepared)
        if prepared.graph is not None:
            self._call("cudaGraphLaunch", prepared.graph, self._stream)
        else:
            self._require(prepared.context.execute_async_v3(int(self._stream)), "run")
        if self._kernels and not prepared.warm:
            self._kernels.save()  # should the process never close this
        prepared.warm = True

    def _captured(self, prepared: "_Prepared") -> Any:
        """The shape's graph, or None with a warning: the engine then runs without graphs, slower."""
        try:
            return self._graph(prepared)
        except D2ZeroError as error:
            self._cuda.runtime.cudaGetLastError()  # what failed must not be reported by the next call
            self._capture = False
            warnings.warn(f"no CUDA graph could be captured, running without: {error}", RuntimeWarning, stacklevel=5)
            return None

    def _graph(self, prepared: "_Prepared") -> Any:
        # Thread-local: in the global mode a capture breaks other threads that use CUDA meanwhile.
        mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        enqueued = prepared.context.execute_async_v3(int(self._stream))
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            self._require(enqueued, "be captured in a graph")
            # On a wrong device or stream nothing is captured and nothing complains.
            self._require(
                self._call("cudaGraphGetNodes", graph, 0)[-1] > 0, "be captured in a graph, which stayed empty"
            )
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def _forget(self) -> None:
        while self._prepared:
            self._drop(self._prepared.popitem()[1])
        self._uploaded = None

    def _drop(self, prepared: "_Prepared") -> None:
        if prepared.graph is not None:
            self._call("cudaGraphExecDestroy", prepared.graph)

    def _require(self, fine: bool, what: str) -> None:
        if not fine:
            label = self._environment.sdk.label
            reasons = "; ".join(self._messages.errors[-3:]) or f"{label} gave no reason"
            raise D2ZeroError(f"the engine cannot {what}: {reasons}")


@dataclass(eq=False)
class _Prepared:
    """A shape's context, the tensors' shapes, and the graph once it is captured."""

    context: Any
    shapes: dict[str, tuple[int, ...]]
    graph: Any = None
    warm: bool = False


def _check_compatible(path: Path, metadata: EngineMetadata, environment: Environment) -> None:
    library = environment.library
    built, here = (numbers(version)[:_VERSION_NUMBERS] for version in (metadata.tensorrt, library.version))
    again = f"`d2zero export model.onnx --format {library.sdk.name} -o {path.name}`"
    if built != here:
        raise D2ZeroError(
            f"{path} was built by {library.sdk.label} {_dotted(built)}, here is {_dotted(here)};"
            f" build it again: {again}"
        )
    # For which GPUs an engine of TensorRT-RTX is good, the library says by itself (`why_invalid`).
    if not library.sdk.portable and metadata.compute_capability != environment.gpu.compute_capability:
        raise D2ZeroError(
            f"{path} was built for compute capability {metadata.compute_capability} ({metadata.gpu}), here is"
            f" {environment.gpu.compute_capability} ({environment.gpu.name}); build it here: {again}"
        )


def _deserialized(path: Path, metadata: EngineMetadata, environment: Environment, messages: Any) -> tuple[Any, Any]:
    """The runtime, which must outlive the engine, and the engine."""
    plan, library = metadata.require_plan(path), environment.library
    runtime = engine = None
    try:
        runtime = library.tensorrt.Runtime(messages)
        if library.sdk.portable and (reason := why_invalid(library.tensorrt, runtime, plan)):
            raise D2ZeroError(
                f"{library} cannot run {path} on {environment.gpu.name}: {reason}; build the engine again"
            )
        engine = runtime.deserialize_cuda_engine(plan)
    except TypeError as error:  # what the bindings raise where the library gives them no runtime
        messages.errors.append(str(error))
    if engine is None:
        reasons = "; ".join(messages.errors[:3]) or f"{library.sdk.label} gave no reason"
        raise D2ZeroError(f"{library} cannot load {path}: {reasons}; build the engine again")
    return runtime, engine


def _check_tensors(path: Path, engine: Any, tensorrt: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    modes = {name: engine.get_tensor_mode(name) for name in names}
    expected = {
        **dict.fromkeys(inputs, tensorrt.TensorIOMode.INPUT),
        **dict.fromkeys(outputs, tensorrt.TensorIOMode.OUTPUT),
    }
    if modes != expected:
        raise D2ZeroError(f"{path}: expected the tensors {', '.join(expected)}, got {', '.join(names)}; build it again")
    for name in names:
        kind = engine.get_tensor_dtype(name)
        if kind != tensorrt.DataType.FLOAT:
            raise D2ZeroError(
                f"{path}: {name} must be float32, it is {kind}; keep inputs and outputs float32 in the ONNX file"
            )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)
