"""Instances of many images as one COCO JSON file, written as they come: memory stays flat, nothing is lost."""

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from d2zero_runtime import Detections
from d2zero_runtime.files import whole_file


class CocoWriter:
    """Collects instances image by image; the file is there when the `with` block ends, however it ends.

    Args:
        path: the JSON file to write.
        names: the classes; their category ids count from 1.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.path = path
        self.category_ids = {name: number for number, name in enumerate(names, 1)}
        self.images: list[dict[str, Any]] = []
        self._rows: IO[str] = path.with_name(f".{path.name}.rows").open("w+", encoding="utf-8")
        self._count = 0

    def __enter__(self) -> "CocoWriter":
        return self

    def add(self, source: str, found: Detections) -> int:
        """Write the instances of one image; returns the image's id."""
        height, width = found.image_size
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": source, "height": height, "width": width})
        for entry in found.to_coco(number, self.category_ids):
            self._rows.write((",\n" if self._count else "") + json.dumps(entry))
            self._count += 1
        return number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        categories = [{"id": number, "name": name} for name, number in self.category_ids.items()]
        with self._rows, whole_file(self.path) as partial, partial.open("w", encoding="utf-8") as out:
            out.write(f'{{"images": {json.dumps(self.images)},\n"categories": {json.dumps(categories)},\n')
            out.write('"annotations": [\n')
            self._rows.seek(0)
            shutil.copyfileobj(self._rows, out)
            out.write("\n]}\n")
        Path(self._rows.name).unlink()
