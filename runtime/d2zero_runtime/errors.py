"""The one error type for mistakes that the user can fix.

Raised with a single line that says what was expected, what came, and what to do. The command prints
that line and exits with 2; library users can catch it as the `ValueError` that it is.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

EXTRAS = {  # packages that an extra of ours installs; any other comes with `train`
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "onnx": "export",
    "onnxscript": "export",
    "open_clip": "clip",
    "tokenizers": "text",
    "ftfy": "text",
    "supervision": "viz",
    "pandas": "viz",
    "psutil": "bench",
    "jinja2": "bench",
    "matplotlib": "bench",
    "pyarrow": "index",
    "transformers": "bench",
}


class D2ZeroError(ValueError):
    """A mistake in what was given: a file, a flag, a size, a vocabulary."""


def printable(text: str) -> str:
    """A text without what would move a terminal's cursor or change its colours."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in text)


def join_truncated(items: Iterable[object], limit: int = 5) -> str:
    """Join the first `limit` items for an error line and count the rest.

    >>> join_truncated("abcdefg", 3)
    'a, b, c and 4 more'
    """
    names = [str(item) for item in items]
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def missing_package(name: str) -> str:
    """What to say of a package that is not installed, by the name that it is imported with."""
    package = name.split(".")[0]
    return f"this needs the package {package}; install it with: pip install 'd2zero[{EXTRAS.get(package, 'train')}]'"


def optional(name: str) -> Any:
    """Import a package that not every installation has.

    Raises:
        D2ZeroError: It is not installed; names the extra that installs it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != name.split(".")[0]:  # the package is there, and lacks one of its own
            raise
        raise D2ZeroError(missing_package(name)) from error
