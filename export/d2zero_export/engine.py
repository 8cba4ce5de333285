"""ONNX → engine of TensorRT or TensorRT-RTX, in named stages: read, parse, profile, build, contract.

An engine of TensorRT belongs to the GPU and the version that built it, so it is built where it runs. One of
TensorRT-RTX is built on any machine, for all RTX GPUs from Ampere on or for those that are asked for. Precision is
what the ONNX file says: the network is strongly typed, and no flag lowers it. No torch is needed. Whether the
engine computes what the checkpoint does is for `verify` to say.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2zero_export.engine_options import EngineOptions, Inputs, dimensions, profile_for
from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.artifacts.engine import EngineMetadata
from d2zero_runtime.artifacts.onnx import graph_inputs, read_classifier, read_contract, without_default_embeddings
from d2zero_runtime.artifacts.profile import Profile, Shape
from d2zero_runtime.backends.tensorrt.environment import (
    SDKS,
    Environment,
    Library,
    collector,
    require_library,
    require_tensorrt,
)
from d2zero_runtime.errors import D2ZeroError, join_truncated
from d2zero_runtime.files import atomic_write

__all__ = [
    "EngineOptions",
    "Profile",
    "Shape",
    "build_engine",
    "profile_for",
    "read_network",
    "require_builder",
]

GIB = 1 << 30
RTX_DEFAULT = "8.0, 8.6, 8.9, 12.0 and later"  # NVIDIA's documentation of engines built without capabilities
WAKE_UP = 0.2  # seconds
Progress = Callable[[str, int, int], None]


def require_builder(options: EngineOptions) -> Library | Environment:
    """What builds the engine: a library only, or one with the GPU that it builds for.

    Raises:
        D2ZeroError: Says what is missing.
    """
    sdk = SDKS[options.sdk]
    if not sdk.portable:
        return require_tensorrt(options.device, sdk)
    library = require_library(sdk)
    _capabilities(library, options.compute_capabilities)
    return library


def build_engine(
    onnx_path: Path,
    output: Path,
    options: EngineOptions | None = None,
    stage: Callable[[str], None] = lambda name: None,
    progress: Progress = lambda phase, done, total: None,
) -> EngineMetadata:
    """Build an engine from an exported model.

    Args:
        onnx_path: Made by `export_onnx`.
        output: Ends in `.engine`; its description, `.engine.json`, is written beside it. Written whole or not at all.
        options: How; `verify` and `max_logits` are for the caller.
        stage: Told each stage's name as it begins.
        progress: Told a phase of the build, the steps done and their number; called from other threads.

    Returns:
        What the description says.

    Raises:
        D2ZeroError: TensorRT or a GPU is absent, a shape does not fit, or TensorRT refuses the model.
        KeyboardInterrupt: Ctrl-C; the build was stopped and nothing written.
    """
    options = options or EngineOptions()
    if output.suffix != ".engine":
        raise D2ZeroError(f"an engine must end in .engine, got {output.name!r}")
    builder = require_builder(options)
    stage("read")
    contract, vocabulary = read_contract(onnx_path)
    if contract.precision == "int8" and contract.calibration.get("for") != "tensorrt":
        raise D2ZeroError(
            f"{onnx_path} was quantized for CPUs, whose zero points {builder.sdk.label} does not take; export it with"
            " --quantize-for tensorrt"
        )
    inputs = graph_inputs(onnx_path)
    options = replace(options, tf32=options.tf32 or contract.tf32)
    profile = profile_for(options, contract, inputs)
    stage("parse")
    work = read_network(builder, onnx_path)
    stage("profile")
    settings = work.settings(options, profile, inputs, contract)
    stage("build")
    plan = work.build(settings, progress)
    if options.timing_cache:
        with atomic_write(options.timing_cache) as partial:
            partial.write_bytes(memoryview(settings.get_timing_cache().serialize()))
    stage("contract")
    gpu = work.environment.gpu if work.environment else None
    metadata = EngineMetadata(
        contract=contract,
        embeddings=vocabulary.embeddings,
        classifier=read_classifier(onnx_path) if contract.query_dim else b"",
        profile=profile,
        sdk=work.library.sdk.name,
        gpu=gpu.name if gpu else "",
        compute_capability=gpu.compute_capability if gpu else ", ".join(options.compute_capabilities) or RTX_DEFAULT,
        tensorrt=work.library.version,
        onnx_sha256=hashlib.sha256(onnx_path.read_bytes()).hexdigest(),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=plan.nbytes,
        tf32=options.tf32,
    )
    with atomic_write(output) as partial:
        partial.write_bytes(plan)
    metadata.write(output)
    return metadata


def read_network(builder: Library | Environment, onnx_path: Path) -> "Build":
    """An exported model as the library's network, which is what its parser makes of it.

    Raises:
        D2ZeroError: The file cannot be read, or the library refuses it.
    """
    build = Build(builder, onnx_path)
    build.parse(without_default_embeddings(onnx_path), graph_inputs(onnx_path))
    return build


class Build:
    """One build: the library's objects, which must outlive it, and its messages."""

    def __init__(self, builder: Library | Environment, onnx_path: Path) -> None:
        self.environment = builder if isinstance(builder, Environment) else None
        self.library = builder.library if isinstance(builder, Environment) else builder
        self.tensorrt, self.onnx_path = self.library.tensorrt, onnx_path
        self.messages = messages = collector(self.tensorrt)
        try:
            self.builder = self.tensorrt.Builder(messages)
        except TypeError as error:  # what the bindings raise where the library gives them no builder
            raise D2ZeroError(self._failure(f"{self.library} cannot start here", [str(error)])) from error
        # On 11 every network is strongly typed and the flag changes nothing; on 10 it must be asked for.
        strongly_typed = 1 << int(self.tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(strongly_typed)
        self.parser = self.tensorrt.OnnxParser(self.network, messages)

    def parse(self, content: bytes, inputs: Inputs) -> None:
        """Read the model into the network."""
        if not self.parser.parse(content):
            errors = [self.parser.get_error(index) for index in range(self.parser.num_errors)]
            lines = [f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors]
            shown = lines if len(lines) <= 5 else [*lines[:4], f"and {len(lines) - 4} more"]
            what = f"{self.library} cannot read {self.onnx_path}"
            raise D2ZeroError(self._failure(what, shown))
        names = [self.network.get_input(index).name for index in range(self.network.num_inputs)]
        missing = sorted(set(inputs) - set(names))
        if missing:
            raise D2ZeroError(
                f"{self.library} made a constant of {join_truncated(missing)} in {self.onnx_path}; a defect of d2zero"
            )

    def settings(self, options: EngineOptions, profile: Profile, inputs: Inputs, contract: ModelContract) -> Any:
        """The builder's settings, with the range of shapes."""
        settings = self.builder.create_builder_config()
        if not options.tf32:
            settings.clear_flag(self.tensorrt.BuilderFlag.TF32)
        if options.workspace_gb:
            pool = self.tensorrt.MemoryPoolType.WORKSPACE
            settings.set_memory_pool_limit(pool, int(options.workspace_gb * GIB))
        if options.optimization_level is not None:
            settings.builder_optimization_level = options.optimization_level
        self._choose_gpus(settings, options.compute_capabilities)
        shapes = self.builder.create_optimization_profile()
        low, best, high = (
            dimensions(shape, contract.text_dim, inputs) for shape in (profile.min, profile.opt, profile.max)
        )
        for name in low:
            shapes.set_shape(name, low[name], best[name], high[name])
        if settings.add_optimization_profile(shapes) < 0:
            raise D2ZeroError(self._failure(f"{self.library} refuses the shapes {profile.min} to {profile.max}"))
        if options.timing_cache:
            self._use_timing_cache(settings, options.timing_cache)
        return settings

    def build(self, settings: Any, progress: Progress) -> memoryview:
        """The plan. The build runs in a thread of its own, so that Ctrl-C reaches this one and stops it."""
        monitor = _monitor(self.tensorrt, progress)
        settings.progress_monitor = monitor
        with ThreadPoolExecutor(1) as pool:
            try:
                building = pool.submit(self._build, settings)
                while not building.done():  # waking up now and then: a signal may reach another thread first
                    wait([building], WAKE_UP)
                plan = building.result()
            except KeyboardInterrupt:
                monitor.cancelled = True  # the next step ends the build
                raise
        if monitor.failure:
            raise monitor.failure
        if plan is None:
            raise D2ZeroError(self._failure(f"{self.library} cannot build {self.onnx_path}"))
        return memoryview(plan)

    def _build(self, settings: Any) -> Any:
        if self.environment:
            self.environment.select()
        return self.builder.build_serialized_network(self.network, settings)

    def _choose_gpus(self, settings: Any, capabilities: Sequence[str]) -> None:
        """Build for these compute capabilities; without any, for those that TensorRT-RTX has by default."""
        if not capabilities:
            return
        chosen = _capabilities(self.library, capabilities)
        settings.num_compute_capabilities = len(chosen)
        for index, capability in enumerate(chosen):
            settings.set_compute_capability(capability, index)

    def _use_timing_cache(self, settings: Any, path: Path) -> None:
        content = path.read_bytes() if path.is_file() else b""
        cache = settings.create_timing_cache(content)
        if cache is None or not settings.set_timing_cache(cache, False):
            raise D2ZeroError(
                self._failure(
                    f"timing cache {path} is damaged, or of another GPU or TensorRT; delete it or name another"
                )
            )

    def _failure(self, what: str, reasons: Sequence[str] = ()) -> str:
        """One line, whatever TensorRT's messages are broken into."""
        said = [" ".join(reason.split()) for reason in reasons or self.messages.errors[:5]]
        return f"{what}: {'; '.join(said)}" if said else what


def _capabilities(library: Library, texts: Sequence[str]) -> list[Any]:
    """The library's names of compute capabilities.

    Raises:
        D2ZeroError: It does not build for one of them.
    """
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in library.tensorrt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if wrong := [text for text in texts if text not in known]:
        raise D2ZeroError(f"{library} builds for the compute capabilities {', '.join(known)}, got {wrong[0]!r}")
    return [known[text] for text in texts]


def _monitor(tensorrt: Any, progress: Progress) -> Any:
    """Tells `progress` how the build goes. Its methods raise nothing: that would end the process."""

    class Monitor(tensorrt.IProgressMonitor):
        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self.failure: Exception | None = None
            self._totals: dict[str, int] = {}
            self._lock = threading.Lock()  # phases run in several threads

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._totals[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._totals.get(phase_name, 0))

        def _tell(self, phase: str, done: int) -> None:
            with self._lock:
                try:
                    progress(phase, done, self._totals.get(phase, 0))
                except Exception as error:
                    self.failure, self.cancelled = error, True

    return Monitor()
