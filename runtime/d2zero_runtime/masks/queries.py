"""The masks of an image's queries, wherever they come from: made of logits on request, or kept as run lengths.

Letters: Q queries, h and w the mask logits' sides.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.images import Size
from d2zero_runtime.masks import rle
from d2zero_runtime.masks.device import DeviceLogits, MaskLogits, Sizes
from d2zero_runtime.masks.packed import PackedMasks
from d2zero_runtime.masks.upsample import Mask, resize_axis, upsampled_mask

Masks = tuple[rle.RLE, ...] | NDArray[np.bool_] | PackedMasks | None  # one for each kind of masks


class QueryMasks(ABC):
    """The masks of one image's queries.

    Args:
        size: (height, width) of the masks.
    """

    def __init__(self, size: Size) -> None:
        self.size = (int(size[0]), int(size[1]))

    @abstractmethod
    def found(self, queries: NDArray[np.int64], kind: str) -> list[Mask]:
        """Boxes, qualities and what `of_kind` needs of some queries.

        Args:
            queries: Distinct queries.
            kind: The kind of masks that will be asked for, as `postprocess` takes it.
        """

    def of_kind(self, queries: NDArray[np.int64], found: Sequence[Mask], kind: str) -> Masks:
        """Masks as `postprocess` gives a kind of masks.

        Args:
            queries: Queries, which may repeat.
            found: What `found` returned for each.
            kind: The same as there.
        """
        return as_kind(found, kind, self.size)


class LogitMasks(QueryMasks):
    """Masks that are made of logits, where those are.

    Args:
        logits: (Q, h, w) float32, covering the padded input.
        sizes: Sizes on the way to the output.
        threads: Threads that upsample and encode.
    """

    def __init__(self, logits: MaskLogits, sizes: Sizes, threads: int) -> None:
        super().__init__(sizes.output)
        self._logits, self._sizes, self._threads = logits, sizes, threads

    def found(self, queries: NDArray[np.int64], kind: str) -> list[Mask]:
        """See `QueryMasks`."""
        return upsampled(self._logits, queries, self._sizes, "none" if self._later(kind) else kind, self._threads)

    def of_kind(self, queries: NDArray[np.int64], found: Sequence[Mask], kind: str) -> Masks:
        """See `QueryMasks`."""
        logits = self._later(kind)
        if logits is None:
            return as_kind(found, kind, self.size)
        return packed_as(logits.packed(queries.tolist(), self._sizes), kind)

    def _later(self, kind: str) -> DeviceLogits | None:
        """The logits, if boxes and qualities come first and bits later, in final order: the host copies nothing."""
        if isinstance(self._logits, DeviceLogits) and self._logits.one_kernel and kind in ("packed", "bitmap"):
            return self._logits
        return None


class KeptMasks(QueryMasks):
    """Masks that were made before.

    Args:
        boxes: (Q, 4) float32, x1, y1, x2, y2 in pixels.
        qualities: (Q,) float32, mean sigmoid inside each mask.
        counts: Compressed run lengths of each mask.
        size: (height, width) of the masks.
    """

    def __init__(
        self, boxes: NDArray[np.float32], qualities: NDArray[np.float32], counts: Sequence[str], size: Size
    ) -> None:
        super().__init__(size)
        self._boxes, self._qualities, self._counts = boxes, qualities, counts

    def found(self, queries: NDArray[np.int64], kind: str) -> list[Mask]:
        """See `QueryMasks`."""
        boxes, qualities = self._boxes[queries].tolist(), self._qualities[queries].tolist()
        height, width = self.size
        return [
            Mask({"size": [height, width], "counts": self._counts[query]}, tuple(box), quality)
            for query, box, quality in zip(queries.tolist(), boxes, qualities, strict=True)
        ]


def upsampled(mask_logits: MaskLogits, queries: NDArray[np.int64], sizes: Sizes, kind: str, threads: int) -> list[Mask]:
    """Each query's mask at the output size, made where the logits are."""
    if isinstance(mask_logits, DeviceLogits):
        return mask_logits.upsampled(queries.tolist(), sizes, kind, threads)
    rows, columns = (
        resize_axis(mask_logits.shape[1 + axis], sizes.padded[axis], sizes.used[axis], sizes.output[axis])
        for axis in (0, 1)
    )
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda query: upsampled_mask(mask_logits[query], rows, columns, kind != "none"), queries))


def as_kind(found: Sequence[Mask], kind: str, size: Size) -> Masks:
    """Masks as `postprocess` gives a kind of masks."""
    if kind == "none":
        return None
    encoded = tuple(mask.rle for mask in found if mask.rle is not None)
    if kind == "rle":
        return encoded
    if encoded or not found:
        bitmaps = np.empty((len(encoded), *size), bool)
        for bitmap, mask in zip(bitmaps, encoded, strict=True):
            bitmap[:] = rle.decode(mask)
        return bitmaps if kind == "bitmap" else PackedMasks.of(bitmaps)
    packed = PackedMasks(np.stack([mask.bits for mask in found if mask.bits is not None]), size)
    return packed_as(packed, kind)


def packed_as(packed: PackedMasks, kind: str) -> Masks:
    """Packed masks as `postprocess` gives a kind of masks."""
    if kind == "rle":
        return tuple(packed.encoded(row) for row in range(len(packed)))
    if kind == "none":
        return None
    return packed.bitmaps() if kind == "bitmap" else packed
