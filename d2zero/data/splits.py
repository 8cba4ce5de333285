"""Zero-shot splits: which classes training may see.

A split is data: an ordered tuple of seen names and one of unseen names, read from a file. Those of COCO are packaged;
the order of their names is the order of the columns in published embedding files and of the categories in published
annotation files.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.checked_json import checked, refuse_unknown
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import atomic_write

PACKAGED = ("coco-48-17", "coco-65-15")
SUFFIXES = (".yaml", ".yml", ".json")
LARGEST_FILE = 64 << 20  # bytes of a split
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# fmt: off
COCO_IDS = {  # COCO's 80 names -> category ids, in COCO's order
    "person": 1, "bicycle": 2, "car": 3, "motorcycle": 4, "airplane": 5, "bus": 6, "train": 7, "truck": 8, "boat": 9,
    "traffic light": 10, "fire hydrant": 11, "stop sign": 13, "parking meter": 14, "bench": 15, "bird": 16, "cat": 17,
    "dog": 18, "horse": 19, "sheep": 20, "cow": 21, "elephant": 22, "bear": 23, "zebra": 24, "giraffe": 25,
    "backpack": 27, "umbrella": 28, "handbag": 31, "tie": 32, "suitcase": 33, "frisbee": 34, "skis": 35,
    "snowboard": 36, "sports ball": 37, "kite": 38, "baseball bat": 39, "baseball glove": 40, "skateboard": 41,
    "surfboard": 42, "tennis racket": 43, "bottle": 44, "wine glass": 46, "cup": 47, "fork": 48, "knife": 49,
    "spoon": 50, "bowl": 51, "banana": 52, "apple": 53, "sandwich": 54, "orange": 55, "broccoli": 56, "carrot": 57,
    "hot dog": 58, "pizza": 59, "donut": 60, "cake": 61, "chair": 62, "couch": 63, "potted plant": 64, "bed": 65,
    "dining table": 67, "toilet": 70, "tv": 72, "laptop": 73, "mouse": 74, "remote": 75, "keyboard": 76,
    "cell phone": 77, "microwave": 78, "oven": 79, "toaster": 80, "sink": 81, "refrigerator": 82, "book": 84,
    "clock": 85, "vase": 86, "scissors": 87, "teddy bear": 88, "hair drier": 89, "toothbrush": 90,
}
# fmt: on


@dataclass(frozen=True)
class Split:
    """Seen and unseen class names, each in order.

    Args:
        name: Names the split in files and vocabularies: letters, digits, `.`, `_` and `-`.
        seen: Classes that training may see.
        unseen: Classes that it may not.
        groups: Further groups of names to report accuracy for, such as LVIS's `rare`, `common` and `frequent`.

    Raises:
        D2ZeroError: The name cannot be part of a file's, a class is given twice, or a group has others.
    """

    name: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise D2ZeroError(f"a split's name has letters, digits, '.', '_' and '-', got {self.name!r}")
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise D2ZeroError(
                f"split {self.name} names {join_truncated(repeated)} more than once, or as seen and unseen"
            )
        for group, names in self.groups.items():
            unknown = sorted(set(names) - set(self.names))
            if unknown:
                raise D2ZeroError(f"group {group} of split {self.name} has {join_truncated(unknown)}, not in the split")

    @classmethod
    def without(cls, name: str, classes: Sequence[str], unseen: Sequence[str]) -> "Split":
        """The split of some classes, a few of which are unseen.

        Raises:
            D2ZeroError: An unseen class is not among them.
        """
        unknown = [entry for entry in unseen if entry not in set(classes)]
        if unknown:
            raise D2ZeroError(
                f"unseen classes {join_truncated(unknown)} are not among {join_truncated(classes, 10)}"
                f"{_comma_hint(classes)}"
            )
        return cls(name, tuple(entry for entry in classes if entry not in set(unseen)), tuple(unseen))

    @property
    def names(self) -> tuple[str, ...]:
        """Seen names, then unseen names."""
        return self.seen + self.unseen

    @property
    def tail(self) -> str:
        """How files of the split end: `48_17` for COCO's."""
        return file_tail(self.name)

    def is_seen(self, names: Iterable[str]) -> list[bool]:
        """One flag per name.

        Raises:
            D2ZeroError: A name is not of this split.
        """
        names, known = list(names), set(self.names)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise D2ZeroError(f"{join_truncated(unknown)} not in split {self.name} ({len(self.names)} classes)")
        seen = set(self.seen)
        return [name in seen for name in names]

    def as_vocabulary(self) -> Vocabulary:
        """Its classes without their embeddings, for what asks only which are seen."""
        flags = np.array([True] * len(self.seen) + [False] * len(self.unseen))
        return Vocabulary(self.names, np.ones((len(flags), 1), np.float32), flags)

    def save(self, path: Path) -> Path:
        """Write the split as `.yaml` or `.json`, atomically, and return its path."""
        content: dict[str, Any] = {"name": self.name, "seen": list(self.seen), "unseen": list(self.unseen)}
        if self.groups:
            content["groups"] = {group: list(names) for group, names in self.groups.items()}
        text = json.dumps(content, indent=1, ensure_ascii=False) if _suffix(path) == ".json" else _yaml_text(content)
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
        return path


def file_tail(split: str) -> str:
    """How files of a split end, by its name."""
    return split.removeprefix("coco-").replace("-", "_")


def find_split(name: str | Path) -> Split:
    """A split by its file, or a packaged one by its name; `48_17` and `coco-48-17` are the same.

    Raises:
        D2ZeroError: There is no such split, or its file cannot be used.
    """
    path = Path(name)
    if path.suffix.lower() in SUFFIXES:
        return read_split(path)
    key = str(name).lower().replace("_", "-")
    key = key if key.startswith("coco-") else f"coco-{key}"
    if key not in PACKAGED:
        raise D2ZeroError(
            f"split must be one of {', '.join(PACKAGED)} or a file ({', '.join(SUFFIXES)}), got {str(name)!r}"
        )
    return _packaged(key)


@cache
def _packaged(name: str) -> Split:
    content = files("d2zero.data").joinpath("split_files", f"{name}.yaml").read_text(encoding="utf-8")
    return checked(Split, parsed_yaml(content, name), name)


def read_split(path: Path) -> Split:
    """Read a split: `name`, `seen`, `unseen` and perhaps `groups`, in YAML or JSON.

    Raises:
        D2ZeroError: The file is absent, is neither, or is no split.
    """
    kind = _suffix(path)
    if not path.is_file():
        raise D2ZeroError(f"split {path} does not exist; expected a packaged one ({', '.join(PACKAGED)}) or a file")
    if path.stat().st_size > LARGEST_FILE:
        raise D2ZeroError(f"{path} is larger than any split ({LARGEST_FILE >> 20} MB)")
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if kind == ".json" else parsed_yaml(text, str(path))
    except D2ZeroError:
        raise
    except (ValueError, RecursionError) as error:
        expected = "JSON" if kind == ".json" else "YAML"
        raise D2ZeroError(f"{path} is not {expected} in UTF-8: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise D2ZeroError(f"{path} is no split: expected name, seen and unseen, got {type(values).__name__}")
    refuse_unknown(Split, values, f"fields in {path}:", by_hand=True)
    try:
        split = checked(Split, {"name": path.stem, "unseen": [], **values}, str(path), ("groups",), "correct it")
    except D2ZeroError as error:
        raise error if str(path) in str(error) else D2ZeroError(f"{path}: {error}") from error
    if not split.seen:
        raise D2ZeroError(f"{path}: split {split.name} has no seen classes")
    return split


def with_split(vocabulary: Vocabulary, split: Split | None) -> Vocabulary:
    """Keep a split's classes, in its order, and set which are seen; without a split, as it is.

    Raises:
        D2ZeroError: The vocabulary lacks classes of the split.
    """
    if split is None:
        return vocabulary
    lacking = [name for name in split.names if name not in set(vocabulary.names)]
    if lacking:
        raise D2ZeroError(f"the names lack {len(lacking)} classes of split {split.name}: {join_truncated(lacking)}")
    return replace(
        vocabulary.select(split.names),
        seen=np.array(split.is_seen(split.names)),
        source={**vocabulary.source, "split": split.name},
    )


def with_unseen(vocabulary: Vocabulary, unseen: Iterable[str]) -> Vocabulary:
    """The same classes, of which some are unseen and all others seen.

    Raises:
        D2ZeroError: The vocabulary lacks one.
    """
    names = set(unseen)
    unknown = sorted(names - set(vocabulary.names))
    if unknown:
        raise D2ZeroError(
            f"--unseen names {join_truncated(unknown)}, which the vocabulary lacks{_comma_hint(vocabulary.names)}"
        )
    seen = np.array([name not in names for name in vocabulary.names])
    source = {key: value for key, value in vocabulary.source.items() if key != "split"}
    return replace(vocabulary, seen=seen, source=source)


def check_split(vocabulary: Vocabulary, split: Split) -> None:
    """Refuse a vocabulary of another split.

    Raises:
        D2ZeroError: Its record, or its seen and unseen names, are of another split.
    """
    if vocabulary.split and vocabulary.split != split.name:
        raise D2ZeroError(
            f"the vocabulary is of split {vocabulary.split}, this needs {split.name}; make it with --split {split.name}"
        )
    wrong = sorted(set(split.seen) ^ set(vocabulary.seen_names))
    if wrong:
        raise D2ZeroError(
            f"the vocabulary's seen classes are not those of split {split.name}: {len(wrong)} differ"
            f" ({join_truncated(wrong)}); make it with --split {split.name}"
        )


def _comma_hint(names: Iterable[str]) -> str:
    """What to do where a name may have been taken for several."""
    with_comma = next((name for name in names if "," in name), None)
    return f"; names with commas ({with_comma!r}) are given in a file, one per line" if with_comma else ""


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise D2ZeroError(f"a split is a file of {', '.join(SUFFIXES)}, got {path.name!r}")
    return suffix


def parsed_yaml(text: str, where: str) -> Any:
    """YAML whose scalars are texts: a class called `no` or `1984` is no truth value and no number."""
    import yaml

    try:
        return yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise D2ZeroError(f"{where} is not YAML: {reason}") from error


def _yaml_text(content: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=116)
    return text
