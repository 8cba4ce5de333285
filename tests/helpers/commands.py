"""What a command answered."""

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]
"""Runs `d2zero …`; see the fixture `command`."""
