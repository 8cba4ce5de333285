"""Is an exported file the same model as its checkpoint?

Raw tensors (batches, sizes, class counts, the classifier by itself), the decoder's attention masks, instances as sets,
and accuracy on seen and unseen classes. What may differ depends on the file's precision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from d2zero.data.coco import CocoFile
from d2zero.evaluation.metrics import metrics_of
from d2zero.evaluation.run import EvaluationRun, Progress, require_images
from d2zero.model import D2Zero
from d2zero_export.end_to_end_parity import open_end_to_end, runtime_detections
from d2zero_export.instances import InstanceAgreement, instance_agreement
from d2zero_export.parity import LIMITS, Difference, Limits, RawParity, alike, difference, drawn_image, partly_padded
from d2zero_export.same_attention import CLASSES, same_attention
from d2zero_runtime import D2ZeroError, Mode, Segmenter, Vocabulary, load, read_image
from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.artifacts.onnx import read_contract
from d2zero_runtime.artifacts.profile import Shape
from d2zero_runtime.segmenter import RawOutput
from d2zero_runtime.vocabulary import random_embeddings


@dataclass(frozen=True)
class Verification:
    """All that was compared, and what of it failed.

    Args:
        parity: Raw outputs.
        attention_flipped: Share of attention-mask bits that the checkpoint would have set otherwise, by ONNX Runtime on
            a CPU; None if the file is no .onnx, or does not name its masks.
        instances: As sets.
        accuracy: By mode and metric, of checkpoint and file, in percent.
        limits: What may differ.
        failures: What exceeds them.
    """

    parity: RawParity
    attention_flipped: float | None
    instances: InstanceAgreement
    accuracy: dict[str, dict[str, tuple[float, float]]]
    limits: Limits
    failures: tuple[str, ...]


def verify(
    model: D2Zero,
    exported: Path,
    *,
    images: Sequence[Path] = (),
    annotations: CocoFile | None = None,
    image_folder: Path | None = None,
    changed_limits: Mapping[str, float] | None = None,
    providers: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare an exported model with its checkpoint.

    Args:
        model: The checkpoint's.
        exported: The file.
        images: Files to compare instances on; drawn pictures without any.
        annotations: What to compare accuracy on, in every mode that the vocabulary allows.
        image_folder: The folder of the annotations' images.
        changed_limits: Fields of `Limits` that replace those of the backend's precision.
        providers: What runs the file.
        progress: Shows both evaluations, as `EvaluationRun.run` takes it.
    """
    if annotations and image_folder:
        require_images(annotations, image_folder)  # before minutes are spent
    if exported.suffix == ".onnx" and read_contract(exported)[0].end_to_end:
        if annotations or providers:
            raise D2ZeroError(
                f"{exported} is an end-to-end file: it is compared instance by instance, in ONNX Runtime on a CPU;"
                " leave out --annotations and --provider"
            )
        return _verify_end_to_end(model, exported, images, changed_limits or {})
    segmenter = load(exported, providers)
    model = as_exported(model, segmenter.contract)
    limits = replace(LIMITS[segmenter.precision], **(changed_limits or {}))
    parity, flipped = parity_with(model, exported, segmenter)
    reference = alike(model.segmenter(), segmenter.preprocessing, segmenter.vocabulary)
    pictures = _pictures(images)
    agreement = instance_agreement(*([run(p, score_threshold=0.0) for p in pictures] for run in (reference, segmenter)))
    accuracy = (
        _accuracy(reference, segmenter, annotations, image_folder, progress) if annotations and image_folder else {}
    )
    failures = [*parity.failures(limits), *_disagreements(agreement, limits)]
    failures += [
        f"{mode} {metric} differs by {abs(left - right):.2f} points: {left:.2f} and {right:.2f} (limit {limit})"
        for mode, metrics in accuracy.items()
        for metric, (left, right) in metrics.items()
        if abs(left - right) > (limit := limits.points_of(metric.split()[1]))
    ]
    return Verification(parity, flipped, agreement, accuracy, limits, tuple(failures))


def as_exported(model: D2Zero, contract: ModelContract) -> D2Zero:
    """A checkpoint's model with as many decoder layers as a file that was exported of it."""
    return model.with_decoder_layers(contract.decoder_layers or model.config.decoder_layers)


def _verify_end_to_end(
    model: D2Zero, exported: Path, images: Sequence[Path], changed_limits: Mapping[str, float]
) -> Verification:
    """Instances at network size, as the file gives them, against the checkpoint's there."""
    if unused := set(changed_limits) - {"matched"}:
        raise D2ZeroError(
            f"{exported} is an end-to-end file, of which instances are compared: only --min-matched limits them, got a"
            f" limit of {', '.join(sorted(unused))}"
        )
    session = open_end_to_end(exported)
    contract = session.contract
    reference = as_exported(model, contract).segmenter()
    sizes, found = contract.preprocessing, []
    for picture in _pictures(images):
        batch = np.stack([sizes.resize(picture)] * (contract.batch or 1))
        ours = runtime_detections(reference, batch, session.vocabulary, session)
        found.append((ours[0], session.found_in(batch)[0]))
    agreement = instance_agreement(*zip(*found, strict=True))
    limits = replace(LIMITS[contract.precision], **changed_limits)  # on a CPU, which computes in no other
    return Verification(RawParity(()), None, agreement, {}, limits, tuple(_disagreements(agreement, limits)))


def _pictures(images: Sequence[Path]) -> list[NDArray[np.uint8]]:
    """Photos, or drawn pictures without any."""
    drawn = (drawn_image(np.random.default_rng(number), 120, 160) for number in range(4))
    return [read_image(path) for path in images] or list(drawn)


def _disagreements(agreement: InstanceAgreement, limits: Limits) -> list[str]:
    shares = (("matched", agreement.matched), ("same_label", agreement.same_label))
    return [
        f"instances {what} {value:.4f} (limit {limits.matched})" for what, value in shares if value < limits.matched
    ]


def parity_with(model: D2Zero, exported: Path, segmenter: Segmenter) -> tuple[RawParity, float | None]:
    """Compare raw output with the file that a segmenter runs.

    Returns:
        What was compared, and of an .onnx the share of bits that differ in the decoder's attention masks.
    """
    parity = raw_parity(model.segmenter(), segmenter)
    same = same_attention(model, exported, segmenter) if exported.suffix == ".onnx" else None
    if same is None:
        return parity, None
    judges = segmenter.backend.is_reference  # else single logits are those of another library
    return replace(parity, same_attention=same.differences if judges else ()), same.flipped


def _accuracy(
    reference: Segmenter, segmenter: Segmenter, annotations: CocoFile, images: Path, progress: Progress | None
) -> dict[str, dict[str, tuple[float, float]]]:
    has_unseen = bool((~reference.vocabulary.seen).any())
    modes = list(Mode) if has_unseen else [Mode.GZSIS]
    both = []
    for candidate in (reference, segmenter):
        with TemporaryDirectory() as folder:
            run = EvaluationRun(candidate, annotations, images, Path(folder), modes, require_all=True)
            both.append(run.run(progress))
    return {
        str(mode): {
            f"{kind} {metric}": (both[0][mode][kind][metric], both[1][mode][kind][metric])
            for kind in ("segm", "bbox")
            for metric in metrics_of(Mode.GZSIS)
            if both[0][mode][kind].get(metric) is not None
        }
        for mode in modes
    }


def raw_parity(reference: Segmenter, segmenter: Segmenter) -> RawParity:
    """Compare raw output on drawn images: sizes, batches, their rows, other class counts, the classifier by itself.

    Args:
        reference: What to compare with: the checkpoint (`D2Zero.segmenter`), or the file that an engine
            was built from.
        segmenter: The one that is compared.
    """
    random = np.random.default_rng(0)
    reference, contract = alike(reference, segmenter.preprocessing, segmenter.vocabulary), segmenter.contract
    sizes = _sizes(segmenter)
    first, second, square = (drawn_image(random, *size) for size in sizes)
    flipped = square[::-1].copy()
    cases = {
        f"one image, {sizes[0][0]} x {sizes[0][1]}": [first],
        f"one image, {sizes[1][0]} x {sizes[1][1]}": [second],
        "a batch of three equal sizes": [square, flipped, square],
        "a list of three sizes": [first, second, square],
    }
    found = [
        _difference(case, reference.predict_raw(images), segmenter.predict_raw(images))
        for case, images in cases.items()
    ]
    found += _batch_against_single(segmenter, square, flipped)
    for count in _class_counts(segmenter):
        found.append(_with_classes(reference, segmenter, _random_classes(random, count, segmenter), square))
    if contract.query_dim:
        own = reference.contract.baked
        classes = reference.vocabulary if own else _random_classes(random, CLASSES, segmenter)
        found.append(_classifier(reference, segmenter, classes, square))
    return RawParity(tuple(found))


def _sizes(segmenter: Segmenter) -> tuple[tuple[int, int], ...]:
    """Heights and widths to compare at; none but the last is the size that was traced."""
    if segmenter.preprocessing.static_size:
        height, width = segmenter.preprocessing.static_size
        return (height, width), partly_padded(height, width), (height // 2, width)
    low, high = _range(segmenter)
    return tuple(
        (min(max(height, low.height), high.height), min(max(width, low.width), high.width))
        for height, width in ((96, 160), (150, 90), (64, 64))
    )


def _class_counts(segmenter: Segmenter) -> list[int]:
    """Numbers of classes to compare at; none where they are constants."""
    if segmenter.contract.baked:
        return []
    low, high = _range(segmenter)
    counts = (1, 7, len(segmenter.vocabulary) + 5)
    return sorted({min(max(count, low.classes), high.classes) for count in counts})


def _random_classes(random: np.random.Generator, count: int, segmenter: Segmenter) -> Vocabulary:
    rows = random_embeddings(random, count, segmenter.vocabulary)
    return Vocabulary(tuple(f"class {number}" for number in range(count)), rows)


def _range(segmenter: Segmenter) -> tuple[Shape, Shape]:
    """Smallest and largest shape that can be run."""
    if segmenter.backend.profile:
        return segmenter.backend.profile.min, segmenter.backend.profile.max
    return Shape(1, 32, 32, 1), Shape(1024, 8192, 8192, 100_000)


def _batch_against_single(segmenter: Segmenter, one: NDArray[np.uint8], other: NDArray[np.uint8]) -> list[Difference]:
    """The exported model against itself: equal rows of a batch, and a batch against its images one by one."""
    together = segmenter.predict_raw([one, other, one])
    alone = [segmenter.predict_raw([image]) for image in (one, other)]
    rows = [RawOutput(together.class_logits[i : i + 1], together.mask_logits[i : i + 1], ()) for i in range(3)]
    return [
        _difference("equal rows of a batch", rows[0], rows[2]),
        _difference("a batch against its first image by itself", alone[0], rows[0]),
        _difference("a batch against its second image by itself", alone[1], rows[1]),
    ]


def _with_classes(
    reference: Segmenter, segmenter: Segmenter, classes: Vocabulary, image: NDArray[np.uint8]
) -> Difference:
    both = (_raw_with(candidate, classes, image) for candidate in (reference, segmenter))
    return _difference(f"{len(classes)} other classes", *both)


def _classifier(
    reference: Segmenter, segmenter: Segmenter, classes: Vocabulary, image: NDArray[np.uint8]
) -> Difference:
    """The file's classifier, on the features that its network hands over, against the reference's whole network."""
    contract = segmenter.contract
    padded = segmenter.preprocessing.padded_size(image.shape[:2])
    batch = segmenter.input_of([image] * (contract.batch or 1), padded)
    raw = segmenter.backend.run(batch, None if contract.baked else segmenter.vocabulary.embeddings).first(1)
    class_logits = segmenter.classifier.run(raw.queries, raw.background, classes.embeddings)
    expected = _raw_with(reference, classes, image)
    case = f"the classifier by itself, {len(classes)} classes"
    return _difference(case, expected, replace(expected, class_logits=class_logits))  # which makes no masks


def _raw_with(segmenter: Segmenter, classes: Vocabulary, image: NDArray[np.uint8]) -> RawOutput:
    """A segmenter's raw output with other classes, which it then forgets."""
    before = segmenter.vocabulary
    try:
        segmenter.set_vocabulary(replace(classes, source=before.source))
        return segmenter.predict_raw([image])
    finally:
        segmenter.set_vocabulary(before)


def _difference(case: str, ours: RawOutput, theirs: RawOutput) -> Difference:
    return difference(case, *((out.class_logits, out.to_numpy().mask_logits) for out in (ours, theirs)))
