"""A CUDA runtime of ordinary memory, with the names and arguments of the real one.

Every function that is called must be in `cuda.bindings.runtime` and take that many arguments. Device memory and
pinned memory are host memory here, kept apart: a copy must stay inside an allocation of the right side, and
memory that was given back is gone. Streams run at once; a captured graph is the list of what was enqueued.
"""

import ctypes
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cuda.bindings.runtime as real


class FakeCuda:
    def __init__(self, name: str = "NVIDIA H200", capability: tuple[int, int] = (9, 0), devices: int = 1) -> None:
        self.properties = SimpleNamespace(name=name.encode(), major=capability[0], minor=capability[1])
        self.devices = devices
        self.calls: list[str] = []
        self.memory: dict[str, dict[int, Any]] = {"device": {}, "host": {}}
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.failing: dict[Any, Any] = {}  # function, or function and arguments -> the error that it returns

    def __getattr__(self, name: str) -> Any:
        member = getattr(real, name)
        if not name.startswith("cuda") or inspect.isclass(member) or not callable(member):
            return member
        if name.startswith("cudaGetError"):
            return member

        def call(*arguments: Any) -> tuple[Any, ...]:
            inspect.signature(member).bind(*arguments)
            self.calls.append(name)
            error = self.failing.get(name, self.failing.get((name, *arguments)))
            if error is not None:
                self.capturing = None  # what fails meanwhile ends the capture
                return (error, None)
            values = getattr(self, f"_{name}")(*arguments)
            return (real.cudaError_t.cudaSuccess, *(values if isinstance(values, tuple) else (values,)))

        call.__name__ = name
        return call

    def count(self, name: str) -> int:
        return self.calls.count(name)

    def enqueue(self, work: Callable[[], None]) -> None:
        """What a kernel launch does: run, or be recorded."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def inside(self, side: str, address: int, size: int) -> None:
        """Refuse memory that is not there."""
        assert any(
            start <= address and address + size <= start + len(block) for start, block in self.memory[side].items()
        )

    def _allocate(self, side: str, size: int) -> int:
        block = (ctypes.c_char * size).from_buffer(bytearray(b"\xff" * size))  # float32: NaN, seen if read unwritten
        self.memory[side][ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _cudaGetDeviceCount(self) -> int:
        return self.devices

    def _cudaGetDeviceProperties(self, device: int) -> Any:
        return self.properties

    def _cudaGetLastError(self) -> tuple[()]:
        return ()

    def _cudaSetDevice(self, device: int) -> tuple[()]:
        return ()

    def _cudaStreamCreateWithFlags(self, flags: int) -> int:
        assert flags == real.cudaStreamNonBlocking
        return 77

    def _cudaStreamDestroy(self, stream: int) -> tuple[()]:
        return ()

    def _cudaStreamSynchronize(self, stream: int) -> tuple[()]:
        assert self.capturing is None, "synchronised while capturing"
        return ()

    def _cudaMalloc(self, size: int) -> int:
        assert self.capturing is None, "allocated while capturing"
        return self._allocate("device", size)

    def _cudaMallocHost(self, size: int) -> int:
        return self._allocate("host", size)

    def _cudaFree(self, address: int) -> tuple[()]:
        del self.memory["device"][address]
        return ()

    def _cudaFreeHost(self, address: int) -> tuple[()]:
        del self.memory["host"][address]
        return ()

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: int) -> tuple[()]:
        up = kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert up or kind == real.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.inside("device" if up else "host", target, size)
        self.inside("host" if up else "device", source, size)
        ctypes.memmove(target, source, size)
        return ()

    def _cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[()]:
        assert mode == real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.capturing = []
        return ()

    def _cudaStreamEndCapture(self, stream: int) -> int:
        assert self.capturing is not None
        number = len(self.graphs) + 1
        self.graphs[number], self.capturing = self.capturing, None
        return number

    def _cudaGraphGetNodes(self, graph: int, count: int) -> tuple[list[Any], int]:
        return [], len(self.graphs[graph])

    def _cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        self.graphs[graph + 1000] = self.graphs[graph]
        return graph + 1000

    def _cudaGraphDestroy(self, graph: int) -> tuple[()]:
        self.graphs[graph] = []
        return ()

    def _cudaGraphLaunch(self, graph: int, stream: int) -> tuple[()]:
        for work in self.graphs[graph]:
            work()
        return ()

    def _cudaGraphExecDestroy(self, graph: int) -> tuple[()]:
        del self.graphs[graph]
        return ()
