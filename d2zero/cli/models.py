"""What commands that segment images share: their options, opening a checkpoint or an exported model, their images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from d2zero.checkpoints.runs import checkpoint_file
from d2zero.cli.terminal import tracked
from d2zero_runtime import D2ZeroError, Segmenter, TextEncoder, Vocabulary, load
from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.artifacts.text_encoder import TextContract
from d2zero_runtime.backends.onnxruntime import Provider
from d2zero_runtime.formats import EXPORTED_SUFFIXES, format_of, is_exported
from d2zero_runtime.sources import ImageLike, expand

ModelOption = Annotated[
    Path,
    typer.Option("--model", "-m", help="An exported model (.onnx, .engine, .pt2) or a checkpoint (.safetensors)."),
]
ProviderOption = Annotated[
    list[str] | None,
    typer.Option("--provider", help="The backend of an .onnx: cpu, cuda, tensorrt, openvino or openvino-bf16."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads of the network; the library chooses if left out."),
]
ClassifierThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; ONNX Runtime chooses if left out.")
]
TextEncoderOption = Annotated[
    Path | None,
    typer.Option("--text-encoder", help="For --names: a text encoder (.onnx), made by `d2zero export-text`."),
]
ModeOption = Annotated[str, typer.Option("--mode", help="gzsis, zsis or gzsis-copy-paste.")]
ScoreOption = Annotated[float, typer.Option("--score", min=0, max=1, help="Leave out instances with a lower score.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N: where a checkpoint runs.")]
BatchSizeOption = Annotated[
    int,
    typer.Option("--batch-size", min=1, help="Images per run, if neighbours have the same size; pays on a GPU."),
]


def image_files(source: str, leave_out: Path) -> list[Path]:
    """The files that a command was given as its source.

    Raises:
        D2ZeroError: There are none.
    """
    sources = [Path(str(item)) for item in expand(source, leave_out=leave_out)]
    if not any(path.exists() for path in sources):
        raise D2ZeroError(f"{source} does not exist; give an image, a folder or a pattern")
    return sources


def refuse_skipped(failed: Sequence[ImageLike], sources: Sequence[Path]) -> None:
    """End a command with an error if files were skipped.

    Raises:
        D2ZeroError: Says how many.
    """
    if failed:
        raise D2ZeroError(f"{len(failed)} of {len(sources)} files could not be read and were skipped (listed above)")


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
    return [
        (name, {"device_id": local_rank}) if name.lower().removesuffix("executionprovider") in own_gpu else name
        for name in providers
    ]


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


@dataclass(frozen=True)
class TypedNames:
    """Classes typed for one run.

    Args:
        names: As the text encoder takes them.
        file: The text encoder.
        contract: What it says about itself.
    """

    names: list[str]
    file: Path
    contract: TextContract

    @classmethod
    def of(cls, names: str | None, text_encoder: Path | None, vocabulary: Path | None) -> "TypedNames | None":
        """From the options of a command; None if no names were typed.

        Raises:
            D2ZeroError: The options do not go together, or a file cannot be read.
        """
        from d2zero.text.arrays import read_names

        if names is None and text_encoder is None:
            return None
        if names is None or text_encoder is None:
            raise D2ZeroError(
                "--names and --text-encoder go together: the names, and a text encoder made by `d2zero export-text`"
            )
        if vocabulary:
            raise D2ZeroError("--names and --vocabulary both give the classes; leave one out")
        return cls(read_names(names), text_encoder, TextContract.read(text_encoder))

    def encoded(self, contract: ModelContract, own: Vocabulary, threads: int | None = None) -> Vocabulary:
        """These classes as a vocabulary; those that are seen in the model's own are seen, all others unseen.

        Raises:
            D2ZeroError: The model was trained with another encoder, or the names cannot be encoded.
        """
        contract.check_encoder(self.contract.width, self.contract.encoder, own)
        seen = {name for name, flag in zip(own.names, own.seen, strict=True) if flag}
        encoder = TextEncoder.load(self.file, threads=threads)
        return encoder(self.names, seen=seen, progress=tracked)
