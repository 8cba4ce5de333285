"""The implementations of deformable attention by name, and which of them is fastest where."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum

import torch

from d2zero.model.deformable.operator import triton_sample
from d2zero.model.deformable.sampling import DeformableFunction, embedding_bag, gather, grid_sample
from d2zero.model.triton_launch import has_triton
from d2zero_runtime import D2ZeroError


class DeformableImpl(StrEnum):
    """How deformable attention is computed; results are equal.

    The values are what flags, configurations and the contract of an exported model say. `grid_sample` is accepted for
    `gridsample`.
    """

    GRID_SAMPLE = "gridsample"
    GATHER = "gather"
    EMBEDDING_BAG = "embedding_bag"
    TRITON = "triton"

    @classmethod
    def _missing_(cls, value: object) -> "DeformableImpl | None":
        return cls.GRID_SAMPLE if value == "grid_sample" else None

    @classmethod
    def parse(cls, name: str, choices: Sequence["DeformableImpl"], expected: str) -> "DeformableImpl":
        """The implementation of that name.

        Args:
            name: In any accepted spelling.
            choices: Those that are allowed here.
            expected: How the error begins, such as `deformable must be one of`; the choices follow.

        Raises:
            D2ZeroError: It is not one of the choices.
        """
        with suppress(ValueError):
            if (found := cls(name)) in choices:
                return found
        raise D2ZeroError(f"{expected} {', '.join(choices)}, got {name!r}")


FUNCTIONS: Mapping[DeformableImpl, DeformableFunction] = {
    DeformableImpl.GRID_SAMPLE: grid_sample,
    DeformableImpl.GATHER: gather,
    DeformableImpl.EMBEDDING_BAG: embedding_bag,
    DeformableImpl.TRITON: triton_sample,
}


def best_impl(device: torch.device | str, gradients: bool) -> DeformableImpl:
    """The fastest on a device: our Triton kernel on a GPU, where Triton is; on a CPU, without and with gradients."""
    if torch.device(device).type == "cuda" and has_triton():
        return DeformableImpl.TRITON
    return DeformableImpl.GRID_SAMPLE if gradients else DeformableImpl.EMBEDDING_BAG
