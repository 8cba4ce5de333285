"""TensorRT's real Python surface without TensorRT: bindings from PyPI over stub libraries.

The bindings hold every class, method and enumeration, with signatures in their docstrings, and import once
three libraries export ten symbols. Nothing can be built or run with them; what can be checked is that our code
calls what is there, with arguments that fit. A `Recorder` stands for an object of a real class: it refuses a
name or an argument that the class does not have, and answers what the test says.

This module is used twice: by pytest, to start one process a version, and inside those processes.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ("10.14", "11.4")
BINDINGS = "D2ZERO_TEST_BINDINGS"  # whose classes recorders have, if not TensorRT's
RTX = "tensorrt_rtx_bindings"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getNvOnnxParserVersion",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "initLibNvInferPlugins",
    "getInferLibVersion",
)


def bindings(version: str) -> Path:
    """The folder of one version's bindings; the test skips without it."""
    folder = Path(sys.prefix) / f"tensorrt-{version}"
    if not (folder / "tensorrt_bindings").is_dir():
        pytest.skip(f"needs TensorRT's bindings {version}: `make bindings`")
    if not shutil.which("gcc"):
        pytest.skip("needs gcc, for stub libraries")
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings, for the names of CUDA's functions")
    return folder


def run_inside(scenarios: Path, version: str, folder: Path) -> None:
    """Run a file of scenarios with pytest, in a process that has one version's bindings as `tensorrt`."""
    packages = bindings(version)
    source = folder / "stubs.c"
    source.write_text("\n".join(f"void *{symbol}(void) {{ return 0; }}" for symbol in SYMBOLS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{version.split('.')[0]}"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True, timeout=60
        )
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:xdist", f"--basetemp={folder / 'tmp'}"]
    done = subprocess.run([*command, scenarios], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


class Parameter(NamedTuple):
    name: str
    kind: str
    required: bool


def signatures(documented: Any) -> list[list[Parameter]]:
    """What pybind11 wrote into a docstring: the parameters of each overload, without `self`."""
    found = []
    for line in (documented.__doc__ or "").splitlines():
        match = re.match(r"(?:\d+\. )?\w+\((self: .*)\) -> ", line)
        if match:
            found.append([_parameter(text) for text in _split(match[1])[1:]])
    assert found, f"no signature in {documented}: {documented.__doc__}"
    return found


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "[(<") - (sign in "])>")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _parameter(text: str) -> Parameter:
    name, _, rest = text.partition(": ")
    kind, _, default = rest.partition(" = ")
    return Parameter(name, kind, not default)


class Recorder:
    """Stands for an object of a real class.

    `answers` maps `Class.member` to a value, or to a function of the recorder and the arguments. What has no
    answer gives what the signature promises: nothing, True, or a recorder of the class that is returned.
    """

    def __init__(self, real: type, answers: dict[str, Any], calls: list[tuple[Any, ...]]) -> None:
        vars(self).update(real=real, answers=answers, calls=calls, state={})

    def __getattr__(self, name: str) -> Any:
        member = _member(self.real, name)
        key = f"{self.real.__name__}.{name}"
        if isinstance(member, property):
            assert key in self.answers, f"the test has no answer for {key}"
            answer = self.answers[key]
            return answer(self) if callable(answer) else answer
        return lambda *arguments, **named: self._called(key, member, arguments, named)

    def __setattr__(self, name: str, value: Any) -> None:
        member = _member(self.real, name)
        assert isinstance(member, property) and member.fset, f"{self.real.__name__}.{name} cannot be set"
        self.calls.append((f"{self.real.__name__}.{name} =", value))

    def _called(self, key: str, member: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        check_call(key, member, arguments, named)
        self.calls.append((key, *arguments, *named.values()))
        if key in self.answers:
            answer = self.answers[key]
            return answer(self, *arguments, **named) if callable(answer) else answer
        returned = re.search(r"-> ([\w.:]+)", member.__doc__)
        kind = returned[1] if returned else "None"
        if kind in ("None", "bool"):
            return {"None": None, "bool": True}[kind]
        return Recorder(_real(kind), self.answers, self.calls)


def constructor(real: type, answers: dict[str, Any], calls: list[tuple[Any, ...]]) -> Callable[..., Recorder]:
    """Replaces a real class whose objects need the libraries."""

    def make(*arguments: Any, **named: Any) -> Recorder:
        check_call(real.__name__, _member(real, "__init__"), arguments, named)
        calls.append((real.__name__, *arguments))
        return Recorder(real, answers, calls)

    return make


def check_call(key: str, member: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Refuse arguments that fit no overload."""
    overloads = signatures(member)
    assert any(_fits(overload, arguments, named) for overload in overloads), (
        f"{key} does not take {arguments} {named}; it takes {overloads}"
    )


def _fits(overload: list[Parameter], arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    if len(arguments) > len(overload):
        return False
    given = {**{entry.name: value for entry, value in zip(overload, arguments, strict=False)}, **named}
    known = {entry.name: entry for entry in overload}
    return (
        given.keys() <= known.keys()
        and all(entry.name in given for entry in overload if entry.required)
        and all(_is_a(value, known[name].kind) for name, value in given.items())
    )


def _is_a(value: Any, kind: str) -> bool:
    plain = {"str": str, "bool": bool, "tuple": tuple, "list": list}
    if kind in plain:
        return isinstance(value, plain[kind])
    if kind in ("int", "typing.SupportsInt"):
        return isinstance(value, int)
    if kind in ("buffer", "typing_extensions.Buffer"):
        return isinstance(value, bytes | bytearray | memoryview)
    real = _real(kind)
    if real.__name__ == "Dims":
        return isinstance(value, tuple | list) and all(isinstance(side, int) for side in value)
    return value.real is real if isinstance(value, Recorder) else isinstance(value, real)


def _real(kind: str) -> type:
    name = {"nvonnxparser::IParserError": "ParserError"}.get(kind, re.split(r"\.|::", kind)[-1])
    real = getattr(import_module(os.environ.get(BINDINGS, "tensorrt_bindings")), name)
    assert inspect.isclass(real), kind
    return real


def _member(real: type, name: str) -> Any:
    try:
        return inspect.getattr_static(real, name)
    except AttributeError:
        raise AssertionError(f"{real.__name__} has no {name} in these bindings") from None


def as_tensorrt_rtx(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """TensorRT-RTX with its real libraries, and recorders of its classes; the test skips without it."""
    reason = "needs TensorRT-RTX: `make bindings`, on Linux or Windows on x86-64"
    library: ModuleType = pytest.importorskip(RTX, reason=reason)
    monkeypatch.setenv(BINDINGS, RTX)
    return library


def layer_types(path: Path) -> Counter[tuple[str, str]]:
    """How many layers of each kind compute in each type, as TensorRT-RTX reads an exported model."""
    from d2zero_export.engine import read_network
    from d2zero_runtime.backends.tensorrt.environment import TENSORRT_RTX, require_library

    build = read_network(require_library(TENSORRT_RTX), path)  # owns the network
    layers = [build.network.get_layer(index) for index in range(build.network.num_layers)]
    return Counter((layer.type.name, layer.get_output(0).dtype.name) for layer in layers if layer.num_outputs)


def as_tensorrt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The bindings under the name that our code imports, and torch out of reach."""
    import tensorrt_bindings

    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_bindings)
    monkeypatch.setitem(sys.modules, "torch", None)
    return tensorrt_bindings
