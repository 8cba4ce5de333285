"""Is an exported file the same model as its checkpoint? Raw tensors, batches, sizes, class counts."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from d2zero.model import D2Zero
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.segmenter import Segmenter


@dataclass(frozen=True)
class Difference:
    """One comparison: largest absolute differences, and the share of mask pixels that flip."""

    case: str
    class_logits: float
    mask_logits: float
    flipped: float


@dataclass(frozen=True)
class RawParity:
    """What was compared."""

    differences: tuple[Difference, ...]

    def require(self, tolerance: float) -> None:
        """Pass, or name the tensor, the value and the limit.

        Raises:
            D2ZeroError: a difference exceeds the tolerance, or is no number.
        """
        for entry in self.differences:
            for tensor in ("class_logits", "mask_logits"):
                value = getattr(entry, tensor)
                if not value <= tolerance:
                    raise D2ZeroError(
                        f"the exported model differs from the checkpoint: {tensor} by {value:.2e}"
                        f" (limit {tolerance:.0e}) for {entry.case}; the file was not written"
                    )


def raw_parity(model: D2Zero, segmenter: Segmenter) -> RawParity:
    """Compare raw output on drawn images: a batch, its images alone, other sizes, other class counts."""
    random = np.random.default_rng(0)
    wide, tall, square = (_drawn(random, *size) for size in ((96, 160), (150, 90), (64, 64)))
    own = model.vocabulary
    found = [
        _compare("one image, 96 x 160", model, segmenter, [wide]),
        _compare("one image, 150 x 90", model, segmenter, [tall]),
        _compare("a batch of three equal sizes", model, segmenter, [square, square[::-1].copy(), square]),
        _compare("a list of three sizes", model, segmenter, [wide, tall, square]),
    ]
    for count in (1, 7, len(own) + 5):
        rows = random.standard_normal((count, own.width)).astype(np.float32)
        words = Vocabulary(tuple(f"class {i}" for i in range(count)), rows)
        found.append(_compare(f"{count} other classes", model, segmenter, [square], words))
    return RawParity(tuple(found))


def _compare(
    case: str,
    model: D2Zero,
    segmenter: Segmenter,
    images: list[NDArray[np.uint8]],
    words: Vocabulary | None = None,
) -> Difference:
    before = model.vocabulary, segmenter.vocabulary
    if words is not None:
        model.set_vocabulary(replace(words, source=before[0].source))
        segmenter.set_vocabulary(replace(words, source=before[1].source))
    try:
        ours, theirs = model.predict_raw(images), segmenter.predict_raw(images)
    finally:
        model.set_vocabulary(before[0])
        segmenter.set_vocabulary(before[1])
    masks = ours.mask_logits.numpy()
    return Difference(
        case,
        class_logits=float(np.abs(ours.class_logits.numpy() - theirs.class_logits).max()),
        mask_logits=float(np.abs(masks - theirs.mask_logits).max()),
        flipped=float(((masks > 0) != (theirs.mask_logits > 0)).mean()),
    )


def _drawn(random: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A picture with structure: coarse blocks of colour and some noise."""
    blocks = random.integers(0, 256, (-(-height // 16), -(-width // 16), 3)).repeat(16, 0).repeat(16, 1)
    noisy = blocks[:height, :width] + random.normal(0, 10, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)
