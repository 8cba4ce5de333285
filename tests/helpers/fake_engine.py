"""A TensorRT runtime with one engine: real classes' names, and a function of NumPy arrays for a kernel.

The kernel reads and writes the fake GPU's memory at the addresses that it was given, so that a byte in the wrong
place shows.
"""

import ctypes
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from tensorrt_surface import Recorder, as_tensorrt, as_tensorrt_rtx, constructor
from tiny_engine import expected, write_engine
from tiny_model import CLASSES, QUERIES

from d2zero_runtime.artifacts.engine import EngineMetadata
from d2zero_runtime.backends.tensorrt.backend import TensorrtBackend

INPUTS = ("images", "class_embeddings")


class Setting:
    """A GPU, a TensorRT with one engine, and the files of it."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        baked: bool = False,
        sdk: str = "tensorrt",
        query_dim: int = 0,
    ) -> None:
        self.tensorrt = as_tensorrt(monkeypatch) if sdk == "tensorrt" else as_tensorrt_rtx(monkeypatch)
        self.cuda = FakeCuda()
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)
        self.calls: list[tuple[Any, ...]] = []
        self.inputs = INPUTS[:1] if baked else INPUTS
        self.path = write_engine(folder / "m.engine", self.tensorrt.__version__, baked, sdk, query_dim)
        self.baked, self.query_dim = baked, query_dim
        self.outputs = EngineMetadata.read(self.path).contract.outputs
        names = (*self.inputs, *self.outputs)
        modes = self.tensorrt.TensorIOMode
        self.answers: dict[str, Any] = {
            "ICudaEngine.num_io_tensors": len(names),
            "ICudaEngine.get_tensor_name": lambda engine, index: names[index],
            "ICudaEngine.get_tensor_mode": lambda engine, name: modes.INPUT if name in INPUTS else modes.OUTPUT,
            "ICudaEngine.get_tensor_dtype": self.tensorrt.DataType.FLOAT,
            "IExecutionContext.set_input_shape": self._set("shape"),
            "IExecutionContext.set_tensor_address": self._set("address"),
            "IExecutionContext.set_device_memory": lambda context, *memory: context.state.update(activations=memory),
            "IExecutionContext.infer_shapes": [],
            "IExecutionContext.get_tensor_shape": lambda context, name: self.tensorrt.Dims(self._shapes(context)[name]),
            "IExecutionContext.update_device_memory_size_for_shapes": lambda context: self._activations(context),
            "IExecutionContext.execute_async_v3": self._execute,
        }
        make = constructor(self.tensorrt.Runtime, self.answers, self.calls)
        monkeypatch.setattr(self.tensorrt, "Runtime", make)

    def load(self, **options: Any) -> TensorrtBackend:
        return TensorrtBackend(self.path, EngineMetadata.read(self.path), **options)

    def count(self, name: str) -> int:
        return sum(call[0] == f"IExecutionContext.{name}" for call in self.calls)

    def _set(self, what: str) -> Any:
        def store(context: Recorder, name: str, value: Any) -> bool:
            context.state[what, name] = value
            return True

        return store

    def _shapes(self, context: Recorder) -> dict[str, tuple[int, ...]]:
        given = {name: context.state["shape", name] for name in self.inputs}
        batch, _, height, width = given["images"]
        classes = CLASSES if self.baked else given["class_embeddings"][0]
        outputs = {
            "class_logits": (QUERIES, classes + 1),
            "mask_logits": (QUERIES, height // 4, width // 4),
            "queries": (QUERIES, self.query_dim),
            "background": (self.query_dim,),
        }
        return {**given, **{name: (batch, *outputs[name]) for name in self.outputs}}

    def _activations(self, context: Recorder) -> int:
        return math.prod(context.state["shape", "images"])

    def _execute(self, context: Recorder, stream: int) -> bool:
        shapes = self._shapes(context)
        places = {name: context.state["address", name] for name in shapes}
        address, size = context.state["activations"]

        def kernel() -> None:
            assert size >= self._activations(context)
            self.cuda.inside("device", address, size)
            arrays = {name: self._array(places[name], dims) for name, dims in shapes.items()}
            results = expected(arrays["images"], arrays.get("class_embeddings"), self.query_dim)
            for name in self.outputs:
                arrays[name][...] = getattr(results, name)

        assert stream == 77
        self.cuda.enqueue(kernel)
        return True

    def _array(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        self.cuda.inside("device", address, 4 * math.prod(shape))
        return np.ctypeslib.as_array((ctypes.c_float * math.prod(shape)).from_address(address)).reshape(shape)
