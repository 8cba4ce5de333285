"""What is measured, opened: a model from file to detections, stage by stage, or a peer's network.

Letters: B batch, K classes, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from d2zero_bench.cases import Case
from d2zero_bench.memory import gpu_peak_mb, host_peak_mb, reset_gpu_peak, reset_host_peak
from d2zero_bench.peers import PEERS, PeerNetwork, mask2former_config
from d2zero_bench.report import NETWORK, STAGES, Accuracy, CandidateInfo, Sample
from d2zero_bench.variants import VARIANTS
from d2zero_runtime import D2ZeroError, Segmenter, Vocabulary, load, read_image
from d2zero_runtime.backends.base import Raw
from d2zero_runtime.formats import EXPORTED_SUFFIXES
from d2zero_runtime.segmenter import RawOutput

TORCH_FREE = (".onnx", ".engine")


@dataclass(frozen=True)
class Spec:
    """How to open a candidate, in whatever process.

    Args:
        name: unique.
        path: of a model; a peer has none.
        variant: of a checkpoint, one of `VARIANTS`.
        peer: one of `PEERS`.
        providers: of an `.onnx`.
        device: of what torch runs.
        threads: of the network and of post-processing; each library's own choice if left out.
        masks: kind of masks that post-processing makes, as of `d2zero_runtime.postprocess`; of the published variant
            always `rle`.
        queries: of a peer.
        classes: of a peer.
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


class Candidate(Protocol):
    """What is measured."""

    info: CandidateInfo

    def prepare(self, case: Case) -> None:
        """Get ready for a case and forget the last one's memory."""

    def run(self, case: Case, paths: Sequence[Path]) -> Sample:
        """One batch, from files to detections: milliseconds by stage, and of the network with resident inputs."""

    def raw(self, case: Case, paths: Sequence[Path]) -> Raw | None:
        """Class and mask logits of one batch, to compare; None of a peer."""

    def memory(self) -> tuple[float | None, float | None]:
        """Megabytes of host and GPU at most, since `prepare`."""

    def accuracy(self, annotations: Path, images: Path, limit: int | None) -> Accuracy | None:
        """Figures of masks on annotated images; None of a peer."""


def open_candidate(spec: Spec) -> Candidate:
    """Open what a spec says.

    Raises:
        D2ZeroError: a file cannot be used.
    """
    if spec.threads:
        limit_threads(spec.threads, with_torch=spec.path is None or spec.path.suffix not in TORCH_FREE)
    return Peer(spec) if spec.peer else Model(spec)


def limit_threads(threads: int, with_torch: bool) -> None:
    """Of torch, where it is used, and of post-processing; ONNX Runtime is told when it loads."""
    # By its name as a module: the package's function of the same name hides it.
    vars(import_module("d2zero_runtime.masks.postprocess"))["THREADS"] = threads
    if with_torch:
        import torch

        torch.set_num_threads(threads)


def open_model(spec: Spec) -> Segmenter:
    """A segmenter for a file and a variant."""
    assert spec.path is not None
    if spec.path.suffix not in EXPORTED_SUFFIXES:
        return VARIANTS[spec.variant](spec.path, spec.device)
    if spec.path.suffix == ".pt2":
        import_module("d2zero.model.operators")  # which it may call, installed or not
    return load(spec.path, spec.providers, threads=spec.threads)


class Model:
    """A D2Zero candidate."""

    def __init__(self, spec: Spec) -> None:
        assert spec.path is not None
        self._segmenter = open_model(spec)
        self._masks = "rle" if spec.variant == "published" else spec.masks
        self._own = self._segmenter.vocabulary
        contract = self._segmenter.contract
        self.info = CandidateInfo(
            spec.name,
            "d2zero",
            self._segmenter.backend.name,
            self._segmenter.precision,
            spec.path.stat().st_size / 1e6,
            contract.num_queries,
            len(self._own),
        )

    def prepare(self, case: Case) -> None:
        """Take the case's classes; see `Candidate`."""
        case.preprocessing(self._segmenter.preprocessing)  # refuses a size before any work
        fixed = self._segmenter.contract.batch
        if fixed and fixed != case.batch:
            raise D2ZeroError(f"{self.info.name} was exported for batches of {fixed}; measure it with --batch {fixed}")
        words = self._own if case.classes is None else drawn_vocabulary(self._own, case.classes)
        self._segmenter.set_vocabulary(words)
        reset_host_peak()
        reset_gpu_peak()

    def run(self, case: Case, paths: Sequence[Path]) -> Sample:
        """All stages, nothing between them; then the network again if a GPU runs it; see `Candidate`."""
        segmenter, preprocessing = self._segmenter, case.preprocessing(self._segmenter.preprocessing)
        marks = [perf_counter()]
        images = [read_image(path) for path in paths]
        marks.append(perf_counter())
        resized = [preprocessing.resize(image) for image in images]
        padded = preprocessing.padded_sizes(resized)
        batch = segmenter.input_of(resized, padded[0])
        marks.append(perf_counter())
        class_logits, mask_logits = segmenter.backend.run(batch, self._embeddings())
        marks.append(perf_counter())
        sizes, outputs = ([(image.shape[0], image.shape[1]) for image in group] for group in (resized, images))
        raw = RawOutput(class_logits, mask_logits, tuple(padded))
        segmenter.postprocess(raw, sizes, outputs, masks=self._masks)
        marks.append(perf_counter())
        sample = {name: 1000 * (end - start) for name, start, end in zip(STAGES, marks, marks[1:], strict=False)}
        resident = segmenter.backend.on_gpu
        network = resident_ms(segmenter.backend.resident(batch, self._embeddings())) if resident else None
        return {**sample, NETWORK: sample["inference"] if network is None else network}

    def raw(self, case: Case, paths: Sequence[Path]) -> Raw | None:
        """See `Candidate`."""
        preprocessing = case.preprocessing(self._segmenter.preprocessing)
        resized = [preprocessing.resize(read_image(path)) for path in paths]
        batch = self._segmenter.input_of(resized, preprocessing.padded_size(resized[0].shape[:2]))
        raw = RawOutput(*self._segmenter.backend.run(batch, self._embeddings()), ()).to_numpy()
        return raw.class_logits, raw.mask_logits  # they travel to another process

    def memory(self) -> tuple[float | None, float | None]:
        """See `Candidate`."""
        return host_peak_mb(), gpu_peak_mb()

    def accuracy(self, annotations: Path, images: Path, limit: int | None) -> Accuracy | None:
        """With the model's own classes and sizes; see `Candidate`."""
        from d2zero_bench.accuracy import measure_accuracy

        self._segmenter.set_vocabulary(self._own)
        return measure_accuracy(self.info.name, self._segmenter, annotations, images, limit)

    def _embeddings(self) -> NDArray[np.float32] | None:
        return None if self._segmenter.contract.baked else self._segmenter.vocabulary.embeddings


class Peer:
    """A peer's network, on images of noise: it is fed what its preprocessing would make."""

    def __init__(self, spec: Spec, **changes: object) -> None:
        config = mask2former_config(spec.queries, spec.classes, **changes)
        form = PEERS[spec.peer]
        self._network = PeerNetwork(config, form, spec.device)
        self.info = CandidateInfo(
            spec.name, "peer", self._network.name, form.precision, queries=spec.queries, classes=spec.classes
        )
        self._run_once: Callable[[], None] = lambda: None

    def prepare(self, case: Case) -> None:
        """Draw the input; see `Candidate`."""
        height, width = (-(-side // 32) * 32 for side in (case.height, case.width))
        batch = np.random.default_rng(0).standard_normal((case.batch, 3, height, width)).astype(np.float32)
        reset_host_peak()
        reset_gpu_peak()
        self._run_once = self._network.resident(batch)

    def run(self, case: Case, paths: Sequence[Path]) -> Sample:
        """Only the network; see `Candidate`."""
        return {NETWORK: resident_ms(self._run_once) if self._network.on_gpu else milliseconds(self._run_once)}

    def raw(self, case: Case, paths: Sequence[Path]) -> Raw | None:
        """Nothing to compare: another model with random weights."""
        return None

    def memory(self) -> tuple[float | None, float | None]:
        """See `Candidate`."""
        return host_peak_mb(), gpu_peak_mb()

    def accuracy(self, annotations: Path, images: Path, limit: int | None) -> Accuracy | None:
        """None: random weights."""
        return None


def resident_ms(run_once: Callable[[], None]) -> float:
    """Milliseconds of a network on a GPU, after a run that is not timed: uploads have ended, its clock is up."""
    run_once()
    return milliseconds(run_once)


def milliseconds(run_once: Callable[[], None]) -> float:
    """Milliseconds of one call."""
    started = perf_counter()
    run_once()
    return 1000 * (perf_counter() - started)


def drawn_vocabulary(own: Vocabulary, classes: int) -> Vocabulary:
    """So many drawn classes of the model's width; every fourth is unseen."""
    rows = np.random.default_rng(0).standard_normal((classes, own.width)).astype(np.float32)
    names = tuple(f"class {number}" for number in range(classes))
    return Vocabulary(names, rows, seen=np.arange(classes) % 4 != 3, source=own.source)
