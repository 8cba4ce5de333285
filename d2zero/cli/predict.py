"""`d2zero predict`: pictures and COCO JSON from an exported model or a checkpoint."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from d2zero.cli.models import (
    BatchSizeOption,
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
from d2zero.cli.results import CocoWriter, Picture, ResultsWriter, draw, picture_name, print_summary
from d2zero.cli.terminal import tracked
from d2zero_runtime import D2ZeroError, Detections, Mode, Segmenter
from d2zero_runtime.files import check_output
from d2zero_runtime.segmenter import SCORE_THRESHOLD
from d2zero_runtime.sources import ImageLike

logger = logging.getLogger("d2zero")


def predict(
    source: Annotated[str, typer.Argument(help="An image, a folder, or a pattern such as 'photos/*.jpg'.")],
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for pictures and detections.json.")],
    vocabulary: Annotated[Path | None, typer.Option("--vocabulary", "-v", help="Other classes (.npz).")] = None,
    names: Annotated[
        str | None,
        typer.Option(
            "--names",
            help="Other classes, typed: 'red mug, cat|kitty', or a .txt or .json file. Those that the model's own"
            " vocabulary has as seen stay seen, all others are unseen. Needs --text-encoder.",
        ),
    ] = None,
    text_encoder: TextEncoderOption = None,
    mode: ModeOption = "gzsis",
    score: ScoreOption = SCORE_THRESHOLD,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw an overlay of each image, without duplicates.")
    ] = True,
    font: Annotated[
        str | None,
        typer.Option("--font", help="A font file, for labels in scripts other than Latin, Greek and Cyrillic."),
    ] = None,
    results_for: Annotated[
        Path | None,
        typer.Option(
            "--results-for",
            help="Also write results.json, a COCO results list with the ids of this annotation file: for `d2zero eval"
            " --detections` and pycocotools. For full accuracy, also give --score 0.",
        ),
    ] = None,
    provider: ProviderOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = 1,
) -> None:
    """Segment images: an overlay of each, and all instances as COCO JSON. Files that cannot be read are skipped."""
    check_output(output, folder=True)
    chosen = Mode.parse(mode)
    typed = TypedNames.of(names, text_encoder, vocabulary)
    segmenter = open_segmenter(model, provider, device, vocabulary, threads)
    if typed:
        segmenter.set_vocabulary(typed.encoded(segmenter.contract, segmenter.vocabulary, threads))
    sources = image_files(source, output)
    output.mkdir(parents=True, exist_ok=True)
    listing = ResultsWriter.wanted(output / "results.json", results_for, sources)
    counts: Counter[str] = Counter()
    failed: list[ImageLike] = []
    started = time.perf_counter()

    def skipped(source: ImageLike, error: D2ZeroError) -> None:
        failed.append(source)

    options = {"batch_size": batch_size, "score_threshold": score, "on_error": skipped}
    results = _segmented(segmenter, sources, chosen, pictures, options)
    with CocoWriter(output / "detections.json", segmenter.vocabulary.names) as written, listing or nullcontext():
        for path, image, found in tracked(results, len(sources), "segmenting"):
            number = written.add(str(path), found)
            if listing:
                listing.add(path, found)
            counts.update(found.names)
            if image is not None:
                draw(path, image, found, output / picture_name(number, path), font)
    seconds = time.perf_counter() - started
    print_summary(segmenter.vocabulary, counts, len(written.images), seconds, segmenter.backend.name)
    refuse_skipped(failed, sources)


def _segmented(
    segmenter: Segmenter, sources: list[Path], mode: Mode, with_images: bool, options: dict[str, Any]
) -> Iterator[tuple[Path, Picture | None, Detections]]:
    """Each file with its instances; and with its image, if pictures are drawn."""
    if with_images:
        for done in segmenter.stream_with_images(sources, mode, **options):
            yield Path(str(done.source)), done.image, done.detections
    else:
        for source, found in segmenter.stream(sources, mode, **options):
            yield Path(str(source)), None, found
