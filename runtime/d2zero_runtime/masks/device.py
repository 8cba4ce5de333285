"""Mask logits that stay where torch computed them, and their post-processing there, down to packed bits.

The same function as `upsample`: bilinear to the padded size, cropped, bilinear to the output size, > 0, with the mean
sigmoid inside and the tight box. Only bits, boxes and means come to the host: a hundredth of the logits' upsampled
size. On a GPU with Triton one kernel does it all (`mask_kernel`), elsewhere torch's operators. torch is imported by
whoever makes a `DeviceLogits`.

Letters: B batch, Q queries, h and w the logits' sides, N masks, H and W the output's sides.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.images import Size
from d2zero_runtime.masks.packed import PackedMasks
from d2zero_runtime.masks.upsample import Mask

CHUNK_BYTES = 1 << 29  # upsampled at a time, in steps
TILE = 8, 16  # rows and bytes of a mask that a program of the kernel makes


class DeviceLogits:
    """Mask logits on a device; indexed and sliced like an array, which they become only on request.

    Args:
        tensor: A torch tensor.
    """

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return tuple(self.tensor.shape)

    def __len__(self) -> int:
        return int(self.tensor.shape[0])

    def __getitem__(self, index: Any) -> "DeviceLogits":
        return DeviceLogits(self.tensor[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        raise TypeError("these mask logits are on a device; to_numpy() copies them")

    def to_numpy(self) -> NDArray[np.float32]:
        """Copy them to the host, as float32."""
        array: NDArray[np.float32] = self.tensor.float().cpu().numpy()
        return array

    @property
    def one_kernel(self) -> bool:
        """Whether masks are made so fast that boxes and qualities may come first and their bits later (`packed`)."""
        return bool(self.tensor.is_cuda) and _triton()

    def packed(self, queries: Sequence[int], sizes: "Sizes") -> PackedMasks:
        """The bits of some queries' masks, in page-locked memory; queries may repeat. Where there is `one_kernel`."""
        if not len(queries):
            return PackedMasks(np.zeros((0, sizes.output[0], -(-sizes.output[1] // 8)), np.uint8), sizes.output)
        return PackedMasks(_downloaded(_launched(self.tensor, queries, sizes, packed=True)[1]), sizes.output)

    def upsampled(self, queries: Sequence[int], sizes: "Sizes", kind: str, threads: int) -> list[Mask]:
        """Masks of some queries of one image; `self` is (Q, h, w).

        Args:
            queries: Rows of `self`.
            sizes: Sizes on the way to the output.
            kind: The kind of masks, as `postprocess` takes it; `none` for only boxes and qualities.
            threads: Number of threads that encode run lengths.
        """
        if not len(queries):
            return []
        find = in_one_kernel if self.one_kernel else in_steps
        stats, bits = find(self.tensor, queries, sizes, kind != "none")
        measured = [(quality, (x1, y1, x2, y2)) for quality, x1, y1, x2, y2 in stats.tolist()]
        if bits is None:
            return [Mask(None, box, quality) for quality, box in measured]
        packed = PackedMasks(bits, sizes.output)
        if kind == "rle":
            with ThreadPoolExecutor(threads) as pool:
                encoded = list(pool.map(packed.encoded, range(len(packed))))
            return [Mask(code, box, quality) for (quality, box), code in zip(measured, encoded, strict=True)]
        return [Mask(None, box, quality, row) for (quality, box), row in zip(measured, packed.bits, strict=True)]


MaskLogits = NDArray[np.float32] | DeviceLogits


def mask_logits_of(values: Any) -> MaskLogits:
    """Mask logits as given by a user: an array, or a torch tensor on any device."""
    if isinstance(values, (np.ndarray, DeviceLogits)):
        return values
    return DeviceLogits(values) if values.is_cuda else DeviceLogits(values.detach()).to_numpy()


def concatenated(parts: Sequence[MaskLogits]) -> MaskLogits:
    """Mask logits of one batch after another, on the device that they are on."""
    tensors = [part.tensor for part in parts if isinstance(part, DeviceLogits)]
    if not tensors:
        return np.concatenate([part for part in parts if not isinstance(part, DeviceLogits)])
    import torch

    return DeviceLogits(torch.cat(tensors))


def stacked(parts: Sequence[tuple[Sequence[int], MaskLogits]], shape: tuple[int, ...], padding: float) -> MaskLogits:
    """Mask logits of several groups of images as one, (B, Q, h, w), on the device that they are on.

    Args:
        parts: Each group's rows in the result, and its logits, (rows, Q, at most h, at most w).
        shape: The shape of the result.
        padding: The value right of and below a group's own.
    """
    first = parts[0][1]
    if len(parts) == 1 and tuple(first.shape) == shape and list(parts[0][0]) == list(range(shape[0])):
        return first
    whole: Any = (
        first.tensor.new_full(shape, padding)
        if isinstance(first, DeviceLogits)
        else np.full(shape, padding, np.float32)
    )
    for rows, logits in parts:
        values = logits.tensor if isinstance(logits, DeviceLogits) else logits
        whole[list(rows), :, : values.shape[2], : values.shape[3]] = values
    return DeviceLogits(whole) if isinstance(first, DeviceLogits) else whole


@dataclass(frozen=True)
class Sizes:
    """(height, width) on the way from mask logits to masks.

    Args:
        padded: Size of the network's input.
        used: Size of the image in it.
        output: Size of the masks.
    """

    padded: Size
    used: Size
    output: Size


def _area(size: Size) -> int:
    return size[0] * size[1]


# Figures of masks (N, 5), quality and box, and their bits (N, H, ceil(W / 8)) if they are wanted, on the host.
Found = tuple[NDArray[np.float32], NDArray[np.uint8] | None]


@lru_cache(maxsize=1)
def _triton() -> bool:
    return find_spec("triton") is not None


def in_one_kernel(logits_Qhw: Any, queries: Sequence[int], sizes: Sizes, packed: bool) -> Found:
    """By our Triton kernel: what is in memory is logits and bits."""
    import torch

    stats, bits = _launched(logits_Qhw, queries, sizes, packed)
    area, sigmoids = stats[..., :2].double().sum(1).unbind(1)
    ends = stats[..., 4:].amax(1)
    first = torch.where(ends > 0, stats[..., 2:4].amin(1), 0.0)
    quality = (sigmoids / (area + 1e-6)).float()
    table = _downloaded(torch.cat([quality[:, None], first, ends], 1))
    return table, _downloaded(bits) if packed else None


def _launched(logits_Qhw: Any, queries: Sequence[int], sizes: Sizes, packed: bool) -> tuple[Any, Any]:
    """What the kernel writes, on the device: stats of each mask's tiles, and bits if they are wanted."""
    import torch

    from d2zero_runtime.masks.kernel import STATS, mask_kernel

    if logits_Qhw.stride(2) != 1:
        logits_Qhw = logits_Qhw.contiguous()
    height, width = logits_Qhw.shape[1:]
    out_height, out_width = sizes.output
    row_bytes = -(-out_width // 8)
    tiles = -(-row_bytes // TILE[1]), -(-out_height // TILE[0])
    chosen = torch.tensor(list(queries), device=logits_Qhw.device)
    bits = chosen.new_empty((len(chosen), out_height, row_bytes) if packed else (1,), dtype=torch.uint8)
    stats = chosen.new_empty((len(chosen), tiles[0] * tiles[1], STATS.value), dtype=torch.float32)
    with torch.cuda.device_of(logits_Qhw):
        mask_kernel[(*tiles, len(chosen))](
            logits_Qhw, chosen, bits, stats, *logits_Qhw.stride()[:2], height, width,
            height / sizes.padded[0], width / sizes.padded[1], *sizes.used,
            sizes.used[0] / out_height, sizes.used[1] / out_width, out_height, out_width,
            RESIZED=tuple(sizes.used) != tuple(sizes.output), PACKED=packed, ROWS=TILE[0], BYTES=TILE[1],
        )  # fmt: skip
    return stats, bits


def _downloaded(tensor: Any) -> NDArray[Any]:
    """On the host; from a GPU into page-locked memory, several times as fast as into any other."""
    import torch

    here = tensor
    if tensor.is_cuda:
        here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        here.copy_(tensor)
    array: NDArray[Any] = here.numpy()
    return array


def in_steps(logits_Qhw: Any, queries: Sequence[int], sizes: Sizes, packed: bool) -> Found:
    """By torch's operators, some masks at a time."""
    step = max(1, CHUNK_BYTES // (4 * max(_area(sizes.padded), _area(sizes.output))))
    parts = [_in_steps(logits, sizes, packed) for logits in logits_Qhw[list(queries)].split(step)]
    bits = np.concatenate([part[1] for part in parts if part[1] is not None]) if packed else None
    return np.concatenate([part[0] for part in parts]), bits


def _in_steps(logits_Nhw: Any, sizes: Sizes, packed: bool) -> Found:
    maps = _resized(_resized(logits_Nhw.float(), sizes.padded)[:, : sizes.used[0], : sizes.used[1]], sizes.output)
    inside = maps > 0
    area = inside.sum((1, 2))
    quality = (maps.sigmoid_() * inside).sum((1, 2)) / (area + 1e-6)
    return _stacked([quality, *_box(inside)]), _packed(inside).cpu().numpy() if packed else None


def _resized(maps_NHW: Any, size: Size) -> Any:
    if tuple(maps_NHW.shape[1:]) == tuple(size):
        return maps_NHW
    from torch.nn.functional import interpolate

    return interpolate(maps_NHW[None], size, mode="bilinear", align_corners=False)[0]


def _box(inside_NHW: Any) -> list[Any]:
    """x1, y1, x2, y2 of each mask, x2 and y2 exclusive; zeros for an empty one."""
    sides = []
    for used in (inside_NHW.any(1), inside_NHW.any(2)):  # columns, rows
        flags = used.int()
        sides.append((flags.argmax(1), (used.shape[1] - flags.flip(1).argmax(1)) * flags.amax(1)))
    (x1, x2), (y1, y2) = sides
    return [x1, y1, x2, y2]


def _stacked(columns: Sequence[Any]) -> NDArray[np.float32]:
    """Columns as one array on the host: one copy, one wait."""
    first = columns[0]
    table = first.new_empty((len(first), len(columns)))
    for place, column in enumerate(columns):
        table[:, place] = column
    array: NDArray[np.float32] = table.cpu().numpy()
    return array


def _packed(inside_NHW: Any) -> Any:
    """Eight pixels of a row in a byte, as `numpy.packbits` has them."""
    from torch.nn.functional import pad

    width = inside_NHW.shape[2]
    whole = pad(inside_NHW, (0, -width % 8)).unflatten(2, (-1, 8))
    packed = whole[..., 0].byte() << 7
    for bit in range(1, 8):
        packed |= whole[..., bit].byte() << (7 - bit)
    return packed
