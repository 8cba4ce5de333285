"""The zero-shot splits: which classes training may see, in the published order.

A split is data: an ordered tuple of seen names and one of unseen names. The order of the names is the order
of the columns in published embedding files and of the categories in published annotation files.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.errors import join_truncated

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
    """Seen and unseen class names, each in the published order."""

    name: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Seen names, then unseen names."""
        return self.seen + self.unseen

    def is_seen(self, names: Iterable[str]) -> list[bool]:
        """One flag per name.

        Raises:
            D2ZeroError: A name is not of this split.
        """
        names = list(names)
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise D2ZeroError(f"{join_truncated(unknown)} not in split {self.name} ({len(self.names)} classes)")
        return [name in self.seen for name in names]


# fmt: off
COCO_48_17 = Split(
    "coco-48-17",
    seen=(
        "person", "bicycle", "car", "motorcycle", "truck", "boat", "bench", "bird", "horse", "sheep", "zebra",
        "giraffe", "backpack", "handbag", "skis", "kite", "surfboard", "bottle", "spoon", "bowl", "banana", "apple",
        "orange", "broccoli", "carrot", "pizza", "donut", "chair", "bed", "tv", "laptop", "remote", "microwave", "oven",
        "refrigerator", "book", "clock", "vase", "toothbrush", "train", "bear", "suitcase", "frisbee", "fork",
        "sandwich", "toilet", "mouse", "toaster",
    ),
    unseen=(
        "bus", "dog", "cow", "elephant", "umbrella", "tie", "skateboard", "cup", "knife", "cake", "couch", "keyboard",
        "sink", "scissors", "airplane", "cat", "snowboard",
    ),
)
_UNSEEN_15 = (
    "airplane", "train", "parking meter", "cat", "bear", "suitcase", "frisbee", "snowboard", "fork", "sandwich",
    "hot dog", "toilet", "mouse", "toaster", "hair drier",
)
# fmt: on
COCO_65_15 = Split("coco-65-15", seen=tuple(name for name in COCO_IDS if name not in _UNSEEN_15), unseen=_UNSEEN_15)
SPLITS = {split.name: split for split in (COCO_48_17, COCO_65_15)}


def find_split(name: str) -> Split:
    """The split of that name; `48_17` and `coco-48-17` are the same.

    Raises:
        D2ZeroError: There is no such split.
    """
    key = name.lower().replace("_", "-")
    key = key if key.startswith("coco-") else f"coco-{key}"
    if key not in SPLITS:
        raise D2ZeroError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
    return SPLITS[key]


def check_split(vocabulary: Vocabulary, split: str) -> None:
    """Refuse a vocabulary of another split.

    Raises:
        D2ZeroError: Its record, or its seen and unseen names, are of another split.
    """
    recorded = vocabulary.source.get("split")
    if recorded and recorded != split:
        raise D2ZeroError(f"the vocabulary is of split {recorded}, this needs {split}; make it with --split {split}")
    if split in SPLITS:
        wrong = sorted(set(SPLITS[split].seen) ^ set(vocabulary.seen_names))
        if wrong:
            raise D2ZeroError(
                f"the vocabulary's seen classes are not those of split {split}: {len(wrong)} differ"
                f" ({join_truncated(wrong)});"
                f" make it with --split {split}"
            )
    if not vocabulary.seen.any():
        raise D2ZeroError("the vocabulary has no seen classes to train on")
