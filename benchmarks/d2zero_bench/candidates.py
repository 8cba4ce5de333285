"""What is measured, opened: a segmenter from file to detections, stage by stage.

Letters: B batch, K classes, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2zero_bench.cases import Case
from d2zero_bench.report import NETWORK, STAGES, Accuracy, CandidateInfo, Sample
from d2zero_runtime import D2ZeroError, Mode, Segmenter, Vocabulary, load, read_image
from d2zero_runtime.formats import format_of, is_exported
from d2zero_runtime.segmenter import RawOutput
from d2zero_runtime.vocabulary import random_embeddings

VARIANTS = ("model", "published")  # of a checkpoint: as it is, or in the published form, with equal outputs
TORCH_FREE = (".onnx", ".engine")
Logits = tuple[NDArray[np.float32], NDArray[np.float32]]  # class logits (B, Q, K + 1), mask logits (B, Q, H/4, W/4)


@dataclass(frozen=True)
class Spec:
    """How to open a candidate, in whatever process.

    Args:
        name: The candidate's name, unique.
        path: The model's file; a peer has none.
        variant: A checkpoint's variant, one of `VARIANTS`.
        peer: One of `d2zero_bench.peers.PEERS`; empty for a model.
        providers: An `.onnx` file's providers.
        device: Where torch runs.
        threads: Threads of the network and of post-processing; each library's own choice if left out.
        masks: The kind of masks that post-processing makes; always `rle` for the published variant.
        queries: A peer's queries.
        classes: A peer's classes.
    """

    name: str
    path: Path | None = None
    variant: str = "model"
    peer: str = ""
    providers: tuple[str, ...] | None = None
    device: str = "auto"
    threads: int | None = None
    masks: str = "rle"
    queries: int = 100
    classes: int = 80


class Outcome(NamedTuple):
    """What one run found: milliseconds by stage and, if asked for, class and mask logits."""

    sample: Sample
    logits: Logits | None = None


class Candidate:
    """A segmenter, measured: a checkpoint's, its published form's or an exported model's.

    Raises:
        D2ZeroError: The file cannot be used.
    """

    def __init__(self, spec: Spec) -> None:
        assert spec.path is not None
        self.segmenter = open_segmenter(spec)
        self._threads, self._masks = spec.threads, "rle" if spec.variant == "published" else spec.masks
        self._own = self.segmenter.vocabulary
        self.info = CandidateInfo(
            spec.name,
            "d2zero",
            self.segmenter.backend.name,
            self.segmenter.precision,
            spec.path.stat().st_size / 1e6,
            self.segmenter.contract.num_queries,
            len(self._own),
            self.segmenter.contract.decoder_layers,
        )

    def prepare(self, case: Case) -> None:
        """Take a case's classes.

        Raises:
            D2ZeroError: The model was exported for another size or batch.
        """
        case.preprocessing(self.segmenter.preprocessing)
        static = self.segmenter.contract.batch
        if static and static != case.batch:
            raise D2ZeroError(
                f"{self.info.name} was exported for batches of {static}; measure it with --batch {static}"
            )
        self.segmenter.set_vocabulary(self._own if case.classes is None else drawn_vocabulary(self._own, case.classes))

    def run(self, case: Case, paths: Sequence[Path], with_logits: bool = False) -> Outcome:
        """Run one batch through all stages, nothing between them; then the network again if it is on a GPU."""
        segmenter, preprocessing = self.segmenter, case.preprocessing(self.segmenter.preprocessing)
        embeddings = None if segmenter.contract.baked else segmenter.vocabulary.embeddings
        marks = [perf_counter()]
        images = [read_image(path) for path in paths]
        marks.append(perf_counter())
        resized = [preprocessing.resize(image) for image in images]
        padded = preprocessing.padded_sizes(resized)
        batch = segmenter.input_of(resized, padded[0])
        marks.append(perf_counter())
        found = segmenter.backend.run(batch, embeddings)
        marks.append(perf_counter())
        sizes, outputs = ([(image.shape[0], image.shape[1]) for image in group] for group in (resized, images))
        raw = RawOutput(found.class_logits, found.mask_logits, tuple(padded))
        segmenter.postprocess(raw, sizes, outputs, masks=self._masks, threads=self._threads)
        marks.append(perf_counter())
        sample = {name: 1000 * (end - start) for name, start, end in zip(STAGES, marks, marks[1:], strict=False)}
        on_gpu = segmenter.backend.on_gpu
        sample[NETWORK] = resident_ms(segmenter.backend.resident(batch, embeddings)) if on_gpu else sample["inference"]
        # Mask logits may be on a device; they travel to another process.
        return Outcome(sample, (raw.class_logits, raw.to_numpy().mask_logits) if with_logits else None)

    def evaluate(self, annotations: Path, images: Path, limit: int | None) -> Accuracy | None:
        """Accuracy of masks in GZSIS mode, with the model's own classes and sizes, as `d2zero eval` finds it.

        Args:
            annotations: COCO JSON.
            images: The folder of its images.
            limit: Only the first so many.

        Raises:
            D2ZeroError: The annotations are of other classes, or images are missing.
        """
        from tempfile import TemporaryDirectory

        from d2zero.cli.terminal import tracked
        from d2zero.data.coco import read_coco
        from d2zero.evaluation.metrics import metrics_of
        from d2zero.evaluation.run import EvaluationRun

        self.segmenter.set_vocabulary(self._own)
        with TemporaryDirectory() as folder:
            truth = read_coco(annotations)
            run = EvaluationRun(
                self.segmenter, truth, images, Path(folder), [Mode.GZSIS], limit=limit, require_all=True
            )
            label = f"accuracy of {self.info.name}"
            summary = run.run(lambda items, length, _: tracked(items, length, label))[Mode.GZSIS]
        metrics = {name: summary["segm"].get(name) for name in metrics_of(Mode.GZSIS)}
        return Accuracy(self.info.name, str(Mode.GZSIS), summary["images"], metrics)


def open_segmenter(spec: Spec) -> Segmenter:
    """The segmenter of a file and a variant, with its threads; torch is imported only where it is used."""
    assert spec.path is not None
    if spec.threads and spec.path.suffix not in TORCH_FREE:
        limit_torch_threads(spec.threads)
    if is_exported(spec.path):
        if spec.path.suffix == ".pt2":
            import_module("d2zero.model.operators")  # which it may call, installed or not
        threads = spec.threads if format_of(spec.path).takes_threads else None
        return load(spec.path, spec.providers, threads=threads)
    from d2zero.checkpoints.files import load_model
    from d2zero.devices import pick_device

    model = load_model(spec.path, pick_device(spec.device))
    if spec.variant == "model":
        return model.segmenter()
    from d2zero_bench.published import PublishedSegmenter

    return PublishedSegmenter(model)


def limit_torch_threads(threads: int) -> None:
    """Limit torch's threads in this process."""
    import torch

    torch.set_num_threads(threads)


def resident_ms(run_once: Callable[[], None]) -> float:
    """Milliseconds of a network on a GPU, after a run that is not timed: uploads have ended, its clock is up."""
    run_once()
    return elapsed_ms(run_once)


def elapsed_ms(run_once: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    started = perf_counter()
    run_once()
    return 1000 * (perf_counter() - started)


def drawn_vocabulary(own: Vocabulary, classes: int) -> Vocabulary:
    """So many random classes of the model's text width; every fourth is unseen."""
    rows = random_embeddings(np.random.default_rng(0), classes, own)
    names = tuple(f"class {number}" for number in range(classes))
    return Vocabulary(names, rows, seen=np.arange(classes) % 4 != 3, source=own.source)
