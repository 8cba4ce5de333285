"""Opening an exported model."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.formats import LoadOptions, Providers, format_of
from d2zero_runtime.segmenter import Segmenter

logger = logging.getLogger("d2zero")


def load(
    path: str | os.PathLike[str],
    providers: Providers | None = None,
    threads: int | None = None,
    device: int = 0,
    cuda_graphs: bool = True,
    session_options: Mapping[str, Any] | None = None,
) -> Segmenter:
    """Load an exported model.

    Args:
        path: An `.onnx` file, a TensorRT `.engine` or a `.pt2` for torch, made by `d2zero export`.
        providers: For an `.onnx`: `cpu` (the default; `openvino` where only that is installed), `cuda`, `tensorrt` or
            ONNX Runtime's own names, in order of preference, each by itself or with its options:
            `("cuda", {"device_id": 1})`; or only `openvino` or `openvino-bf16`. One that is not available is an error,
            never a silent fallback.
        threads: For an `.onnx` or a `.pt2`: threads inside an operator; the library's choice if left out.
        device: For an engine or a `.pt2` for GPUs: CUDA's number of the GPU.
        cuda_graphs: For the same: replay a captured graph from a shape's second run on.
        session_options: For an `.onnx`: further settings of the library that runs it, which override ours. Of ONNX
            Runtime, attributes of its `SessionOptions` and its configuration keys:
            `{"inter_op_num_threads": 1, "session.intra_op.allow_spinning": "0"}`; of OpenVINO, its properties:
            `{"NUM_STREAMS": 1}`.

    Raises:
        D2ZeroError: The file cannot be used, or a provider is not available.
    """
    path = Path(path)
    kind = format_of(path)
    if providers is not None and kind.no_providers:
        raise D2ZeroError(kind.no_providers)
    if threads and not kind.takes_threads:
        raise D2ZeroError(f"threads are not for {kind.suffix} files; leave them out")
    if device and not kind.takes_device:
        raise D2ZeroError(
            'device is for engines and .pt2 files; for an .onnx give providers=("cuda", {"device_id": N})'
        )
    if session_options and not kind.takes_session_options:
        raise D2ZeroError(f"session_options are for .onnx files, got {path.name!r}; leave them out")
    segmenter = kind.read(path).open(LoadOptions(providers, threads, device, cuda_graphs, session_options))
    logger.info("loaded %s: %s", path, segmenter)
    for issue in segmenter.backend.known_issues:
        logger.warning("%s", issue)
    return segmenter
