"""Opening what a command was given as its model: a checkpoint or an exported model."""

from collections.abc import Sequence
from pathlib import Path

from d2zero.checkpoints.runs import checkpoint_file
from d2zero_runtime import D2ZeroError, Segmenter, Vocabulary, load
from d2zero_runtime.backends.onnxruntime import Provider
from d2zero_runtime.formats import EXPORTED_SUFFIXES, format_of, is_exported


def _gpu(device: str, local_rank: int) -> int:
    """CUDA's number in `cuda:N`; the process's own for `auto` and `cuda`.

    Raises:
        D2ZeroError: It names no GPU.
    """
    name, _, number = device.partition(":")
    if name not in ("auto", "cuda") or not (number or "0").isdecimal():
        raise D2ZeroError(f"--device for an engine or a .pt2 is cuda:N, got {device!r}")
    return int(number or local_rank)


def _placed(providers: Sequence[str] | None, local_rank: int) -> list[Provider] | None:
    """Providers, those for GPUs with the one that a process of `torchrun` takes."""
    if not providers:
        return None
    own_gpu = ("cuda", "tensorrt") if local_rank else ()
    return [(name, {"device_id": local_rank}) if name.lower() in own_gpu else name for name in providers]


def open_segmenter(
    path: Path,
    providers: Sequence[str] | None = None,
    device: str = "auto",
    vocabulary: Path | None = None,
    threads: int | None = None,
    local_rank: int = 0,
) -> Segmenter:
    """Open a checkpoint or an exported model; torch is imported for a checkpoint only.

    Args:
        path: `.safetensors`, a run's folder or `last.pt`, or what `d2zero export` writes.
        providers: An exported model's, as `d2zero_runtime.load` takes them.
        device: Where a checkpoint runs (auto, cpu or cuda:N), or the GPU of an engine or a `.pt2` (cuda:N).
        vocabulary: Other classes to use.
        threads: CPU threads of the network; the library's choice if left out.
        local_rank: The number of this process among those of `torchrun` on this machine: the GPU that it takes, where
            `device` or `providers` name none.

    Raises:
        D2ZeroError: A file cannot be used, or an option is for the other kind of model.
    """
    path = checkpoint_file(path)
    if is_exported(path):
        if format_of(path).takes_device:
            segmenter = load(path, providers, threads, _gpu(device, local_rank))
        elif device == "auto":
            segmenter = load(path, _placed(providers, local_rank), threads)
        else:
            raise D2ZeroError("--device is not for .onnx files, which run where --provider says")
    elif path.suffix not in (".safetensors", ".pth", ".pt", ".pkl"):
        kinds = ", ".join(EXPORTED_SUFFIXES)
        raise D2ZeroError(f"expected a checkpoint (.safetensors) or an exported model ({kinds}), got {path.name!r}")
    elif providers:
        raise D2ZeroError(f"--provider is for exported models ({', '.join(EXPORTED_SUFFIXES)})")
    else:
        import torch

        from d2zero.checkpoints.files import load_model
        from d2zero.devices import pick_device

        if threads:
            torch.set_num_threads(threads)
        segmenter = load_model(path, pick_device(device, local_rank)).segmenter()
    if vocabulary:
        segmenter.set_vocabulary(Vocabulary.load(vocabulary))
    return segmenter
