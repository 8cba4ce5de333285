"""Running an exported `.onnx` with ONNX Runtime: CPU, CUDA or TensorRT execution provider.

Inputs and outputs are bound to the device that computes: class embeddings are uploaded once per vocabulary,
and nothing is copied that does not have to be. What was asked for is what runs, or an error.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.contract import (
    ACTIVE_INPUT,
    EMBEDDINGS_INPUT,
    FEATURES,
    IMAGES_INPUT,
    OUTPUTS,
    PIXELS_INPUT,
)
from d2zero_runtime.artifacts.text_encoder import FEATURES_OUTPUT, TOKENS_INPUT
from d2zero_runtime.backends.base import Backend, Classifier, Images, LatestUpload, Raw
from d2zero_runtime.backends.onnxruntime_gpu import CUDA, TENSORRT, forbid_tf32, require_startable
from d2zero_runtime.errors import D2ZeroError, join_truncated, optional

Provider = str | tuple[str, dict[str, Any]]  # a name, or a name and its options as ONNX Runtime takes them
ONNXRUNTIME = {"cpu": "CPUExecutionProvider", "cuda": CUDA, "tensorrt": TENSORRT}
NO_RAW_OUTPUT = "an end-to-end file hands over detections and no raw output; use a file without --end-to-end for that"
FLOAT, UINT8, INT64 = "tensor(float)", "tensor(uint8)", "tensor(int64)"


class Session:
    """A graph in an ONNX Runtime session.

    Args:
        file: The `.onnx` file, or its content.
        providers: `cpu`, `cuda`, `tensorrt` or ONNX Runtime's own names, in order of preference, each by itself or
            with its options: `("cuda", {"device_id": 1})`.
        threads: Threads inside an operator; ONNX Runtime's choice if left out.
        tf32: Whether a GPU may round float32 matmuls and convolutions to TF32, as ONNX Runtime's GPU providers do by
            default. An explicit `use_tf32` among the options of `cuda` has precedence. `tensorrt` has no such option:
            for it, `NVIDIA_TF32_OVERRIDE=0` is set in the environment of the process unless the variable is there.
        session_options: Attributes of `onnxruntime.SessionOptions` and, where the name has a dot, configuration keys.
        where: What messages call it; the file's path if left out.

    Raises:
        D2ZeroError: Onnxruntime is not installed, a provider is not available, its libraries, the NVIDIA driver or
            the GPU are missing, a session option is not ONNX Runtime's, or the file cannot be run.
    """

    name: str
    on_gpu: bool
    _inputs: ClassVar[Mapping[str, tuple[str, int]]]  # type and rank by name
    _outputs: ClassVar[Mapping[str, str]]  # type by name

    def __init__(
        self,
        file: Path | bytes,
        providers: Sequence[Provider] = ("cpu",),
        threads: int | None = None,
        tf32: bool = False,
        session_options: Mapping[str, Any] | None = None,
        where: str = "",
    ) -> None:
        content = file if isinstance(file, bytes) else str(file)
        where = where or str(file)
        onnxruntime = _onnxruntime()
        chosen = [_named(entry) for entry in providers]
        names = [name for name, _ in chosen]
        _require_available(onnxruntime, names)
        if not tf32:
            chosen = forbid_tf32(chosen)
        require_startable(onnxruntime, names)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # it keeps a plan of memory for every size it has seen
        if threads:
            options.intra_op_num_threads = threads
        _change(options, session_options or {})
        try:
            # Without `enable_fallback=0` a provider that fails is reported on standard output, and the CPU computes.
            self.session = onnxruntime.InferenceSession(content, options, providers=chosen, enable_fallback=0)
        except Exception as error:  # onnxruntime has its own exceptions
            raise D2ZeroError(f"onnxruntime cannot load {where}: {str(error).splitlines()[0]}") from error
        _require_chosen(names, self.session.get_providers())
        _check_tensors(where, self.session, self._inputs, self._outputs)
        self.name = f"onnxruntime {onnxruntime.__version__} ({', '.join(self.session.get_providers())})"
        first, settings = chosen[0]
        self.on_gpu = first in (CUDA, TENSORRT)
        self._device = ("cuda", int(settings.get("device_id", 0))) if self.on_gpu else ("cpu", 0)
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._uploaded = LatestUpload(lambda array: self._value(array, *self._device))

    def _ran(self, binding: Any) -> list[NDArray[Any]]:
        """The outputs, on the host."""
        try:
            self.session.run_with_iobinding(binding)
            found: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        except Exception as error:  # onnxruntime has its own exceptions
            raise _cannot_run(error) from error
        return found

    def _bound(self, inputs: Mapping[str, NDArray[Any]], embeddings_KD: NDArray[np.float32] | None) -> Any:
        """Inputs and outputs on the device that computes.

        Raises:
            D2ZeroError: The graph cannot take them.
        """
        binding = self.session.io_binding()
        try:
            for name, array in inputs.items():
                binding.bind_ortvalue_input(name, self._value(array, *self._device))
            if embeddings_KD is not None:
                binding.bind_ortvalue_input(EMBEDDINGS_INPUT, self._uploaded(embeddings_KD))
            for name in self._outputs:
                binding.bind_output(name, *self._device)
        except Exception as error:  # onnxruntime has its own exceptions
            raise _cannot_run(error) from error
        return binding


class OnnxBackend(Session, Backend[Images]):
    """A network in an ONNX Runtime session.

    Args:
        file: The `.onnx` file.
        outputs: What it hands over (`ModelContract.outputs`).
        arguments: Further arguments of `Session`, by position or name.
    """

    _inputs: ClassVar = {IMAGES_INPUT: (FLOAT, 4), EMBEDDINGS_INPUT: (FLOAT, 2)}

    def __init__(self, file: Path, *arguments: Any, outputs: Sequence[str] = OUTPUTS, **named: Any) -> None:
        self._outputs = dict.fromkeys(outputs, FLOAT)  # type: ignore[misc]
        super().__init__(file, *arguments, **named)
        self.is_reference = self.session.get_providers() == ["CPUExecutionProvider"]

    def run(self, images_B3HW: NDArray[np.float32], embeddings_KD: NDArray[np.float32] | None) -> Raw:
        """Run the network; see `Backend`."""
        return Raw.of(*self._ran(self._bound({IMAGES_INPUT: images_B3HW}, embeddings_KD)))

    def resident(
        self, images_B3HW: NDArray[np.float32], embeddings_KD: NDArray[np.float32] | None
    ) -> Callable[[], None]:
        """See `Backend`."""
        binding = self._bound({IMAGES_INPUT: images_B3HW}, embeddings_KD)

        def run_once() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run_once


class EndToEndBackend(Session, Backend[NDArray[np.uint8]]):
    """A file from pixels to detections in an ONNX Runtime session; its arguments are those of `Session`."""

    _inputs: ClassVar = {PIXELS_INPUT: (UINT8, 4), EMBEDDINGS_INPUT: (FLOAT, 2), ACTIVE_INPUT: ("tensor(bool)", 1)}
    _outputs: ClassVar = {"boxes": FLOAT, "scores": FLOAT, "class_ids": INT64, "masks": f"{UINT8} or {FLOAT}"}

    def run(self, images_B3HW: NDArray[np.uint8], embeddings_KD: NDArray[np.float32] | None) -> NoReturn:
        """Refuses: such a file hands over no logits."""
        raise D2ZeroError(NO_RAW_OUTPUT)

    def find(
        self,
        pixels_BHW3: NDArray[np.uint8],
        embeddings_KD: NDArray[np.float32] | None,
        active_K: NDArray[np.bool_] | None,
    ) -> list[NDArray[Any]]:
        """Run the file.

        Args:
            pixels_BHW3: uint8 RGB, at network size, not padded.
            embeddings_KD: Class embeddings, float32; None where they are constants of the graph.
            active_K: Which classes compete; None where the embeddings are.

        Returns:
            boxes (B, N, 4), scores (B, N), class ids (B, N) and masks, as docs/end-to-end.md has them.
        """
        inputs = {PIXELS_INPUT: pixels_BHW3} | ({} if active_K is None else {ACTIVE_INPUT: active_K})
        return self._ran(self._bound(inputs, embeddings_KD))


class TextSession(Session):
    """A text encoder in an ONNX Runtime session; its arguments are those of `Session`."""

    _inputs: ClassVar = {TOKENS_INPUT: (INT64, 2)}
    _outputs: ClassVar = {FEATURES_OUTPUT: FLOAT}

    def encode(self, token_ids_PL: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features (P, D), float32."""
        (features_PD,) = self._ran(self._bound({TOKENS_INPUT: token_ids_PL}, None))
        return features_PD


class OnnxClassifier(Classifier):
    """A model's classifier in an ONNX Runtime session on the CPU, opened when it is first needed.

    Args:
        read: Reads the classifier, an ONNX file; called once.
        where: The file that it is in, for messages.
        threads: Threads inside an operator; ONNX Runtime's choice if left out.
    """

    def __init__(self, read: Callable[[], bytes], where: Path, threads: int | None = None) -> None:
        self._read, self._where, self._threads = read, where, threads

    def run(
        self, queries_BQC: NDArray[np.float32], background_BC: NDArray[np.float32], embeddings_KD: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `Classifier`."""
        return self._session.classify(queries_BQC, background_BC, embeddings_KD)

    def to_onnx(self) -> bytes:
        """See `Classifier`."""
        return self._content

    @cached_property
    def _content(self) -> bytes:
        return self._read()

    @cached_property
    def _session(self) -> "_ClassifierSession":
        # Without spinning: its threads would take turns with those that read and post-process.
        waiting = {"session.intra_op.allow_spinning": "0"}
        where = f"the classifier in {self._where}"
        return _ClassifierSession(self._content, threads=self._threads, session_options=waiting, where=where)


class _ClassifierSession(Session):
    _inputs: ClassVar = {FEATURES[0]: (FLOAT, 3), FEATURES[1]: (FLOAT, 2), EMBEDDINGS_INPUT: (FLOAT, 2)}
    _outputs: ClassVar = {OUTPUTS[0]: FLOAT}

    def classify(
        self, queries_BQC: NDArray[np.float32], background_BC: NDArray[np.float32], embeddings_KD: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        features = dict(zip(FEATURES, (queries_BQC, background_BC), strict=True))
        (class_logits_BQK,) = self._ran(self._bound(features, embeddings_KD))
        return class_logits_BQK


def _cannot_run(error: Exception) -> D2ZeroError:
    return D2ZeroError(f"onnxruntime cannot run the model: {str(error).splitlines()[0]}")


def _check_tensors(
    where: str, session: Any, wanted_inputs: Mapping[str, tuple[str, int]], wanted_outputs: Mapping[str, str]
) -> None:
    """Refuse a graph whose inputs and outputs are not those of an exported model.

    Raises:
        D2ZeroError: Names what is different.
    """
    inputs = {entry.name: entry for entry in session.get_inputs()}
    outputs = {entry.name: entry for entry in session.get_outputs()}
    for name, entry in {**inputs, **outputs}.items():
        kind, rank = wanted_inputs.get(name, (wanted_outputs.get(name, ""), len(entry.shape)))
        if entry.type not in kind.split(" or ") or len(entry.shape) != rank:
            raise D2ZeroError(
                f"{where} is not a model of d2zero: {name} is {entry.type} of shape {entry.shape}; export it again"
            )
    missing = [name for name in (next(iter(wanted_inputs)), *wanted_outputs) if name not in {**inputs, **outputs}]
    if missing:
        raise D2ZeroError(f"{where} is not a model of d2zero: it lacks {join_truncated(missing)}; export it again")


def _onnxruntime() -> Any:
    onnxruntime = optional("onnxruntime")
    if not hasattr(onnxruntime, "InferenceSession"):  # both packages share a folder; removing one guts the other
        raise D2ZeroError(
            "onnxruntime is installed without its library, as happens when onnxruntime and onnxruntime-gpu were both"
            " installed; remove both, then install 'd2zero[cpu]' or 'd2zero[gpu]'"
        )
    return onnxruntime


def _change(options: Any, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        try:
            if "." in name:
                options.add_session_config_entry(name, str(value))
            else:
                setattr(options, name, value)
        except Exception as error:  # onnxruntime has its own exceptions; others are for an unknown name or type
            raise D2ZeroError(
                f"onnxruntime does not take the session option {name}={value!r}; expected an attribute of"
                " onnxruntime.SessionOptions, or a configuration key such as session.intra_op.allow_spinning"
            ) from error


def _named(provider: Provider) -> tuple[str, dict[str, Any]]:
    name, options = provider if isinstance(provider, tuple) else (provider, {})
    return ONNXRUNTIME.get(name.lower(), name), dict(options)


def _require_available(onnxruntime: Any, names: Sequence[str]) -> None:
    if not names:
        raise D2ZeroError("no execution provider was named; give cpu, cuda or tensorrt")
    available = onnxruntime.get_available_providers()
    missing = [name for name in names if name not in available]
    if missing:
        raise D2ZeroError(
            f"{join_truncated(missing)} not available; this onnxruntime has {join_truncated(available)}."
            " For NVIDIA GPUs install 'd2zero[gpu]' instead of 'd2zero[cpu]' (never both)"
        )


def _require_chosen(wanted: Sequence[str], running: Sequence[str]) -> None:
    """ONNX Runtime leaves out a provider that it cannot start, with a line in its log."""
    lost = [name for name in wanted if name not in running]
    if lost:
        raise D2ZeroError(
            f"onnxruntime could not start {join_truncated(lost)}, only"
            f" {join_truncated(running)} would run; its own lines on standard"
            " error say why"
        )
