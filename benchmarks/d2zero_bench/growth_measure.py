"""The measurements behind the curves: sessions in which one thing varies, and folders of images.

Each curve has a process of its own (its memory is not what another one left behind) and goes from small to large.
"""

import io
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np

from d2zero.cli.terminal import tracked
from d2zero_bench.candidates import drawn_vocabulary
from d2zero_bench.cases import Case, Photos
from d2zero_bench.growth_curves import MEMORY, Curve, Point
from d2zero_bench.memory import host_peak_mb, reset_host_peak
from d2zero_bench.report import NETWORK, Report, Result
from d2zero_bench.session import Plan, Session
from d2zero_runtime import D2ZeroError, Vocabulary

PHOTO = Case(480, 640)  # of a folder
STAGES = ("decode", "preprocess", NETWORK, "postprocess")  # on a CPU the network is the stage of inference
ALL_ONE = dict.fromkeys((*STAGES, MEMORY), 1.0)
VOCABULARY = "vocabulary"
OWN_LIMITS = {"network": 1.0, "postprocess": 1.0, MEMORY: 1.0}  # where decoding and preprocessing have no part
ATTENTION = (
    "every class attends to every other (the published adaptation): a product of K × K for each head, which is {} once"
    " it is larger than the rest of the network"
)
CACHES = {
    "preprocess": "small images stay in the processor's caches; what is larger goes through memory, which the system"
    " hands out anew each time"
}
Samples = dict[str, tuple[float, ...]]


def against_size(plan: Plan, sides: Sequence[int]) -> Curve:
    """Square images; the model's own classes."""
    report = _measured(replace(plan, sizes=tuple((side, side) for side in sides)))
    points = [_point(result, f"{result.case.height}²", result.case.height**2) for result in report.results]
    return Curve("image size", "pixels", "one image, the model's own classes", tuple(points), ALL_ONE, CACHES)


def against_classes(plan: Plan, counts: Sequence[int], width: int) -> Curve:
    """Drawn classes of a text width; beside the stages, what handling the vocabulary takes."""
    report = _measured(replace(plan, classes=tuple(counts)))
    points = []
    for result, count in zip(report.results, counts, strict=True):
        point = _point(result, str(count), count)
        handled = {VOCABULARY: vocabulary_times(count, width, plan.settings.rounds)}
        points.append(replace(point, samples={**point.samples, **handled}))
    reasons = {"network": ATTENTION.format("what takes time"), MEMORY: ATTENTION.format("what takes memory")}
    about = f"one image of {_size(report)}; vocabulary: made, half of it selected, saved, loaded"
    return Curve("classes", "classes", about, tuple(points), {**OWN_LIMITS, VOCABULARY: 1.0}, reasons)


def against_batch(plan: Plan, batches: Sequence[int]) -> Curve:
    """Images at a time."""
    report = _measured(replace(plan, batches=tuple(batches)))
    points = [_point(result, str(result.case.batch), result.case.batch) for result in report.results]
    return Curve("batch", "images", f"images of {_size(report)}, times of a batch", tuple(points), ALL_ONE, CACHES)


def against_queries(plan: Plan, models: dict[int, Path]) -> Curve:
    """A model of random weights for each number of queries, measured in turns."""
    report = _measured(replace(plan, models=tuple(models.values())))
    found = zip(report.results, models, strict=True)
    points = [_point(result, str(count), count) for result, count in found]
    about = f"one image of {_size(report)}, random weights, 100 instances at most"
    return Curve("queries", "queries", about, tuple(points), OWN_LIMITS, {})


def against_images(model: Path, counts: Sequence[int], rounds: int) -> Curve:
    """`d2zero predict` on folders, each in a new process: the whole command after start-up, with pictures."""
    samples: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    with TemporaryDirectory() as name:
        folder = Path(name)
        drawn = Photos.of(folder / "drawn", None, [PHOTO])
        for count in counts:
            _fill(folder / str(count), drawn.batch(replace(PHOTO, batch=count), 0))
        order = [count for _ in range(rounds) for count in counts]
        for count in tracked(iter(order), len(order), "folders"):
            samples[count].append(in_new_process(predict_folder, model, folder / str(count), folder / "out"))
    points = [
        Point(str(count), count, {"total": tuple(ms for ms, _ in found), MEMORY: tuple(mb for _, mb in found)})
        for count, found in samples.items()
    ]
    about = f"photos of {PHOTO.height}×{PHOTO.width}, d2zero predict with pictures, opening the model included"
    return Curve("images in a folder", "images", about, tuple(points), {"total": 1.0, MEMORY: 0.0}, {})


def predict_folder(model: Path, images: Path, output: Path) -> tuple[float, float]:
    """Milliseconds and peak memory of this process for all images of a folder."""
    from d2zero.cli.predict import predict

    reset_host_peak()
    started = perf_counter()
    with redirect_stdout(io.StringIO()):
        predict(str(images), model, output)
    return 1000 * (perf_counter() - started), host_peak_mb() or 0.0


def in_new_process(
    work: Callable[[Path, Path, Path], tuple[float, float]], model: Path, images: Path, output: Path
) -> tuple[float, float]:
    """What a function returns in a process that has nothing of this one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, model, images, output).result()


def vocabulary_times(count: int, width: int, rounds: int) -> tuple[float, ...]:
    """Milliseconds to make a vocabulary, select half of it, save and load it."""
    own = Vocabulary(("a class",), np.ones((1, width), np.float32))
    times = []
    with TemporaryDirectory() as folder:
        for _ in range(rounds):
            started = perf_counter()
            words = drawn_vocabulary(own, count)
            words.select(words.names[: (count + 1) // 2])
            Vocabulary.load(words.save(Path(folder) / "v.npz"))
            times.append(1000 * (perf_counter() - started))
    return tuple(times)


def _measured(plan: Plan) -> Report:
    """A session in which every case went through.

    Raises:
        D2ZeroError: one did not.
    """
    report = Session(plan).run()
    if report.failures:
        raise D2ZeroError("; ".join(report.failures.values()))
    return report


def _point(result: Result, label: str, work: float) -> Point:
    samples: Samples = {stage: tuple(round(value, 4) for value in result.times(stage)) for stage in STAGES}
    return Point(label, work, samples if result.host_mb is None else {**samples, MEMORY: (round(result.host_mb, 1),)})


def _size(report: Report) -> str:
    case = report.cases[0]
    return f"{case.height}×{case.width}"


def _fill(folder: Path, photos: Sequence[Path]) -> None:
    folder.mkdir()
    for number, photo in enumerate(photos):
        shutil.copyfile(photo, folder / f"{number:05d}.jpg")
