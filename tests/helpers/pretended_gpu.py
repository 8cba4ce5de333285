"""A GPU that is not there, for eager torch: tensors that are said to be on it are on the CPU, and marked.

What fails on a GPU fails here: operations on tensors of both sides, arrays of NumPy from those of the other side. What
crosses from one side to the other is noted. Seen is what Python calls in the thread that entered the mode, not what
that calls inside, nor what a compiler makes of it.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
READS = {"item", "tolist", "nonzero", "__bool__", "__float__", "__int__", "__index__"}  # wait for the GPU
UNCONCERNED = {"backward", "detach_", "requires_grad_", "_has_compatible_shallow_copy_type", "copy_"}
MAKES_ANEW = {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}


def on_gpu(value: object) -> bool:
    """Whether a tensor is said to be there."""
    return isinstance(value, Tensor) and getattr(value, "pretended", False)


class PretendedGpu(TorchFunctionMode):
    """The mode; `uploads` and `downloads` count calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads, self.downloads = Counter[str](), Counter[str]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.__name__, dict(kwargs or {})
        if name in ("__get__", "__set__"):
            return _property(function, args)
        if name in UNCONCERNED:
            return function(*args, **kwargs)
        if name == "pin_memory":
            return args[0]
        args, kwargs, wanted = _told_to_be_on_the_cpu(name, args, kwargs)
        tensors = [entry for entry in tree_leaves((args, kwargs)) if isinstance(entry, Tensor)]
        theirs, ours = any(map(on_gpu, tensors)), any(entry.dim() and not on_gpu(entry) for entry in tensors)
        moves = name in ("to", "cpu", "cuda", "tensor", "as_tensor")
        if not moves and theirs and ours and not (name == "__getitem__" and on_gpu(args[0])):  # CPU's indices may be
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got both sides")
        if theirs and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        here = theirs if wanted is None else wanted == "cuda"
        if theirs and (name in READS or not here):
            self.downloads[name] += 1
        elif moves and here and not theirs:
            self.uploads[name] += 1
        out = function(*args, **kwargs)
        if moves and isinstance(args[0], Tensor) and out is args[0] and here != theirs:
            out = out.clone()  # the other side's is another tensor
        return tree_map_only(Tensor, lambda entry: _marked(entry, here), out)


def _marked(tensor: Tensor, there: bool) -> Tensor:
    tensor.pretended = there  # type: ignore[attr-defined]
    return tensor


def _property(function: Any, args: Any) -> Any:
    name, there = function.__self__.__name__, on_gpu(args[0])
    if name == "device" and there:
        return GPU
    if name == "is_cuda":
        return there
    out = function(*args)
    if name == "data" and len(args) > 1:
        _marked(args[0], on_gpu(args[1]))
    return _marked(out, there) if isinstance(out, Tensor) else out


def _told_to_be_on_the_cpu(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, str | None]:
    """The arguments with the CPU as device, and the kind of device that was asked for."""
    wanted = name if name in ("cpu", "cuda") else None
    if kwargs.get("device") is not None:
        wanted, kwargs["device"] = torch.device(kwargs["device"]).type, CPU
    if name == "to" or name in MAKES_ANEW:
        named = [entry for entry in args if isinstance(entry, (torch.device, str))]
        if named:
            wanted = torch.device(named[0]).type
            args = [CPU if entry is named[0] else entry for entry in args]
    return args, {key: value for key, value in kwargs.items() if key not in ("non_blocking", "pin_memory")}, wanted


def pretend(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    """Let torch say that there is a GPU; the mode is returned, not yet entered."""
    generator, autocast, optimizer = torch.Generator, torch.autocast, torch.optim.Optimizer
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())
    monkeypatch.setattr(torch, "autocast", lambda device, *args, **kwargs: autocast("cpu", *args, **kwargs))
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # old and new torch
        monkeypatch.setattr(optimizer, check, lambda self: None, raising=False)
    return PretendedGpu()
