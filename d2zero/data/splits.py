"""The zero-shot splits: which classes training may see, in the published order.

A split is data: an ordered tuple of seen names and one of unseen names. The order of the names is the order
of the columns in published embedding files and of the categories in published annotation files.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import listed

COCO_IDS: dict[str, int] = {}  # COCO's 80 names -> category ids, in COCO's order
_COCO = """1 person,2 bicycle,3 car,4 motorcycle,5 airplane,6 bus,7 train,8 truck,9 boat,10 traffic light,
11 fire hydrant,13 stop sign,14 parking meter,15 bench,16 bird,17 cat,18 dog,19 horse,20 sheep,21 cow,
22 elephant,23 bear,24 zebra,25 giraffe,27 backpack,28 umbrella,31 handbag,32 tie,33 suitcase,34 frisbee,
35 skis,36 snowboard,37 sports ball,38 kite,39 baseball bat,40 baseball glove,41 skateboard,42 surfboard,
43 tennis racket,44 bottle,46 wine glass,47 cup,48 fork,49 knife,50 spoon,51 bowl,52 banana,53 apple,
54 sandwich,55 orange,56 broccoli,57 carrot,58 hot dog,59 pizza,60 donut,61 cake,62 chair,63 couch,
64 potted plant,65 bed,67 dining table,70 toilet,72 tv,73 laptop,74 mouse,75 remote,76 keyboard,
77 cell phone,78 microwave,79 oven,80 toaster,81 sink,82 refrigerator,84 book,85 clock,86 vase,87 scissors,
88 teddy bear,89 hair drier,90 toothbrush"""
for _entry in _COCO.replace("\n", "").split(","):
    _number, _name = _entry.split(" ", 1)
    COCO_IDS[_name] = int(_number)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.replace("\n", " ").split(","))


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
        """A flag a name.

        Raises:
            D2ZeroError: a name is not of this split.
        """
        names = list(names)
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise D2ZeroError(f"{listed(unknown)} not in split {self.name} ({len(self.names)} classes)")
        return [name in self.seen for name in names]


COCO_48_17 = Split(
    "coco-48-17",
    seen=_names(
        """person,bicycle,car,motorcycle,truck,boat,bench,bird,horse,sheep,zebra,giraffe,backpack,handbag,skis,
        kite,surfboard,bottle,spoon,bowl,banana,apple,orange,broccoli,carrot,pizza,donut,chair,bed,tv,laptop,
        remote,microwave,oven,refrigerator,book,clock,vase,toothbrush,train,bear,suitcase,frisbee,fork,
        sandwich,toilet,mouse,toaster"""
    ),
    unseen=_names(
        """bus,dog,cow,elephant,umbrella,tie,skateboard,cup,knife,cake,couch,keyboard,sink,scissors,airplane,
        cat,snowboard"""
    ),
)
_UNSEEN_15 = _names(
    """airplane,train,parking meter,cat,bear,suitcase,frisbee,snowboard,fork,sandwich,hot dog,toilet,mouse,
    toaster,hair drier"""
)
COCO_65_15 = Split("coco-65-15", seen=tuple(name for name in COCO_IDS if name not in _UNSEEN_15), unseen=_UNSEEN_15)
SPLITS = {split.name: split for split in (COCO_48_17, COCO_65_15)}


def find_split(name: str) -> Split:
    """The split of that name; `48_17` and `coco-48-17` are the same.

    Raises:
        D2ZeroError: there is no such split.
    """
    key = name.lower().replace("_", "-")
    key = key if key.startswith("coco-") else f"coco-{key}"
    if key not in SPLITS:
        raise D2ZeroError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
    return SPLITS[key]
