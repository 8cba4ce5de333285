"""`d2zero index`, `d2zero relabel`: images segmented once, and named with any vocabulary."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from d2zero.cli.models import (
    BatchSizeOption,
    ClassifierThreadsOption,
    DeviceOption,
    ModelOption,
    ModeOption,
    ProviderOption,
    ScoreOption,
    TextEncoderOption,
    ThreadsOption,
    TypedNames,
    image_files,
    open_segmenter,
    refuse_skipped,
)
from d2zero.cli.results import CocoWriter, ResultsWriter, draw, picture_name, print_summary
from d2zero.cli.terminal import tracked
from d2zero_runtime import D2ZeroError, Detections, Mode, Vocabulary
from d2zero_runtime.files import check_output
from d2zero_runtime.segmenter import SCORE_THRESHOLD
from d2zero_runtime.sources import ImageLike

if TYPE_CHECKING:
    from d2zero_runtime.index import Index, IndexedImage

logger = logging.getLogger("d2zero")


def index(
    source: Annotated[str, typer.Argument(help="A folder of images, a pattern such as 'photos/*.jpg', or an image.")],
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The index's folder; one that is there goes on.")],
    features: Annotated[
        str,
        typer.Option("--features", help="float16, whose scores differ by 1e-3 at most, or float32, twice as large."),
    ] = "float16",
    provider: ProviderOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = 1,
) -> None:
    """Segment images once, to name what is in them later. Run again, it goes on with what is not in the index yet."""
    from d2zero_runtime.index import IndexDescription, IndexWriter
    from d2zero_runtime.index.shards import Features

    if features not in get_args(Features):
        raise D2ZeroError(f"--features is {' or '.join(get_args(Features))}, got {features!r}")
    kind: Any = features
    check_output(output, folder=True)
    segmenter = open_segmenter(model, provider, device, None, threads)
    sources = list(map(_located, image_files(source, output)))
    failed: list[ImageLike] = []
    started = time.perf_counter()
    description = IndexDescription.of(segmenter, kind)
    with IndexWriter(output, description, on_bad_shard=_put_aside) as writer:
        left = [path for path in sources if path not in writer]
        if len(left) < len(sources):
            logger.info("%d of %d images are in the index", len(sources) - len(left), len(sources))
        results = segmenter.segment_stream(
            left, batch_size=batch_size, on_error=lambda source, _error: failed.append(source)
        )
        for path, segments in tracked(results, len(left), "segmenting"):
            try:
                writer.add(Path(str(path)), segments)
            except D2ZeroError as error:
                logger.warning("skipped: %s", error)
                failed.append(path)
        seconds, count = time.perf_counter() - started, len(left) - len(failed)
        print(
            f"{output}: {len(writer)} images; {count} in {seconds:.1f} s"
            f" ({count / max(seconds, 1e-9):.2f} per second), {segmenter.backend.name}"
        )
    refuse_skipped(failed, sources)


def relabel(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="A folder that `d2zero index` made.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for detections.json and pictures.")],
    vocabulary: Annotated[
        Path | None, typer.Option("--vocabulary", "-v", help="The classes (.npz); the model's own if left out.")
    ] = None,
    names: Annotated[
        str | None,
        typer.Option("--names", help="The classes, typed: 'red mug, cat|kitty'. Needs --text-encoder."),
    ] = None,
    text_encoder: TextEncoderOption = None,
    mode: ModeOption = "gzsis",
    score: ScoreOption = SCORE_THRESHOLD,
    pictures: Annotated[
        str | None,
        typer.Option("--pictures", help="Draw the images whose path fits this pattern: '*/img_7*'; '*' for all."),
    ] = None,
    results_for: Annotated[
        Path | None,
        typer.Option(
            "--results-for",
            help="Also write results.json, a COCO results list with the ids of this annotation file. For full accuracy,"
            " also give --score 0.",
        ),
    ] = None,
    threads: ClassifierThreadsOption = None,
) -> None:
    """Name what is in an index with any vocabulary, without its network: detections.json as of `d2zero predict`."""
    check_output(output, folder=True)
    chosen = Mode.parse(mode)
    typed = TypedNames.of(names, text_encoder, vocabulary)
    with opened_index(folder, threads) as index:
        classes = classes_for(index, vocabulary, typed, threads)
        _relabel(index, classes, chosen, output, score, pictures, results_for)


def _relabel(
    index: "Index",
    classes: Vocabulary,
    mode: Mode,
    output: Path,
    score: float,
    pictures: str | None,
    results_for: Path | None,
) -> None:
    results = index.name(classes, mode, score_threshold=score)  # refuses what does not fit, before a file is touched
    paths = map(Path, index.paths()) if results_for else ()
    listing = ResultsWriter.wanted(output / "results.json", results_for, list(paths))
    output.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    drawn, started = 0, time.perf_counter()
    with CocoWriter(output / "detections.json", classes.names) as written, listing or nullcontext():
        for image, found in tracked(results, len(index), "naming"):
            path = Path(image.path)
            number = written.add(image.path, found)
            if listing:
                listing.add(path, found)
            counts.update(found.names)
            if pictures and fnmatch(image.path, pictures):
                drawn += 1
                _draw(image, found, output / picture_name(number, path))
    if pictures and not drawn:
        logger.warning("no image's path fits %s; paths are absolute: begin the pattern with */", pictures)
    print_summary(classes, counts, len(written.images), time.perf_counter() - started, "named without the network")


@contextmanager
def opened_index(folder: Path, threads: int | None = None) -> "Iterator[Index]":
    """An index for a command: shards that cannot be used are named, the others used, and the command fails at its end.

    Raises:
        D2ZeroError: The folder is no index, or has shards that cannot be used.
    """
    from d2zero_runtime.index import Index
    from d2zero_runtime.index.index import shards_in

    bad: list[Path] = []

    def told(path: Path, error: D2ZeroError) -> None:
        if path not in bad:  # several passes over an index meet the same shards
            bad.append(path)
            logger.warning("skipped: %s", error)

    yield Index(folder, threads, told)
    if bad:
        count = len(shards_in(folder))
        raise D2ZeroError(f"{len(bad)} of {count} shards could not be used (listed above); the others were used")


def classes_for(
    index: "Index", vocabulary: Path | None, typed: TypedNames | None, threads: int | None = None
) -> Vocabulary:
    """The classes that a command names with: typed ones, a file's, or the model's own.

    Raises:
        D2ZeroError: They do not fit the model.
    """
    if typed:
        return typed.encoded(index.contract, index.vocabulary, threads)
    return Vocabulary.load(vocabulary) if vocabulary else index.vocabulary


def _located(path: Path) -> Path:
    """The one path of a file, however it was given: its name in its folder, whose links are followed."""
    return path.parent.resolve() / path.name


def _put_aside(path: Path, error: D2ZeroError) -> None:
    logger.warning("%s; it was renamed to %s.bad, and its images are segmented again", error, path.name)


def _draw(image: "IndexedImage", found: Detections, picture: Path) -> None:
    if image.problem:
        logger.warning("not drawn: %s: %s since it was segmented", image.path, image.problem)
    else:
        draw(Path(image.path), None, found, picture)
