"""Where a data set's files are: a folder as published, a YAML file that names them, or flags.

A YAML file names what there is, relative to itself:

    train: {annotations: train.json, images: photos}
    val: {annotations: val.json, images: photos}
    vocabulary: classes.npz
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from d2zero.data.coco import find_annotations, find_image_folder
from d2zero.data.splits import parsed_yaml
from d2zero_runtime import D2ZeroError, Mode
from d2zero_runtime.checked_json import checked, refuse_unknown

YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Part:
    """An annotation file and the folder of its images."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Named:
    """What is named of a part; the rest is found in the data set's folder."""

    annotations: Path | None = None
    images: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Args:
        folder: Its folder, laid out as published; files are found by their names.
        train: What is named of the training part.
        val: What is named of the part to evaluate on.
        vocabulary: Its vocabulary, if it is named.
    """

    folder: Path | None = None
    train: Named = Named()
    val: Named = Named()
    vocabulary: Path | None = None

    @classmethod
    def of(cls, data: Path | None) -> "Dataset":
        """The data set of a folder or a YAML file; without either, one whose parts are still to be named.

        Raises:
            D2ZeroError: The file is absent, is not YAML, or names something else.
        """
        if data is None or data.suffix not in YAML:
            return cls(folder=data)
        if not data.is_file():
            raise D2ZeroError(f"data set {data} does not exist")
        values = parsed_yaml(data.read_text(encoding="utf-8-sig", errors="replace"), str(data))
        if not isinstance(values, dict):
            raise D2ZeroError(f"{data} must name train, val and vocabulary, got {type(values).__name__}")
        refuse_unknown(_Files, values, f"fields in {data}:", by_hand=True)
        for name in ("train", "val"):
            if isinstance(values.get(name), dict):
                refuse_unknown(Named, values[name], f"fields of {name} in {data}:", by_hand=True)
        found, base = checked(_Files, values, str(data), remedy="correct it"), data.parent

        def beside(name: str | None) -> Path | None:
            return base / name if name else None

        train, val = (Named(beside(part.annotations), beside(part.images)) for part in (found.train, found.val))
        return cls(None, train, val, beside(found.vocabulary))

    def with_train(self, annotations: Path | None, images: Path | None) -> "Dataset":
        """With other files of the training part, where they are given."""
        return replace(self, train=Named(annotations or self.train.annotations, images or self.train.images))

    def with_val(self, annotations: Path | None, images: Path | None) -> "Dataset":
        """With other files of the part to evaluate on, where they are given."""
        return replace(self, val=Named(annotations or self.val.annotations, images or self.val.images))

    def training_part(self, split: str) -> Part:
        """The training part, found by the split's name where it is not named.

        Raises:
            D2ZeroError: It cannot be found.
        """
        return self._found(self.train, split, "seen")

    def test_part(self, split: str, modes: Sequence[Mode]) -> Part:
        """The part to evaluate on, found by the split's name and the modes where it is not named.

        Raises:
            D2ZeroError: It cannot be found.
        """
        return self._found(self.val, split, "unseen" if list(modes) == [Mode.ZSIS] else "gzsi")

    def _found(self, named: Named, split: str, part: str) -> Part:
        annotations, images = named.annotations, named.images
        if annotations is None:
            if self.folder is None:
                raise D2ZeroError("give --data DIR, or --annotations FILE with --images DIR")
            if not split:
                raise D2ZeroError(
                    f"no split is recorded to find annotations in {self.folder} by: give --split, or --annotations FILE"
                )
            annotations = find_annotations(self.folder, split, part)
        if images is None:
            if self.folder is None:
                raise D2ZeroError("give --images DIR (or --data DIR) to find the images of the annotations")
            images = find_image_folder(self.folder, annotations)
        return Part(annotations, images)


@dataclass(frozen=True)
class _Names:
    annotations: str | None = None
    images: str | None = None


@dataclass(frozen=True)
class _Files:
    train: _Names = _Names()
    val: _Names = _Names()
    vocabulary: str | None = None
