"""What is wrong with a data set, and whether training or evaluation would refuse it, before either runs for hours.

They are asked themselves: a training set is made, and evaluation's checks are run. What they would accept and lose
something by, such as a missing image file, is a warning; what only deserves a look is a note.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from d2zero.data.augment import AugmentConfig
from d2zero.data.coco import CocoFile, check_listed_size, missing_images, open_coco, read_coco, read_listed_image
from d2zero.data.coco_values import Id
from d2zero.data.contents import TINY, Contents, read_contents
from d2zero.data.splits import Split
from d2zero.data.training_set import TrainingSet, require_trainable
from d2zero.evaluation.run import require_images, require_known_classes
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.errors import join_truncated

NAMED = 3  # problems of image files that a message describes
MOST_THREADS = 8
Progress = Callable[[Iterator[Any], int, str], Iterator[Any]]


class Purpose(StrEnum):
    """What an annotation file is for."""

    TRAINING = "training"
    EVALUATION = "evaluation"


class Level(StrEnum):
    """How bad a finding is."""

    ERROR = "error"  # training or evaluation refuses the data
    WARNING = "warning"  # something is lost, or most likely a mistake
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """Something about a data set that a person should know.

    Args:
        level: How bad it is.
        kind: What it is, for programs.
        message: One sentence.
        items: All that it is about: ids, names of files or classes.
    """

    level: Level
    kind: str
    message: str
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """How to look at a data set.

    Args:
        purpose: What would refuse it.
        decode: Decode every image, as training will; else read only their sizes.
        threads: Threads that read images; one per core, at most `MOST_THREADS`, if left out.
    """

    purpose: Purpose = Purpose.TRAINING
    decode: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class DataReport:
    """What is in a data set, and what is wrong with it.

    Args:
        contents: What the annotation file holds.
        seen: Whether a class is seen, by name; None for a class of the file that the split does not have.
        findings: The worst first.
    """

    contents: Contents
    seen: dict[str, bool | None]
    findings: list[Finding]

    @property
    def is_refused(self) -> bool:
        """Whether training or evaluation would refuse the data."""
        return any(finding.level is Level.ERROR for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        contents = asdict(self.contents) | {"images": self.contents.images, "instances": self.contents.instances}
        contents["sizes"] = [
            {"width": width, "height": height, "images": count}
            for (height, width), count in self.contents.sizes.most_common()
        ]
        contents["classes"] = [
            {"name": name, "seen": seen, **self.contents.classes[name]._asdict()}
            for name, seen in self.seen.items()
            if name in self.contents.classes
        ]
        return {"refused": self.is_refused, **contents, "findings": [asdict(finding) for finding in self.findings]}


@contextmanager
def open_data(path: Path) -> Iterator[CocoFile]:
    """An annotation file that stays on disk; one with annotations that cannot be used in memory, without those.

    Raises:
        D2ZeroError: It cannot be read even without them.
    """
    with ExitStack() as stack:
        try:
            annotations = stack.enter_context(open_coco(path))
        except D2ZeroError:
            annotations = read_coco(path, leave_out=True)
        yield annotations


def check_data(
    annotations: CocoFile,
    images: Path,
    vocabulary: Vocabulary | None,
    options: Options,
    progress: Progress | None = None,
) -> DataReport:
    """Look at annotations and image files.

    Args:
        annotations: As of `open_data`.
        images: The folder of the images.
        vocabulary: Which classes are seen; all of the file's if left out.
        options: How to look.
        progress: Shows how far it has come.
    """
    if vocabulary is None:
        vocabulary = Split("all", tuple(annotations.categories), ()).as_vocabulary()
    flags = dict(zip(vocabulary.names, vocabulary.seen.tolist(), strict=True))
    seen = {name: flags.get(name) for name in dict.fromkeys([*annotations.categories, *flags])}
    contents = read_contents(annotations, progress)
    findings = [
        *_refusals(annotations, images, vocabulary, options.purpose),
        *_annotation_findings(annotations, options.purpose),
        *_image_findings(annotations, images, options, progress),
        *_class_findings(contents, seen, options.purpose),
        *_content_findings(annotations, contents),
    ]
    return DataReport(contents, seen, sorted(findings, key=lambda finding: list(Level).index(finding.level)))


def _refusals(annotations: CocoFile, images: Path, vocabulary: Vocabulary, purpose: Purpose) -> Iterator[Finding]:
    """What training, or evaluation, says to the data."""
    try:
        if purpose is Purpose.TRAINING:
            require_trainable(vocabulary)
            usable = _WithPixels(annotations)
            TrainingSet(replace(annotations, annotations=usable), images, vocabulary, AugmentConfig())
        else:
            require_known_classes(annotations, vocabulary.names)
            require_images(annotations, images, all_of_them=False)
    except D2ZeroError as error:
        yield Finding(Level.ERROR, "refused", str(error))


class _WithPixels(Mapping[Id, list[dict[str, Any]]]):
    """Annotations that training reads: without those whose masks have no pixel."""

    def __init__(self, annotations: CocoFile) -> None:
        self._all, self._left_out = annotations.annotations, set(annotations.without_pixels)

    def __getitem__(self, number: Id) -> list[dict[str, Any]]:
        return [entry for entry in self._all[number] if entry["id"] not in self._left_out]

    def __iter__(self) -> Iterator[Id]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


def _annotation_findings(annotations: CocoFile, purpose: Purpose) -> Iterator[Finding]:
    training = purpose is Purpose.TRAINING
    if annotations.left_out.count:
        level = Level.WARNING if training else Level.ERROR
        consequence = "training leaves them out" if training else "evaluation refuses the file"
        yield Finding(level, "unusable-annotations", f"{annotations.left_out}; {consequence}")
    if annotations.without_pixels:
        consequence = "they are not used in training" if training else "they count, and nothing can match them"
        yield _listing(
            Level.WARNING, "no-pixel", annotations.without_pixels, f"annotations have masks of no pixel; {consequence}"
        )


def _image_findings(
    annotations: CocoFile, images: Path, options: Options, progress: Progress | None
) -> Iterator[Finding]:
    training = options.purpose is Purpose.TRAINING
    missing = missing_images(annotations, images, annotations.images)
    if missing:
        consequence = "training leaves them out" if training else "they count as without detections"
        names = [annotations.images[number]["file_name"] for number in missing]
        yield _listing(Level.WARNING, "missing-files", names, f"image files are not in {images}; {consequence}")
    absent = set(missing)
    present = [number for number in annotations.images if number not in absent]
    problems = list(_image_problems(annotations, images, present, options, progress))
    if problems:
        consequence = "training replaces them by others" if training else "they count as without detections"
        every = len(problems) == len(present)
        yield Finding(
            Level.ERROR if every else Level.WARNING,
            "unusable-files",
            f"{len(problems)} of {len(present)} image files cannot be used; {consequence}:"
            f" {join_truncated(problems, NAMED)}",
            problems,
        )


def _image_problems(
    annotations: CocoFile, images: Path, ids: list[Id], options: Options, progress: Progress | None
) -> Iterator[str]:
    """What is wrong with image files, one line for each that cannot be used."""

    def problem(number: Id) -> str:
        try:
            (read_listed_image if options.decode else check_listed_size)(annotations, images, number)
        except D2ZeroError as error:
            return str(error)
        return ""

    pool = ThreadPoolExecutor(options.threads or min(os.cpu_count() or 1, MOST_THREADS))
    try:
        found = pool.map(problem, ids)
        yield from filter(None, progress(found, len(ids), "reading images") if progress else found)
    finally:
        pool.shutdown(cancel_futures=True)


def _class_findings(contents: Contents, seen: dict[str, bool | None], purpose: Purpose) -> Iterator[Finding]:
    used = {name for name, count in contents.classes.items() if count.instances}
    training = purpose is Purpose.TRAINING
    unknown = [name for name, flag in seen.items() if flag is None and name in used]
    if unknown and training:  # evaluation has refused them
        yield _listing(
            Level.WARNING, "unknown-classes", unknown, "classes are not in the split or vocabulary and are not learned"
        )
    without = [name for name, flag in seen.items() if name not in used and (flag or (flag is False and not training))]
    if without:
        what = "seen classes have no instance and are not learned" if training else "classes have no instance"
        yield _listing(Level.WARNING if training else Level.NOTE, "classes-without-instances", without, what)


def _content_findings(annotations: CocoFile, contents: Contents) -> Iterator[Finding]:
    lists = (
        (Level.WARNING, "same-file", contents.same_file, "file names are those of several images"),
        (Level.WARNING, "box-outside", contents.outside, "annotations have boxes that are empty or leave their images"),
        (Level.WARNING, "box-apart", contents.apart, "annotations have boxes that are not those of their masks"),
        (Level.WARNING, "repeated", contents.repeated, "annotations repeat the mask and the class of another"),
        (Level.NOTE, "relabelled", contents.relabelled, "annotations have the mask of another, but not its class"),
        (Level.NOTE, "tiny", contents.tiny, f"annotations have masks of less than {TINY} pixels"),
        (Level.NOTE, "empty", contents.empty, "images have no instance"),
    )
    for level, kind, items, what in lists:
        if items:
            yield _listing(level, kind, items, what)
    if contents.crowds:
        what = "crowd annotations: not learned; in evaluation, detections on them do not count"
        yield Finding(Level.NOTE, "crowds", f"{contents.crowds} {what}")
    if annotations.is_federated:
        yield Finding(Level.NOTE, "federated", "images say which classes were looked for: evaluation follows LVIS")


def _listing(level: Level, kind: str, items: list[Any], what: str) -> Finding:
    return Finding(level, kind, f"{len(items)} {what}: {join_truncated(items)}", items)
