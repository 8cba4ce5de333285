"""Every array of a file accounted for: none missing, none left over, none of another shape."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated


def check_compatible(
    what: str, wanted: Mapping[str, Tensor], arrays: Mapping[str, Tensor], unexpected: Sequence[str] = ()
) -> None:
    """Refuse arrays that do not fit a state to the last one.

    Args:
        what: Begins the error, such as `the checkpoint does not fit the model`.
        wanted: The state to be filled.
        arrays: What a file holds, under the state's names.
        unexpected: Names in the file that could not be translated.

    Raises:
        D2ZeroError: Lists each array that is missing, unexpected or misshapen.
    """
    misshapen = [
        f"{name} {tuple(array.shape)} instead of {tuple(wanted[name].shape)}"
        for name, array in arrays.items()
        if name in wanted and array.shape != wanted[name].shape
    ]
    groups = (
        ("missing", [name for name in wanted if name not in arrays]),
        ("unexpected", [*unexpected, *(name for name in arrays if name not in wanted)]),
        ("misshapen", misshapen),
    )
    problems = [f"{len(names)} {kind}: {join_truncated(names)}" for kind, names in groups if names]
    if problems:
        raise D2ZeroError(f"{what}; {'; '.join(problems)}")
