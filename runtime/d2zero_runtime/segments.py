"""What a network found in an image before anything has a name: `Segmenter.segment` makes it, `Segmenter.name` reads it.

Masks do not depend on classes; only a small classifier compares the queries with them. So an image that was segmented
once can be named again and again, with other words, without its network.

Letters: Q queries, K classes, C hidden channels.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.images import Size
from d2zero_runtime.masks.queries import KeptMasks
from d2zero_runtime.masks.rle import RLE


@dataclass(frozen=True, eq=False, repr=False)
class Segments:
    """All queries of one image, each with its mask, and none with a name.

    Args:
        queries: (Q, C) float32 features.
        background: (C,) float32, the mean mask feature of what no query claims, L2-normalised.
        boxes: (Q, 4) float32, x1, y1, x2, y2 in pixels of the image, x2 and y2 exclusive; zeros for an empty mask.
        qualities: (Q,) float32, the mean sigmoid inside each mask, a factor of every score.
        masks: Q masks as COCO run lengths, at the size of the image.
        image_size: (height, width).
        model: The identity of the model (`ModelContract.identity`); only the same can name them.
        embeddings: (K, D) float32, the classes that the network itself has compared the queries with.
        class_logits: (Q, K + 1) float32, what came of it.
    """

    queries: NDArray[np.float32]
    background: NDArray[np.float32]
    boxes: NDArray[np.float32]
    qualities: NDArray[np.float32]
    masks: tuple[RLE, ...]
    image_size: Size
    model: str
    embeddings: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    class_logits: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        height, width = self.image_size
        return f"<Segments: {len(self)} queries in {height}x{width} pixels>"

    @property
    def of_queries(self) -> KeptMasks:
        """The masks as post-processing takes them."""
        return KeptMasks(self.boxes, self.qualities, [mask["counts"] for mask in self.masks], self.image_size)
