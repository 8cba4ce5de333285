"""What only TensorRT-RTX has: whether an engine is valid here, and how kernels are compiled and kept.

An engine of TensorRT-RTX is portable: its kernels are compiled for the GPU at hand on first use (seconds), and then
kept in a cache on disk, so that the next process starts at full speed. Nothing here has run on a GPU yet.
"""

import logging
from pathlib import Path
from typing import Any

from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.files import atomic_write

_INVALID = {  # by the names of EngineInvalidityDiagnostics
    "VERSION_MISMATCH": "another version of TensorRT-RTX built it",
    "UNSUPPORTED_CC": "it was not built for this GPU's compute capability",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "this GPU has too little memory for it",
    "MALFORMED_ENGINE": "it is damaged, or no engine of TensorRT-RTX",
    "CUDA_ERROR": "CUDA failed",
}
logger = logging.getLogger("d2zero")


def why_invalid(tensorrt: Any, runtime: Any, plan: bytes) -> str:
    """Why the library would not run a plan on this machine, in words; empty if it would.

    Args:
        tensorrt: TensorRT-RTX's module.
        runtime: Its `Runtime`.
        plan: The plan; the library looks at its header only.
    """
    validity, flags = runtime.get_engine_validity(plan)
    if validity == tensorrt.EngineValidity.SUBOPTIMAL:
        logger.warning("this engine was built for other GPUs and is slower here than one built for this GPU")
    if validity != tensorrt.EngineValidity.INVALID:
        return ""
    found = [
        text for name, text in _INVALID.items() if flags & int(getattr(tensorrt.EngineInvalidityDiagnostics, name))
    ]
    return "; ".join(found) or "TensorRT-RTX gave no reason"


class KernelCache:
    """Compiled kernels on disk; one for another GPU, driver or version is replaced.

    Args:
        config: The runtime configuration that shall use it.
        path: The file, written whole or not at all. That it cannot be written costs only time.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._path, self._cache = path, config.create_runtime_cache()
        content = path.read_bytes() if path.is_file() else b""
        if content and not self._cache.deserialize(content):
            logger.info("%s is for another GPU, driver or version of TensorRT-RTX; kernels are compiled again", path)
        config.set_runtime_cache(self._cache)
        self._bytes = len(content)

    def save(self) -> None:
        """Write what was compiled since."""
        content = memoryview(self._cache.serialize())
        if content.nbytes == self._bytes:
            return
        try:
            with atomic_write(self._path) as partial:
                partial.write_bytes(content)
            self._bytes = content.nbytes
        except (OSError, D2ZeroError) as error:
            logger.warning(
                "compiled kernels cannot be kept in %s (%s); every start compiles them again", self._path, error
            )


def runtime_config(tensorrt: Any, engine: Any, cuda_graphs: bool) -> Any:
    """How an engine runs: memory that the caller gives, kernels by shape, CUDA graphs of the library's own.

    Args:
        tensorrt: TensorRT-RTX's module.
        engine: The engine.
        cuda_graphs: Whether the library captures each shape in a graph.
    """
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED)
    strategies = tensorrt.CudaGraphStrategy
    config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if cuda_graphs else strategies.DISABLED
    # A shape's first runs use general kernels; those for it are compiled meanwhile.
    config.dynamic_shapes_kernel_specialization_strategy = tensorrt.DynamicShapesKernelSpecializationStrategy.LAZY
    return config
