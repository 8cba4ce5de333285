"""Defects of TensorRT that give wrong results without an error."""

from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.backends.tensorrt.environment import TENSORRT, Sdk


def known_issues(contract: ModelContract, sdk: Sdk, version: str) -> tuple[str, ...]:
    """Defects of a TensorRT version that concern this model; empty if none is known.

    Args:
        contract: The model's contract.
        sdk: TensorRT or TensorRT-RTX.
        version: Its version.
    """
    found = []
    if contract.deform_attn == "gridsample" and sdk == TENSORRT:
        found.append(
            f"TensorRT {version}: GridSample in deformable attention was seen to give wrong results without an error"
            " (NVIDIA/TensorRT#4813, 10.13 to 11.1); export with --deform-attn gather, and verify the engine"
        )
    if contract.opset >= 20:
        found.append(
            f"opset {contract.opset}: {sdk.label} reads GridSample as nearest from 20 on (NVIDIA/TensorRT#4646)"
        )
    return tuple(found)
