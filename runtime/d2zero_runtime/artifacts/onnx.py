"""The default vocabulary inside an ONNX file: read and replaced without onnx, without torch.

An ONNX file is one protocol-buffers message. Only the few fields that matter are looked at; the weights
are skipped over, so that a file of any size takes milliseconds to read and one copy to change.

Field numbers (onnx.proto): ModelProto graph 7, metadata_props 14; GraphProto initializer 5; TensorProto
dims 1, data_type 2, name 8, raw_data 9; StringStringEntryProto key 1, value 2.
"""

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.contract import (
    ACTIVE_INPUT,
    CONTRACT_KEY,
    EMBEDDINGS_INPUT,
    ModelContract,
    bytes_from_base64,
)
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.files import atomic_write
from d2zero_runtime.vocabulary import Vocabulary

CLASSIFIER_KEY = "d2zero_classifier"  # of the metadata: the classifier by itself, an ONNX file as base64
_GRAPH, _METADATA = 7, 14
_INITIALIZER = 5
_DIMS, _TYPE, _NAME, _RAW = 1, 2, 8, 9
_FLOAT, _BOOL = 1, 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10  # bytes
Buffer = mmap.mmap | bytes


class _Field(NamedTuple):
    number: int
    wire: int
    start: int  # of the field, with its key
    body: int  # of its content
    end: int


def read_contract(path: Path) -> tuple[ModelContract, Vocabulary]:
    """The contract of an exported model and its default vocabulary.

    Raises:
        D2ZeroError: The file is absent, damaged, or was not exported by d2zero.
    """
    with _mapped(path) as buffer, _undamaged(path):
        contract = ModelContract.from_json(_value(buffer, _contract_field(buffer, path)).decode(), str(path))
        tensor = _initializer(buffer, path, EMBEDDINGS_INPUT)
        dims: list[int] = []
        raw = b""
        for part in _fields(buffer, tensor.body, tensor.end):
            if part.number == _DIMS and part.wire == _VARINT:
                dims.append(_varint(buffer, part.body)[0])
            elif part.number == _DIMS:
                position = part.body
                while position < part.end:
                    value, position = _varint(buffer, position)
                    dims.append(value)
            elif part.number == _RAW:
                raw = bytes(buffer[part.body : part.end])
        if len(dims) != 2 or not all(dims) or len(raw) != 4 * dims[0] * dims[1]:
            raise D2ZeroError(f"{path}: the class embeddings inside cannot be read; export the model again")
        try:
            return contract, contract.vocabulary(np.frombuffer(raw, "<f4").reshape(dims))
        except D2ZeroError as error:
            raise D2ZeroError(f"{path}: {error}") from error


def read_metadata(path: Path, key: str) -> str | None:
    """An entry of the file's metadata, or None if there is none of that key.

    Raises:
        D2ZeroError: The file is absent, damaged or no ONNX file.
    """
    with _mapped(path) as buffer, _undamaged(path):
        entry = _metadata_entry(buffer, key)
        values = _parts(buffer, entry, 2) if entry else []
        return _value(buffer, values[0]).decode() if values else None


def read_classifier(path: Path) -> bytes:
    """The classifier inside a file, an ONNX file itself.

    Raises:
        D2ZeroError: The file is absent or damaged, or has no classifier beside its network.
    """
    text = read_metadata(path, CLASSIFIER_KEY)
    if not text:
        raise D2ZeroError(f"{path} has no classifier beside its network; export the model again")
    return bytes_from_base64(text, f"{path} is damaged: its classifier")


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Say which file is damaged where its bytes are no messages."""
    try:
        yield
    except D2ZeroError:
        raise
    except (IndexError, ValueError) as error:
        raise D2ZeroError(f"{path} is damaged, cut short, or no ONNX file ({error})") from error


def replace_onnx_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Replace the default vocabulary of an exported model, atomically.

    Raises:
        D2ZeroError: The vocabulary's width or encoder does not fit, or the file is not of ours.
    """
    contract, previous = read_contract(path)
    contract.check_compatible(vocabulary, previous)
    changed = contract.with_vocabulary(vocabulary)
    entry = _message(1, CONTRACT_KEY.encode()) + _message(2, changed.to_json().encode())
    new = {EMBEDDINGS_INPUT: _tensor(EMBEDDINGS_INPUT, vocabulary.embeddings.astype("<f4"), _FLOAT)}
    if changed.end_to_end:
        new[ACTIVE_INPUT] = _tensor(ACTIVE_INPUT, changed.end_to_end.competing(vocabulary), _BOOL)
    with _undamaged(path), atomic_write(path) as partial, _mapped(path) as buffer, partial.open("wb") as out:
        metadata = _contract_entry(buffer, path)
        for part in _fields(buffer, 0, len(buffer)):
            if part.number == _GRAPH:
                out.writelines(_with_initializers(buffer, part, path, new))
            elif part.start == metadata.start:
                out.write(_message(_METADATA, entry))
            else:
                out.write(buffer[part.start : part.end])


def _tensor(name: str, values: NDArray[Any], kind: int) -> bytes:
    """A graph's initializer."""
    content = (
        b"".join(_key(_DIMS, _VARINT) + _encoded(side) for side in values.shape)
        + _key(_TYPE, _VARINT)
        + _encoded(kind)
        + _message(_NAME, name.encode())
        + _message(_RAW, values.tobytes())
    )
    return _message(_INITIALIZER, content)


def _with_initializers(buffer: Buffer, graph: _Field, path: Path, new: Mapping[str, bytes]) -> Iterator[bytes]:
    """A graph's field with some of its initializers replaced, or removed where the new one is empty."""
    old = sorted(((_initializer(buffer, path, name), name) for name in new), key=lambda entry: entry[0].start)
    change = sum(len(new[name]) - (tensor.end - tensor.start) for tensor, name in old)
    yield _key(_GRAPH, _BYTES) + _encoded(graph.end - graph.body + change)
    position = graph.body
    for tensor, name in old:
        yield buffer[position : tensor.start]
        yield new[name]
        position = tensor.end
    yield buffer[position : graph.end]


def _mapped(path: Path) -> mmap.mmap:
    if not path.is_file():
        raise D2ZeroError(f"model {path} does not exist")
    if not path.stat().st_size:
        raise D2ZeroError(f"{path} is empty")
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _metadata_entry(buffer: Buffer, key: str) -> _Field | None:
    for part in _fields(buffer, 0, len(buffer)):
        if part.number == _METADATA:
            inner = {field.number: field for field in _fields(buffer, part.body, part.end)}
            if 1 in inner and _value(buffer, inner[1]) == key.encode():
                return part
    return None


def _contract_entry(buffer: Buffer, path: Path) -> _Field:
    entry = _metadata_entry(buffer, CONTRACT_KEY)
    if entry is None:
        raise D2ZeroError(f"{path} carries no d2zero contract; export a checkpoint with `d2zero export`")
    return entry


def _contract_field(buffer: Buffer, path: Path) -> _Field:
    entry = _contract_entry(buffer, path)
    value = next((field for field in _fields(buffer, entry.body, entry.end) if field.number == 2), None)
    if value is None:
        raise D2ZeroError(f"{path} carries an empty d2zero contract; export the model again")
    return value


def _initializer(buffer: Buffer, path: Path, name: str) -> _Field:
    for part in _fields(buffer, 0, len(buffer)):
        if part.number != _GRAPH:
            continue
        for tensor in _fields(buffer, part.body, part.end):
            if tensor.number != _INITIALIZER:
                continue
            names = [f for f in _fields(buffer, tensor.body, tensor.end) if f.number == _NAME]
            if names and _value(buffer, names[0]) == name.encode():
                return tensor
    what = "class embeddings" if name == EMBEDDINGS_INPUT else f"{name!r}"
    raise D2ZeroError(f"{path} has no replaceable {what} inside")


def _value(buffer: Buffer, part: _Field) -> bytes:
    return bytes(buffer[part.body : part.end])


def _fields(buffer: Buffer, start: int, end: int) -> Iterator[_Field]:
    position = start
    while position < end:
        key, body = _varint(buffer, position)
        wire = key & 7
        if wire == _BYTES:
            length, body = _varint(buffer, body)
            stop = body + length
        elif wire == _VARINT:
            stop = _varint(buffer, body)[1]
        elif wire in (_FIXED64, _FIXED32):
            stop = body + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError(f"unknown wire type {wire}")
        if stop > end:
            raise ValueError("a field ends past its message")
        yield _Field(key >> 3, wire, position, body, stop)
        position = stop


def _varint(buffer: Buffer, position: int) -> tuple[int, int]:
    value = shift = 0
    for _ in range(_LONGEST_VARINT):
        byte = buffer[position]
        value |= (byte & 0x7F) << shift
        position += 1
        shift += 7
        if byte < 0x80:
            return value, position
    raise ValueError("a number is too long")


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(number: int, wire: int) -> bytes:
    return _encoded(number << 3 | wire)


def _message(number: int, content: bytes) -> bytes:
    return _key(number, _BYTES) + _encoded(len(content)) + content


# Further fields, for what TensorRT needs: GraphProto input 11; ValueInfoProto name 1, type 2; TypeProto
# tensor_type 1; TypeProto.Tensor shape 2; TensorShapeProto dim 1; Dimension dim_value 1.
_INPUT = 11
_TENSOR_SHAPE_PATH = (2, 1, 2)  # from a ValueInfoProto: its type, tensor type, shape


def graph_inputs(path: Path) -> dict[str, tuple[int | None, ...]]:
    """The graph's inputs and their dimensions, None where one is open.

    Raises:
        D2ZeroError: The file is absent, damaged or no ONNX file.
    """
    found: dict[str, tuple[int | None, ...]] = {}
    with _mapped(path) as buffer, _undamaged(path):
        for graph in _parts(buffer, _Field(0, _BYTES, 0, 0, len(buffer)), _GRAPH):
            for entry in _parts(buffer, graph, _INPUT):
                name = _value(buffer, _parts(buffer, entry, 1)[0]).decode()
                found[name] = _dimensions(buffer, entry)
    return found


def without_default_embeddings(path: Path) -> bytes:
    """The file without the defaults of class embeddings (and what goes with them), so that they are plain inputs.

    ONNX lets an input have a default; TensorRT's parser makes a constant of such an input, and the vocabulary
    could not be changed any more. Where the embeddings are no input, the file is returned as it is.
    """
    removed = {name: b"" for name in graph_inputs(path) if name in (EMBEDDINGS_INPUT, ACTIVE_INPUT)}
    with _mapped(path) as buffer, _undamaged(path):
        if not removed:
            return bytes(buffer[:])
        kept: list[bytes] = []
        for part in _fields(buffer, 0, len(buffer)):
            if part.number == _GRAPH:
                kept += _with_initializers(buffer, part, path, removed)
            else:
                kept.append(buffer[part.start : part.end])
        return b"".join(kept)


def _dimensions(buffer: Buffer, entry: _Field) -> tuple[int | None, ...]:
    for number in _TENSOR_SHAPE_PATH:
        inner = _parts(buffer, entry, number)
        if not inner:
            return ()
        entry = inner[0]
    sizes: list[int | None] = []
    for dimension in _parts(buffer, entry, 1):
        fixed = _parts(buffer, dimension, 1)
        sizes.append(_varint(buffer, fixed[0].body)[0] if fixed else None)
    return tuple(sizes)


def _parts(buffer: Buffer, message: _Field, number: int) -> list[_Field]:
    return [part for part in _fields(buffer, message.body, message.end) if part.number == number]
