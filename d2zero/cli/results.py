"""Instances of many images: as COCO JSON, written as they come so that memory stays flat; as pictures; counted."""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from d2zero.cli.terminal import console, plain
from d2zero_runtime import D2ZeroError, Detections, Vocabulary
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import atomic_write
from d2zero_runtime.masks import rle
from d2zero_runtime.sources import open_rgb

if TYPE_CHECKING:
    from d2zero.data.coco import CocoFile

logger = logging.getLogger("d2zero")

Picture = Image.Image | NDArray[np.uint8]
LONGEST_STEM = 200  # bytes of a picture's name that are the image's
_BLOCK = 1 << 20  # bytes, longer than a row


class _Rows:
    """A JSON file with a list that grows, written as it comes; it takes its place when it is finished.

    Where the disk is full, what was written before stays and the file is made whole with it: rows at the end give way
    to what must follow them.

    Args:
        path: The file's path.
        before: Text before the rows.
    """

    def __init__(self, path: Path, before: str) -> None:
        self.path, self.count = path, 0
        self._end = 0  # of the last row that is whole
        with ExitStack() as stack:
            partial = stack.enter_context(atomic_write(path))
            self._file = stack.enter_context(partial.open("w+b", buffering=0))
            self._write(before)
            self._open = stack.pop_all()

    def extend(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, all of them or none.

        Raises:
            D2ZeroError: They cannot be written.
        """
        lines = [json.dumps(row) for row in rows]
        if lines:
            self._write((",\n" if self.count else "") + ",\n".join(lines))
            self.count += len(lines)

    def finish(self, after: str) -> None:
        """Write what follows the rows; the file is there then."""
        with self._open:
            try:
                self._write(after)
            except D2ZeroError:
                self._make_room(len(after.encode()))
                self._write(after)
            os.fsync(self._file.fileno())

    def _write(self, text: str) -> None:
        rest = memoryview(text.encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise D2ZeroError(f"cannot write {self.path}: {error.strerror}") from error
        self._end = self._file.tell()

    def _make_room(self, size: int) -> None:
        """Drop the last rows, so many that `size` bytes can be written."""
        limit = max(0, self._end - size)
        start = max(0, limit - _BLOCK)
        self._file.seek(start)
        found = self._file.read(limit - start).rfind(b",\n")
        self._end = start + found if found >= 0 else self._end
        self._file.truncate(self._end)
        self._file.seek(self._end)


class CocoWriter:
    """Annotations as pycocotools reads them, with scores; image and category ids count from 1.

    Args:
        path: The JSON file to write, which is there when the `with` block ends, however it ends.
        names: The classes.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.category_ids = {name: number for number, name in enumerate(names, 1)}
        self.images: list[dict[str, Any]] = []
        self._rows = _Rows(path, '{"annotations": [\n')

    def __enter__(self) -> "CocoWriter":
        return self

    def add(self, source: str, found: Detections) -> int:
        """Write the instances of one image; returns the image's id."""
        height, width = found.image_size
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": source, "height": height, "width": width})
        first = self._rows.count + 1
        self._rows.extend(
            [
                {"id": place, **entry, "area": rle.area(entry["segmentation"]), "iscrowd": 0}
                for place, entry in enumerate(found.to_coco(number, self.category_ids), first)
            ]
        )
        return number

    def __exit__(self, *_: object) -> None:
        categories = [{"id": number, "name": name} for name, number in self.category_ids.items()]
        self._rows.finish(f'\n],\n"categories": {json.dumps(categories)},\n"images": {json.dumps(self.images)}}}\n')


class ResultsWriter:
    """A COCO results list with the ids of an annotation file: for `d2zero eval --detections` and `COCO.loadRes`.

    Args:
        path: The JSON file to write, which is there when the `with` block ends, however it ends.
        annotations: Its images are known by their files' names, in whatever folder; its categories by name.
        sources: The images to come.

    Raises:
        D2ZeroError: The annotation file does not list one of the images, or lists two of one file name.
    """

    def __init__(self, path: Path, annotations: "CocoFile", sources: Sequence[Path]) -> None:
        from d2zero.data.coco import ids_by_file_name

        self._ids = ids_by_file_name(annotations)
        strange = [source.name for source in sources if source.name not in self._ids]
        if strange:
            raise D2ZeroError(
                f"{annotations.path} lists {len(strange)} of {len(sources)} files not at all or several times:"
                f" {join_truncated(strange)}; --results-for takes the annotations of these images"
            )
        self._annotations, self._rows = annotations, _Rows(path, "[\n")

    @classmethod
    def wanted(cls, path: Path, annotations: Path | None, sources: Sequence[Path]) -> "ResultsWriter | None":
        """From the option of a command; None if it was not given."""
        if annotations is None:
            return None
        from d2zero.data.coco import read_coco

        return cls(path, read_coco(annotations), sources)

    def __enter__(self) -> "ResultsWriter":
        return self

    def add(self, source: Path, found: Detections) -> None:
        """Write the instances of one image that are of listed categories.

        Raises:
            D2ZeroError: The image has another size than the annotation file says, which its masks would not fit.
        """
        from d2zero.data.coco import require_size

        number, known = self._ids[source.name], self._annotations.categories
        require_size(self._annotations.images[number], found.image_size)
        self._rows.extend(found.named(known).to_coco(number, known))

    def __exit__(self, *_: object) -> None:
        self._rows.finish("\n]\n")


def picture_name(number: int, path: Path) -> str:
    """Of an overlay: the image's place and name, with at most the 255 bytes that a name may have."""
    stem = path.stem.encode(errors="surrogateescape")[:LONGEST_STEM].decode(errors="ignore")
    return f"{number:05d}-{stem}.jpg"


def draw(path: Path, image: Picture | None, found: Detections, picture: Path, font: str | None = None) -> None:
    """Draw one image without duplicates; a failure costs the picture and not the run.

    Args:
        path: Its file.
        image: As it was read; it is read if left out.
        found: Its instances.
        picture: Where to write, a JPEG.
        font: A font file for labels.
    """
    try:
        shown = found.without_duplicates().plot(open_rgb(path) if image is None else image, font)
        with atomic_write(picture) as partial:
            shown.save(partial, "JPEG", quality=92)
    except Exception as error:  # Pillow's, the disk's, memory's
        logger.warning("not drawn: %s: %s", path, (str(error) or type(error).__name__).splitlines()[0])


def print_summary(vocabulary: Vocabulary, counts: "Counter[str]", images: int, seconds: float, how: str) -> None:
    """A table of the classes that were found most, and the rate.

    Args:
        vocabulary: The classes.
        counts: Instances by class.
        images: The number of images.
        seconds: What they took.
        how: What ran.
    """
    table = Table("class", "", "instances", box=None)
    for name, count in counts.most_common(20):
        seen = vocabulary.seen[vocabulary.names.index(name)]
        table.add_row(plain(name), "" if seen else "unseen", str(count))
    screen = console()
    screen.print(table if counts else "nothing found above the score")
    rate, total = images / max(seconds, 1e-9), sum(counts.values())
    print(f"{images} images in {seconds:.1f} s ({rate:.2f} per second), {total} instances, {how}")
