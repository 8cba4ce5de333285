"""Memory of the GPU and of the host that the GPU can copy from, used again and again."""

import ctypes
import math

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.backends.tensorrt.environment import Cuda


class Memory:
    """Memory of the GPU, or pinned memory of the host. It grows and never shrinks."""

    def __init__(self, cuda: Cuda, allocate: str, release: str) -> None:
        self._cuda, self._allocate, self._release = cuda, allocate, release
        self.address = self.size = 0

    def reserve(self, size: int) -> None:
        """Have at least `size` bytes; what was inside is lost if it grows."""
        if size > self.size:
            self.free()
            self.address = int(self._cuda(getattr(self._cuda.runtime, self._allocate), size))
            self.size = size

    def free(self) -> None:
        """Give it back."""
        if self.size:
            address, self.address, self.size = self.address, 0, 0
            self._cuda(getattr(self._cuda.runtime, self._release), address)


class Tensor:
    """A tensor's memory on both sides."""

    def __init__(self, cuda: Cuda) -> None:
        self.host = Memory(cuda, "cudaMallocHost", "cudaFreeHost")
        self.device = Memory(cuda, "cudaMalloc", "cudaFree")

    def reserve(self, size: int) -> None:
        """Have at least `size` bytes on both sides."""
        self.host.reserve(size)
        self.device.reserve(size)

    def view(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The host's memory as an array; no copy."""
        memory = (ctypes.c_float * math.prod(shape)).from_address(self.host.address)
        return np.ctypeslib.as_array(memory).reshape(shape)
