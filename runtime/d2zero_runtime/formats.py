"""The kinds of exported models: how each is read, opened, and given another default vocabulary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.artifacts.engine import EngineMetadata, replace_engine_vocabulary
from d2zero_runtime.artifacts.onnx import read_classifier, read_contract, replace_onnx_vocabulary
from d2zero_runtime.artifacts.pt2 import Pt2Metadata, replace_pt2_vocabulary
from d2zero_runtime.backends.base import Backend, Images
from d2zero_runtime.backends.onnxruntime import ONNXRUNTIME, EndToEndBackend, OnnxBackend, OnnxClassifier, Provider
from d2zero_runtime.backends.openvino.backend import OpenVinoBackend
from d2zero_runtime.backends.tensorrt.backend import TensorrtBackend
from d2zero_runtime.backends.torch_pt2 import Pt2Backend
from d2zero_runtime.end_to_end import EndToEndSegmenter
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.segmenter import Segmenter
from d2zero_runtime.vocabulary import Vocabulary

OPENVINO = {"openvino": "float32", "openvino-bf16": "bfloat16"}  # providers, and the precision that they compute in
PROVIDERS = (*ONNXRUNTIME, *OPENVINO)

Providers = Provider | Sequence[Provider]


@dataclass(frozen=True)
class LoadOptions:
    """How an exported model is run; see `d2zero_runtime.load`."""

    providers: Providers | None = None
    threads: int | None = None
    device: int = 0
    cuda_graphs: bool = True
    session_options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Exported:
    """What an exported model says about itself, read without loading its network.

    Args:
        contract: The model's contract.
        vocabulary: Its default vocabulary.
        open: Loads its network, and makes what segments with it.
    """

    contract: ModelContract
    vocabulary: Vocabulary
    open: Callable[[LoadOptions], Segmenter]


@dataclass(frozen=True)
class Format:
    """One kind of exported model.

    Args:
        suffix: The end of its files' names.
        read: Reads what a file says about itself.
        replace_vocabulary: Replaces the default vocabulary inside a file, atomically.
        no_providers: Why it takes no providers; empty if it does.
        takes_threads: Whether the number of threads can be chosen.
        takes_device: Whether the GPU is chosen by its number.
        takes_session_options: Whether the library that runs it takes settings of its own.
    """

    suffix: str
    read: Callable[[Path], Exported]
    replace_vocabulary: Callable[[Path, Vocabulary], None]
    no_providers: str = ""
    takes_threads: bool = True
    takes_device: bool = True
    takes_session_options: bool = False


def format_of(path: Path) -> Format:
    """The format of an exported model, by its suffix.

    Raises:
        D2ZeroError: It is none.
    """
    if path.suffix not in FORMATS:
        raise D2ZeroError(
            f"expected an exported model ({' or '.join(FORMATS)}), got {path.name!r}; make one with `d2zero export`"
        )
    return FORMATS[path.suffix]


def is_exported(path: Path) -> bool:
    """Whether a file is an exported model, by its suffix."""
    return path.suffix in FORMATS


def read_exported(path: Path) -> Exported:
    """The contract of an exported model and its default vocabulary, without loading its network.

    Raises:
        D2ZeroError: It cannot be read.
    """
    return format_of(path).read(path)


def open_onnx(path: Path, contract: ModelContract, options: LoadOptions) -> Backend[Images]:
    """The backend of an `.onnx` file that the providers ask for.

    Raises:
        D2ZeroError: The file or a provider cannot be used.
    """
    chosen = _listed(options.providers)
    names = [entry if isinstance(entry, str) else entry[0] for entry in chosen]
    if any(name in OPENVINO for name in names):
        if len(names) > 1:
            raise D2ZeroError(f"openvino cannot be combined with other providers, got {', '.join(names)}")
        if not isinstance(chosen[0], str):
            raise D2ZeroError(f"{names[0]} takes no options here; give session_options and threads to load")
        return OpenVinoBackend(path, contract, OPENVINO[names[0]], options.threads, options.session_options)
    settings = (options.threads, contract.tf32, options.session_options)
    backend = OnnxBackend(path, chosen, *settings, outputs=contract.outputs)
    if backend.on_gpu:
        backend.precision = contract.precision_on_gpu
    return backend


def _listed(providers: Providers | None) -> list[Provider]:
    """Providers in a list, our names in lower case; one may be a pair of a name and options, `("cuda", {…})`.

    Raises:
        D2ZeroError: A name is neither ours nor one of ONNX Runtime's.
    """
    return [_known(entry) if isinstance(entry, str) else (_known(entry[0]), entry[1]) for entry in _as_list(providers)]


def _known(name: str) -> str:
    if name.lower() in PROVIDERS:
        return name.lower()
    if not name.endswith("ExecutionProvider"):
        raise D2ZeroError(f"a provider is one of {', '.join(PROVIDERS)} or a name of ONNX Runtime's, got {name!r}")
    return name


def _as_list(providers: Providers | None) -> list[Provider]:
    if providers is None:
        return ["openvino" if find_spec("onnxruntime") is None and find_spec("openvino") else "cpu"]
    if isinstance(providers, str):
        return [providers]
    if isinstance(providers, tuple) and len(providers) == 2 and isinstance(providers[1], dict):
        return [(str(providers[0]), providers[1])]
    return list(providers)


def onnxruntime_providers(providers: Providers | None, what: str, hint: str = "") -> list[Provider]:
    """Providers of a file that only ONNX Runtime runs here; the CPU if none are given.

    Args:
        providers: As `load` takes them.
        what: Which file it is, for the message.
        hint: What else can be done.

    Raises:
        D2ZeroError: One is unknown, or OpenVINO's.
    """
    chosen = _listed(providers or "cpu")
    if any((entry if isinstance(entry, str) else entry[0]) in OPENVINO for entry in chosen):
        raise D2ZeroError(f"{what}, which this runtime runs with ONNX Runtime: leave out openvino{hint}")
    return chosen


def _open_end_to_end(path: Path, contract: ModelContract, vocabulary: Vocabulary, options: LoadOptions) -> Segmenter:
    hint = ", or give the file to OpenVINO itself (docs/end-to-end.md)"
    chosen = onnxruntime_providers(options.providers, f"{path} is an end-to-end file", hint)
    backend = EndToEndBackend(path, chosen, options.threads, contract.tf32, options.session_options)
    if backend.on_gpu:
        backend.precision = contract.precision_on_gpu
    return EndToEndSegmenter(backend, contract, vocabulary)


def _read_onnx(path: Path) -> Exported:
    contract, vocabulary = read_contract(path)

    def opened(options: LoadOptions) -> Segmenter:
        if contract.end_to_end:
            return _open_end_to_end(path, contract, vocabulary, options)
        classifier = OnnxClassifier(lambda: read_classifier(path), path, options.threads)
        return Segmenter(open_onnx(path, contract, options), contract, vocabulary, classifier)

    return Exported(contract, vocabulary, opened)


def _read_engine(path: Path) -> Exported:
    metadata = EngineMetadata.read(path)
    contract, vocabulary = metadata.runnable_contract, metadata.vocabulary

    def opened(options: LoadOptions) -> Segmenter:
        if contract.end_to_end:
            raise D2ZeroError(
                f"{path} is an end-to-end engine, which TensorRT runs itself (docs/end-to-end.md); this runtime takes"
                " engines of files without --end-to-end"
            )
        backend = TensorrtBackend(path, metadata, options.device, options.cuda_graphs)
        return Segmenter(backend, contract, vocabulary, OnnxClassifier(lambda: metadata.classifier, path))

    return Exported(contract, vocabulary, opened)


def _read_pt2(path: Path) -> Exported:
    metadata = Pt2Metadata.read(path)

    def opened(options: LoadOptions) -> Segmenter:
        backend = Pt2Backend(path, metadata, options.device, options.cuda_graphs, options.threads)
        classifier = OnnxClassifier(lambda: metadata.classifier, path, options.threads)
        return Segmenter(backend, metadata.contract, metadata.vocabulary, classifier)

    return Exported(metadata.contract, metadata.vocabulary, opened)


FORMATS = {
    entry.suffix: entry
    for entry in (
        Format(".onnx", _read_onnx, replace_onnx_vocabulary, takes_device=False, takes_session_options=True),
        Format(
            ".engine",
            _read_engine,
            replace_engine_vocabulary,
            no_providers="an engine is run by TensorRT itself; leave out the providers",
            takes_threads=False,
        ),
        Format(
            ".pt2",
            _read_pt2,
            replace_pt2_vocabulary,
            no_providers="a .pt2 runs where it was compiled for; leave out the providers",
        ),
    )
}
EXPORTED_SUFFIXES = tuple(FORMATS)
