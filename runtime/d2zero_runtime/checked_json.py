"""JSON from a file, checked against a dataclass before anything uses it.

Nothing in a file is trusted to have the type that we wrote: a text where a number should be must end in one line that
names the file and the field, not in an error far from both.
"""

import json
import math
from collections.abc import Collection
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar

import msgspec

from d2zero_runtime.errors import D2ZeroError, join_truncated

T = TypeVar("T")


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        text: UTF-8, with a byte-order mark or without.
        where: The file, for error messages.

    Raises:
        D2ZeroError: It is no JSON, or something other than an object.
    """
    try:
        values = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff"))
    except RecursionError as error:
        raise D2ZeroError(f"{where} is damaged: its JSON is nested too deeply") from error
    except ValueError as error:
        raise D2ZeroError(f"{where} is damaged: it is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise D2ZeroError(f"{where} is damaged: expected a JSON object, got {type(values).__name__}")
    return values


def checked(
    kind: type[T], values: object, where: str, optional: Collection[str] | None = None, remedy: str = "copy it again"
) -> T:
    """A dataclass filled with what JSON made, each field of its declared type.

    Args:
        kind: A dataclass, or another type; nested dataclasses are filled as well.
        values: What JSON made.
        where: The file, for error messages.
        optional: Fields that may be absent; those with defaults if left out.
        remedy: What the user can do about it.

    Raises:
        D2ZeroError: A field is absent, of another type, or refused by the dataclass.
    """
    if isinstance(values, dict) and is_dataclass(kind):
        missing = [entry.name for entry in fields(kind) if entry.name not in values and _required(entry, optional)]
        if missing:
            raise D2ZeroError(f"{where} lacks {join_truncated(missing)}; {remedy}")
    try:
        return msgspec.convert(values, kind)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        reason = str(error).replace("`", "").replace("$.", "")
        raise D2ZeroError(f"{where} is damaged: {reason}; {remedy}") from error


def _required(entry: "Field[Any]", optional: Collection[str] | None) -> bool:
    if optional is not None:
        return entry.init and entry.name not in optional
    return entry.default is MISSING and entry.default_factory is MISSING


def refuse_unknown(kind: type[Any], values: dict[str, Any], what: str, by_hand: bool = False) -> None:
    """Refuse fields that a dataclass does not have: a newer version wrote them, or somebody who is told what there is.

    Raises:
        D2ZeroError: Names them.
    """
    known = [entry.name for entry in fields(kind)]
    unknown = sorted(values.keys() - set(known))
    if unknown:
        hint = f"expected {', '.join(known)}" if by_hand else "was this written by a newer d2zero?"
        raise D2ZeroError(f"unknown {what} {join_truncated(unknown)}; {hint}")


def refuse_newer(version: object, newest: int, where: str, what: str) -> None:
    """Refuse a file that follows a later version of its format.

    Raises:
        D2ZeroError: It does; or its version is no number.
    """
    if not isinstance(version, int) or isinstance(version, bool):
        raise D2ZeroError(f"{where} is damaged: the version of {what} must be a whole number, got {version!r}")
    if version > newest:
        raise D2ZeroError(
            f"{where} follows version {version} of {what}, this d2zero reads up to {newest}; upgrade d2zero"
        )


def require_finite(name: str, value: float, above: float = -math.inf) -> None:
    """Refuse a number that is not finite, or not above a limit.

    Raises:
        D2ZeroError: It is so.
    """
    if not (math.isfinite(value) and value > above):
        limit = "" if above == -math.inf else f" above {above:g}"
        raise D2ZeroError(f"{name} must be a finite number{limit}, got {value}")
