"""Which device torch runs on."""

import torch

from d2zero_runtime import D2ZeroError


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name, or the best there is for `auto`.

    Raises:
        D2ZeroError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise D2ZeroError(f"device must be auto, cpu or cuda[:N], got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise D2ZeroError(f"device must be auto, cpu or cuda[:N], got {name!r}")
    if name == "cuda":
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise D2ZeroError(f"device {name} asked for, but torch sees no GPU here; use --device cpu")
    return device
