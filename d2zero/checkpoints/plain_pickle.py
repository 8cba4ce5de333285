"""Unpickling dicts of NumPy arrays without NumPy's own classes, which trust what a pickle says.

NumPy's `_reconstruct`, `dtype` and `scalar` set sizes, types and pointers as a pickle asks: a hostile one corrupts
memory. Here each is a placeholder that keeps what it is given; arrays are made from bytes once type, shape and length
fit together. Nothing else can be named, and nothing is executed. Python's own unpickler is used, not the one in C,
which takes memory as a damaged file asks.
"""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMBERS = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})
_LATIN = ("latin1", "latin-1", "iso-8859-1")


def read_pickle(path: Path) -> object:
    """The content of a `.pkl`: plain containers, texts, numbers, and NumPy arrays of numbers.

    Raises:
        Exception: The file is damaged or holds anything else; of many kinds.
    """
    content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    return _plain(content)


class _Dtype:
    """Replaces `numpy.dtype`."""

    def __init__(self, code: object, align: object = False, copy: object = False) -> None:
        if not isinstance(code, str) or code not in _NUMBERS:
            raise pickle.UnpicklingError(f"refused an array of type {code!r}")
        self.type = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 4 and state[2:5] == (None, None, None) else None
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("refused an array of a structured type")
        self.type = self.type.newbyteorder(order)


class _Array:
    """Replaces `numpy.ndarray`."""

    array: NDArray[Any]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array is damaged")
        _, shape, dtype, in_columns, content = state
        self.array = _from_bytes(content, dtype, shape, "F" if in_columns else "C")


class _Ndarray:
    """Only ever named, as an argument of `_reconstruct`."""

    def __new__(cls, *given: object) -> "_Ndarray":
        raise pickle.UnpicklingError("refused to make an array without content")


class _Dict(dict[Any, Any]):
    """Replaces `collections.OrderedDict`; what torch notes on one is dropped."""

    def __setstate__(self, state: object) -> None: ...


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind is not _Ndarray:
        raise pickle.UnpicklingError("refused an array of another class")
    return _Array()


def _scalar(dtype: object, content: object = None) -> NDArray[Any]:
    return _from_bytes(content, dtype, (), "C")


def _frombuffer(content: object, dtype: object, shape: object, order: object) -> NDArray[Any]:
    return _from_bytes(content, dtype, shape, "F" if order == "F" else "C")


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in _LATIN:
        raise pickle.UnpicklingError(f"refused to encode as {encoding!r}")
    return text.encode("latin1")


def _no_bytes(*given: object) -> bytes:
    """Replaces `bytes`, which old pickles call for an empty array."""
    if given:
        raise pickle.UnpicklingError("refused to make bytes")
    return b""


def _from_bytes(content: object, dtype: object, shape: object, order: Any) -> NDArray[Any]:
    if isinstance(content, str):  # bytes of Python 2
        content = content.encode("latin1")
    sides = shape if isinstance(shape, tuple) else None
    if not isinstance(content, (bytes, bytearray)) or not isinstance(dtype, _Dtype) or sides is None:
        raise pickle.UnpicklingError("an array is damaged")
    if any(type(side) is not int or side < 0 for side in sides):
        raise pickle.UnpicklingError(f"an array is damaged: its shape is {sides}")
    if math.prod(sides) * dtype.type.itemsize != len(content):
        raise pickle.UnpicklingError(f"an array of {sides} {dtype.type} has {len(content)} bytes")
    array = np.frombuffer(content, dtype.type).reshape(sides, order=order)
    return array.astype(dtype.type.newbyteorder("="))


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): _Dict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _PlainUnpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return _STAND_INS[module, name]

    def persistent_load(self, given: object) -> Any:
        raise pickle.UnpicklingError("refused a reference to something outside the file")


def _plain(content: object) -> object:
    """Arrays in place of their placeholders, in dicts within dicts, which is all that is looked at."""
    if isinstance(content, dict):
        return {name: _plain(value) if value is not content else None for name, value in content.items()}
    return getattr(content, "array", None) if isinstance(content, _Array) else content
