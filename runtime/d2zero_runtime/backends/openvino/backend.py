"""Running an exported `.onnx` with OpenVINO: CPUs, in float32 or bfloat16, and what is eight bits in the file as such.

A file of static shape, exported with `--deform-attn gather`, is the fastest (`rewrites`).

bfloat16 pays on processors that compute in it (AVX512-BF16, AMX); elsewhere OpenVINO would compute in float32
and say nothing, so it is refused there. Places to look at stay float32 (`precision`). What it does to a
model's accuracy is for `d2zero verify` to say.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.contract import EMBEDDINGS_INPUT, ModelContract
from d2zero_runtime.artifacts.onnx import without_default_embeddings
from d2zero_runtime.backends.base import Backend, Images, Raw
from d2zero_runtime.backends.openvino.precision import lower_to_bfloat16
from d2zero_runtime.backends.openvino.rewrites import convolve_linear_layers, join_row_sums
from d2zero_runtime.errors import D2ZeroError, optional

HINTS = {"float32": "f32", "bfloat16": "dynamic"}  # each said: without one, OpenVINO lowers where the processor can


def computes_in_bfloat16(core: Any) -> bool:
    """Whether the processor does, as OpenVINO's core sees it; elsewhere the backend refuses bfloat16."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoBackend(Backend[Images]):
    """A network compiled by OpenVINO for the CPU. Calls from several threads take turns.

    Args:
        path: The `.onnx` file.
        contract: The contract inside it.
        precision: `float32`, or `bfloat16` for most of a float32 graph.
        threads: OpenVINO's choice if left out.
        session_options: OpenVINO's properties, except the precision.

    Raises:
        D2ZeroError: Openvino is not installed, the processor has no bfloat16, the file is of lower precision
            already, or it cannot be run.
    """

    def __init__(
        self,
        path: Path,
        contract: ModelContract,
        precision: str = "float32",
        threads: int | None = None,
        session_options: Mapping[str, Any] | None = None,
    ) -> None:
        openvino = optional("openvino")
        if precision == "bfloat16" and contract.precision != "float32":
            raise D2ZeroError(
                f"bfloat16 is for float32 files, and {path} is {contract.precision}; use the provider openvino"
            )
        if "INFERENCE_PRECISION_HINT" in (session_options or {}):
            raise D2ZeroError("the precision is chosen by the provider: openvino (float32) or openvino-bf16")
        core = openvino.Core()
        if precision == "bfloat16" and not computes_in_bfloat16(core):
            raise D2ZeroError("this processor does not compute in bfloat16; use the provider openvino (float32)")
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        settings |= session_options or {}
        try:
            # OpenVINO would make a constant of an input with a default.
            model = core.read_model(without_default_embeddings(path))
            join_row_sums(model)
            convolve_linear_layers(model)
            if precision == "bfloat16":
                lower_to_bfloat16(model)
            compiled = core.compile_model(model, "CPU", settings)
            for name in contract.outputs:
                compiled.output(name)
        except D2ZeroError:
            raise
        except Exception as error:  # openvino's, of many kinds
            raise D2ZeroError(f"openvino cannot load {path}: {_reason(error)}") from error
        self._request, self._lock = compiled.create_infer_request(), threading.Lock()
        self._outputs = contract.outputs
        self.precision = precision if contract.precision == "float32" else contract.precision
        self.name = f"openvino {openvino.__version__.split('-')[0]} (CPU, {self.precision})"

    def run(self, images_B3HW: NDArray[np.float32], embeddings_KD: NDArray[np.float32] | None) -> Raw:
        """Run the network; see `d2zero_runtime.backends.base.Backend`."""
        feed = {"images": images_B3HW}
        if embeddings_KD is not None:
            feed[EMBEDDINGS_INPUT] = embeddings_KD
        with self._lock:  # until outputs are copied: the request's next run overwrites them (openvino#13519)
            try:
                found = self._request.infer(feed)
            except Exception as error:  # openvino's, of many kinds
                raise D2ZeroError(f"openvino cannot run the model: {_reason(error)}") from error
            return Raw.of(*(np.array(found[name], np.float32) for name in self._outputs))


def _reason(error: Exception) -> str:
    """Its last line: openvino begins with where in its own code it was."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
