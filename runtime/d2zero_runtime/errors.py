"""The one error type for mistakes that a person can mend.

Raised with a single line that says what was expected, what came, and what to do. The command prints
that line and exits with 2; library users can catch it as the `ValueError` that it is.
"""

from collections.abc import Iterable


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
