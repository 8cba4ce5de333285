"""The published form of the model, with equal outputs: what the accelerations are compared with.

Deformable attention by torch's grid_sample; all ten heads classified, each with its masks at
full resolution; every one of the top instances' masks upsampled as a dense map, to the padded size, then to the
output; sigmoids of whole maps; run lengths by pycocotools. No code of the published implementation is here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from d2zero.model import D2Zero
from d2zero.model.deformable import LevelSizes
from d2zero.model.inference import TorchBackend
from d2zero_runtime import D2ZeroError, Detections, Mode, Segmenter, Vocabulary
from d2zero_runtime.images import Size
from d2zero_runtime.masks import rle
from d2zero_runtime.masks.postprocess import MAX_DETECTIONS, ModeName, class_probabilities, selection, top_instances
from d2zero_runtime.segmenter import RawOutput


class PublishedSegmenter(Segmenter):
    """A segmenter that classifies all heads, and whose post-processing is the published one."""

    def __init__(self, model: D2Zero) -> None:
        model.set_deformable(published_sampling)
        backend = TorchBackend(model, all_heads=True)
        backend.name = f"{backend.name}, published form"
        super().__init__(backend, model.contract(), model.vocabulary)
        self._device = model.class_embeddings.device

    def postprocess(
        self,
        out: RawOutput,
        input_sizes: Sequence[Size],
        output_sizes: Sequence[Size],
        mode: Mode | ModeName = Mode.GZSIS,
        **options: Any,
    ) -> list[Detections]:
        """Turn raw output into instances; see `Segmenter.postprocess`."""
        if options.get("masks", "rle") != "rle" or self.vocabulary.synonyms:
            raise D2ZeroError("the published variant has only run lengths, and no synonyms")
        mode = Mode.parse(mode) if isinstance(mode, str) else mode
        return [
            self._instances(
                out.class_logits[row],
                self._there(out.mask_logits[row][:, : padded[0] // 4, : padded[1] // 4]),
                (padded, input_sizes[row], output_sizes[row]),
                mode,
                **{key: value for key, value in options.items() if key not in ("masks", "threads")},
            )
            for row, padded in enumerate(out.padded_sizes)
        ]

    def _there(self, logits: NDArray[np.float32] | Tensor) -> Tensor:
        return torch.as_tensor(logits, device=self._device)

    def _instances(
        self,
        class_logits: NDArray[np.float32],
        mask_logits_QHW: Tensor,
        sizes: tuple[Size, Size, Size],
        mode: Mode,
        max_detections: int = MAX_DETECTIONS,
        score_threshold: float = 0.0,
    ) -> Detections:
        chosen = selection(self.vocabulary, mode, max_detections)
        probabilities = class_probabilities(class_logits, chosen.competing, self.contract.softmax_temperature)
        queries, classes = top_instances(probabilities, chosen)
        masks_NHW, quality_N = dense_masks(mask_logits_QHW[torch.from_numpy(queries).to(self._device)], *sizes)
        scores = probabilities[queries, classes] * quality_N.cpu().numpy()
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= score_threshold]
        return _detections(masks_NHW.cpu().numpy()[order], scores[order], classes[order], self.vocabulary)


def published_sampling(values_BSMN: Tensor, sizes: LevelSizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention as published in plain torch: the samples of all levels joined, then weighted.

    Arguments and result as of `d2zero.model.deformable.grid_sample`, which orders the work otherwise.
    """
    batch, _, heads, width = values_BSMN.shape
    queries = locations.shape[1]
    levels = values_BSMN.split([height * width_ for height, width_ in sizes], dim=1)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # B·M, R, L, P, 2
    sampled = [
        F.grid_sample(
            level.flatten(2).transpose(1, 2).reshape(batch * heads, width, *size),
            grids[:, :, index],
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        for index, (level, size) in enumerate(zip(levels, sizes, strict=True))
    ]  # each B·M, N, R, P
    shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    attended = (torch.stack(sampled, dim=-2).flatten(-2) * shares).sum(-1)
    return attended.view(batch, heads * width, queries).transpose(1, 2)


def dense_masks(logits_NHW: Tensor, padded: Size, used: Size, output: Size) -> tuple[Tensor, Tensor]:
    """Masks (N, H, W) bool at the output size, and the mean sigmoid inside each."""
    maps = F.interpolate(logits_NHW[None], padded, mode="bilinear", align_corners=False)
    maps = maps[:, :, : used[0], : used[1]]
    maps = F.interpolate(maps, output, mode="bilinear", align_corners=False)[0]
    masks = maps > 0
    inside = (maps.sigmoid() * masks).flatten(1).sum(1)
    return masks, inside / (masks.flatten(1).sum(1) + 1e-6)


def _detections(
    masks_NHW: NDArray[np.bool_], scores: NDArray[np.float32], classes: NDArray[np.int64], vocabulary: Vocabulary
) -> Detections:
    return Detections(
        boxes=np.array([_box(mask) for mask in masks_NHW], np.float32).reshape(-1, 4),
        scores=scores.astype(np.float32),
        class_ids=classes,
        names=tuple(vocabulary.names[index] for index in classes),
        seen=vocabulary.seen[classes],
        masks=tuple(_encoded(mask) for mask in masks_NHW),
        image_size=(masks_NHW.shape[1], masks_NHW.shape[2]),
    )


def _box(mask_HW: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask_HW.any(0)), np.flatnonzero(mask_HW.any(1))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)


def _encoded(mask_HW: NDArray[np.bool_]) -> rle.RLE:
    try:
        from pycocotools import mask as coco_mask
    except ImportError:  # lent GPUs may come without; ours takes no longer
        return rle.encode(mask_HW)
    found = coco_mask.encode(np.asfortranarray(mask_HW, np.uint8))
    return {"size": [int(side) for side in found["size"]], "counts": found["counts"].decode("ascii")}
