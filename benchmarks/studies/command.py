"""How every study ends."""

import sys
from collections.abc import Callable

from d2zero_runtime import D2ZeroError


def exit_code(study: Callable[[], int | None]) -> int:
    """Run a study: its own code, 2 with one line for what the user can fix, 130 when interrupted."""
    try:
        return study() or 0
    except (D2ZeroError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
