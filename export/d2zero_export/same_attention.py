"""A file and its checkpoint while both attend by the file's masks: only so can all single logits be compared.

Where each attends by its own masks, rounding flips a few of their bits, and queries that then look elsewhere differ by
far more than rounding (docs/decisions/0024). Masks depend on pixels only, so the classes may be any.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2zero.model import D2Zero
from d2zero.model.decoder import attention_masks
from d2zero_export.graph import ATTENTION_MASK
from d2zero_export.parity import Difference, difference, drawn_image, partly_padded
from d2zero_runtime import Segmenter
from d2zero_runtime.artifacts.contract import EMBEDDINGS_INPUT, IMAGES_INPUT
from d2zero_runtime.backends.torch_math import float32_math
from d2zero_runtime.vocabulary import random_embeddings

SIZE = (96, 160)  # height and width of the input where the file takes any
CLASSES = 9  # drawn ones


@dataclass(frozen=True)
class SameAttention:
    """What was compared.

    Args:
        differences: Of all queries.
        flipped: Share of attention-mask bits that the checkpoint would have set otherwise, layer by layer.
    """

    differences: tuple[Difference, ...]
    flipped: float


def same_attention(model: D2Zero, exported: Path, segmenter: Segmenter) -> SameAttention | None:
    """Compare a file with the model that attends by its masks: a whole image, and padded ones with other classes.

    Args:
        model: The checkpoint's, with as many decoder layers as the file.
        exported: An `.onnx` file, run by ONNX Runtime on a CPU.
        segmenter: Runs the same file.

    Returns:
        What was compared, or None if the file does not name its masks, as those of older versions.
    """
    contract, found = segmenter.contract, list[Difference]()
    session, names = _with_masks(exported)
    if len(names) != len(model.decoder.layers):
        return None
    bits = flipped = 0
    others = random_embeddings(np.random.default_rng(0), CLASSES, segmenter.vocabulary)
    for case, images, embeddings in _cases(segmenter, others):
        feeds = {IMAGES_INPUT: images} if contract.baked else {IMAGES_INPUT: images, EMBEDDINGS_INPUT: embeddings}
        class_logits, mask_logits, *more = session.run([*contract.outputs, *names], feeds)
        features, masks = more[: -len(names)], more[-len(names) :]
        ours, named, own = _reference(model, images, embeddings, masks, others)
        found.append(difference(f"{case}, same attention", ours, (class_logits, mask_logits), most=1))
        flipped += sum(int((left != right).sum()) for left, right in zip(own, masks, strict=True))
        bits += sum(mask.size for mask in masks)
        if features:
            theirs = segmenter.classifier.run(features[0], features[1], others)
            left, right = (named, ours[1]), (theirs, ours[1])  # which makes no masks
            found.append(difference(f"its classifier, {CLASSES} classes, same attention", left, right, most=1))
    return SameAttention(tuple(found), flipped / bits)


def _with_masks(exported: Path) -> tuple[Any, list[str]]:
    """A session that also hands over the attention masks, and their names in the order of layers."""
    import onnx
    import onnxruntime

    proto = onnx.load(exported)
    names = [name for node in proto.graph.node for name in node.output if name.startswith(ATTENTION_MASK)]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.BOOL, None) for n in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"]), names


def _cases(
    segmenter: Segmenter, others: NDArray[np.float32]
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """Names, input and class embeddings."""
    contract, random = segmenter.contract, np.random.default_rng(0)
    own = segmenter.vocabulary.embeddings
    height, width = contract.preprocessing.static_size or SIZE
    whole = drawn_image(random, height, width)
    part = drawn_image(random, *partly_padded(height, width))
    padded = [part, part[::-1].copy()] * (contract.batch or 2)
    for case, images, embeddings in (
        (f"one image, {height} x {width}", [whole] * (contract.batch or 1), own),
        ("padded images", padded[: contract.batch or 2], own if contract.baked else others),
    ):
        yield case, contract.preprocessing.batch(images, (height, width)), embeddings


def _reference(
    model: D2Zero,
    images: NDArray[np.float32],
    embeddings: NDArray[np.float32],
    masks: list[NDArray[np.bool_]],
    others: NDArray[np.float32],
) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32], list[NDArray[np.bool_]]]:
    """What the model makes when it attends by some masks.

    Returns:
        Class and mask logits, class logits for other classes, and the attention masks that it would have made there.
    """
    device = model.class_embeddings.device
    exact = float32_math(torch, tf32=False) if device.type == "cuda" else nullcontext()
    with torch.inference_mode(), exact:
        pixels, text, more = (torch.tensor(array, device=device) for array in (images, embeddings, others))
        given = [torch.from_numpy(mask).to(device) for mask in masks]
        heads = model(pixels, text, all_heads=True, attention_masks=given)
        own = attention_masks([head.mask_logits for head in heads], (images.shape[2], images.shape[3]))
        last = heads[-1]
        named = model.classifier(last.queries, last.background, more)
    class_logits, mask_logits, of_others, *flags = (
        tensor.cpu().numpy() for tensor in (last.class_logits, last.mask_logits, named, *own)
    )
    return (class_logits, mask_logits), of_others, flags
