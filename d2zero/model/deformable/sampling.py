"""The implementations of deformable attention by torch's operators; all compute the same sums.

- `grid_sample`: torch's own operator, level by level. Good with autograd, and what ONNX knows as GridSample.
- `gather`: four row gathers from the channels-last values of all levels together. Compiles well, and uses
  no operator that an inference engine might get wrong.
- `embedding_bag`: the same rows, read and summed by one operator that writes nothing but the sums. A third of
  grid_sample's time on a CPU, forward; not faster with a backward.

Letters: B batch, S = sum of the levels' H·W, M heads, N channels per head, R queries, L levels, P points.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LevelSizes = Sequence[tuple[int, int]]  # (H, W) of each level
DeformableFunction = Callable[[Tensor, LevelSizes, Tensor, Tensor], Tensor]
EXACT = 2**24  # float32 has all whole numbers up to here: rows of 16.7 million pixels
RowSum = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]


def grid_sample(values_BSMN: Tensor, sizes: LevelSizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample and add up with `torch.nn.functional.grid_sample`.

    Args:
        values_BSMN: (B, S, M, N) values of all levels, concatenated; may be of lower precision than the rest.
        sizes: (H, W) of each level.
        locations: (B, R, M, L, P, 2) x and y in 0..1 of each level's map.
        weights: (B, R, M, L, P), summing to 1 over levels and points.

    Returns:
        (B, R, M·N).
    """
    batch, total, heads, width = values_BSMN.shape
    values_GNS = values_BSMN.permute(0, 2, 3, 1).reshape(batch * heads, width, total).to(locations.dtype)
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    out_GNR = sample_levels(values_GNS, sizes, grids, weights.permute(3, 0, 2, 4, 1).flatten(1, 2))
    out: Tensor = out_GNR.view(batch, heads * width, -1).transpose(1, 2)
    return out


def sample_levels(values_GNS: Tensor, sizes: LevelSizes, grids_LGPR2: Tensor, weights_LGPR: Tensor) -> Tensor:
    """Sample and add up with the queries innermost: what follows the sampling runs along memory, not over P = 4.

    Args:
        values_GNS: Values of all levels; G = B·M.
        sizes: (H, W) of each level.
        grids_LGPR2: X and y in -1..1 of each level's map.
        weights_LGPR: Weights of the samples.

    Returns:
        (G, N, R).
    """
    maps = values_GNS.split([height * width for height, width in sizes], dim=2)
    out: Tensor | None = None
    # Weighted level by level: joined first, the samples of all levels would be written once more.
    for level, size, grid, weight in zip(maps, sizes, grids_LGPR2, weights_LGPR, strict=True):
        # `reshape` copies: a level's maps are S apart, and grid_sample wants them contiguous.
        sampled = F.grid_sample(
            level.reshape(*level.shape[:2], *size), grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        part = (sampled * weight[:, None]).sum(2)
        out = part if out is None else out + part
    assert out is not None, "at least one level"
    return out


def gather(values_BSMN: Tensor, sizes: LevelSizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample and add up with row gathers; arguments and result as in `grid_sample`."""
    return sum_rows(values_BSMN, _corners_at(sizes, locations, weights), _gathered)


def embedding_bag(values_BSMN: Tensor, sizes: LevelSizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample and add up with `torch.nn.functional.embedding_bag`; arguments and result as in `grid_sample`."""
    return sum_rows(values_BSMN, _corners_at(sizes, locations, weights), _bagged)


class Corners(NamedTuple):
    """The four pixels around each sample: rows of a head's (S) values, and their weights, (B, M, R, L·P) each."""

    rows: tuple[Tensor, ...]  # whole numbers, as floats
    weights: tuple[Tensor, ...]  # bilinear times the sample's own


class SampleLevels(NamedTuple):
    """Of each sample's level, the first row, H and W: (L·P) each."""

    first: Tensor
    height: Tensor
    width: Tensor


def corners(levels: SampleLevels, x: Tensor, y: Tensor, weights: Tensor) -> Corners:
    """Find them.

    Args:
        levels: The samples' levels.
        x: (B, M, R, L·P), pixels from the first one's centre, in the map of the sample's level.
        y: The same.
        weights: The samples' weights, of the same shape.
    """
    first, height, width = levels
    columns, weights_x = _two_pixels(x, width)
    lines, weights_y = _two_pixels(y, height)
    starts = [line * width + first for line in lines]
    return Corners(
        rows=tuple(start + column for start in starts for column in columns),
        weights=tuple(along_y * along_x for along_y in (part * weights for part in weights_y) for along_x in weights_x),
    )


def _two_pixels(at: Tensor, extent: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The pixels before and after a place, kept inside the map, and their bilinear weights: 0 for what was outside."""
    before = at.floor()
    part = at - before
    wanted = before, before + 1
    kept = [pixel.clamp(min=0).minimum(extent - 1) for pixel in wanted]
    inside = [pixel == found for pixel, found in zip(wanted, kept, strict=True)]
    return kept, [(1 - part) * inside[0], part * inside[1]]


def levels_of_samples(sizes: LevelSizes, points: int, like: Tensor) -> SampleLevels:
    """Find them, for P samples per level, of the type and on the device of `like`."""
    starts = torch.tensor([0, *(height * width for height, width in sizes)][:-1], device=like.device).cumsum(0)
    heights, widths = torch.tensor([list(size) for size in sizes], device=like.device).unbind(1)
    columns = (starts, heights, widths)
    return SampleLevels(*(values.to(like.dtype)[:, None].expand(-1, points).reshape(-1) for values in columns))


def _corners_at(sizes: LevelSizes, locations: Tensor, weights: Tensor) -> Corners:
    levels = levels_of_samples(sizes, locations.shape[4], locations)
    x, y, weights = (part.transpose(1, 2).flatten(3) for part in (*locations.unbind(-1), weights))
    return corners(levels, x * levels.width - 0.5, y * levels.height - 0.5, weights)


# Sums of rows of a table (T, N), by rows and weights (X, J) of four corners: (X, N).


def _gathered(table_TN: Tensor, rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    parts = (
        weight[:, None].to(table_TN.dtype) @ F.embedding(row, table_TN)
        for row, weight in zip(rows, weights, strict=True)
    )
    return reduce(torch.add, parts).squeeze(1)


def _bagged(table_TN: Tensor, rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    found: Tensor = F.embedding_bag(
        torch.cat(list(rows), 1), table_TN.float(), mode="sum", per_sample_weights=torch.cat(list(weights), 1)
    )
    return found


ROW_SUMS: dict[DeformableFunction, RowSum] = {gather: _gathered, embedding_bag: _bagged}


def sum_rows(
    values_BSMN: Tensor,
    found: Corners,
    add: RowSum,
) -> Tensor:
    """(B, R, M·N) from the values and the corners of the samples.

    Head by head: a head's values stay in the processor's cache while its queries read them.
    """
    batch, total, heads, width = values_BSMN.shape
    rows = [_table_rows(row, total).flatten(0, 2) for row in found.rows]
    table_TN = values_BSMN.transpose(1, 2).flatten(0, 2)
    added = add(table_TN, rows, [weight.flatten(0, 2) for weight in found.weights])
    return added.view(batch, heads, -1, width).transpose(1, 2).flatten(2)


def _table_rows(row: Tensor, total: int) -> Tensor:
    """Rows of a head's S = `total` values (B, M, …) as rows of the table of all heads of all images, int32.

    What is not a number becomes a number far below 0, and then a row that there is.
    """
    batch, heads = row.shape[:2]
    head = torch.arange(batch * heads, device=row.device).view(batch, heads, 1, 1) * total
    known = batch * heads * total
    if isinstance(known, int) and known <= EXACT:  # a pass over memory less
        return (row + head.to(row.dtype)).int().clamp(min=0)
    return row.int().clamp(min=0) + head.int()
