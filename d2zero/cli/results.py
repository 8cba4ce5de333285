"""Instances of many images as COCO JSON, written as they come: memory stays flat, nothing is lost."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from d2zero_runtime import D2ZeroError, Detections, rle
from d2zero_runtime.errors import listed
from d2zero_runtime.files import whole_file

if TYPE_CHECKING:
    from d2zero.data.coco import CocoFile


class _Rows:
    """A JSON file that ends with a list that grows; it is there when the `with` block ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._rows: IO[str] = path.with_name(f".{path.name}.rows").open("w+", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        self._rows.write((",\n" if self.count else "") + json.dumps(row))
        self.count += 1

    def finish(self, before: str, after: str) -> None:
        with self._rows, whole_file(self.path) as partial, partial.open("w", encoding="utf-8") as out:
            out.write(before)
            self._rows.seek(0)
            shutil.copyfileobj(self._rows, out)
            out.write(after)
        Path(self._rows.name).unlink()


class CocoWriter:
    """Annotations as pycocotools reads them, with scores; image and category ids count from 1.

    Args:
        path: the JSON file to write, which is there when the `with` block ends, however it ends.
        names: the classes.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.category_ids = {name: number for number, name in enumerate(names, 1)}
        self.images: list[dict[str, Any]] = []
        self._rows = _Rows(path)

    def __enter__(self) -> "CocoWriter":
        return self

    def add(self, source: str, found: Detections) -> int:
        """Write the instances of one image; returns the image's id."""
        height, width = found.image_size
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": source, "height": height, "width": width})
        for entry in found.to_coco(number, self.category_ids):
            area = rle.area(entry["segmentation"])
            self._rows.append({"id": self._rows.count + 1, **entry, "area": area, "iscrowd": 0})
        return number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        categories = [{"id": number, "name": name} for name, number in self.category_ids.items()]
        before = f'{{"images": {json.dumps(self.images)},\n"categories": {json.dumps(categories)},\n'
        self._rows.finish(f'{before}"annotations": [\n', "\n]}\n")


class ResultsWriter:
    """A COCO results list with the ids of an annotation file: for `d2zero eval --detections` and `COCO.loadRes`.

    Args:
        path: the JSON file to write, which is there when the `with` block ends, however it ends.
        annotations: its images are known by their files' names, in whatever folder; its categories by name.
        sources: the images to come.

    Raises:
        D2ZeroError: the annotation file does not list one of the images, or lists two of one file name.
    """

    def __init__(self, path: Path, annotations: "CocoFile", sources: Sequence[Path]) -> None:
        names = Counter(Path(entry["file_name"]).name for entry in annotations.images.values())
        strange = [source.name for source in sources if names[source.name] != 1]
        if strange:
            raise D2ZeroError(
                f"{annotations.path} lists {len(strange)} of {len(sources)} files not at all or several times:"
                f" {listed(strange)}; --results-for takes the annotations of these images"
            )
        self._ids = {Path(entry["file_name"]).name: number for number, entry in annotations.images.items()}
        self._annotations, self._rows = annotations, _Rows(path)

    def __enter__(self) -> "ResultsWriter":
        return self

    def add(self, source: Path, found: Detections) -> None:
        """Write the instances of one image that are of listed categories.

        Raises:
            D2ZeroError: the image has another size than the annotation file says, which its masks would not fit.
        """
        number = self._ids[source.name]
        entry, known = self._annotations.images[number], self._annotations.categories
        if found.image_size != (entry["height"], entry["width"]):
            said = (entry["height"], entry["width"])
            raise D2ZeroError(f"{source} is {found.image_size} (height, width), its annotations say {said}")
        for row in found.named(known).to_coco(number, known):
            self._rows.append(row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.finish("[\n", "\n]\n")
