"""The shapes that an engine runs: smallest, best and largest.

An engine is built for a range of shapes and tuned for one of them. Letters: B batch, H and W the padded
input's sides, K classes. Written `BxHxWxK`, such as `1x800x1216x80`.
"""

from dataclasses import astuple, dataclass, fields

from d2zero_runtime.errors import D2ZeroError, join_truncated

STEP = 32  # of heights and widths: the network's coarsest stride


@dataclass(frozen=True)
class Shape:
    """What one run of the network takes.

    Args:
        batch: Number of images.
        height: The padded images' height, a multiple of 32.
        width: The padded images' width, a multiple of 32.
        classes: Number of classes in the vocabulary.

    Raises:
        D2ZeroError: A number is below one, or a side is no multiple of 32.
    """

    batch: int
    height: int
    width: int
    classes: int

    def __post_init__(self) -> None:
        if min(astuple(self)) < 1:
            raise D2ZeroError(f"a shape needs numbers of at least 1 (BxHxWxK), got {self}")
        if self.height % STEP or self.width % STEP:
            raise D2ZeroError(
                f"heights and widths are multiples of {STEP}, got {self.height} and {self.width} ({self})"
            )

    def __str__(self) -> str:
        return "x".join(str(number) for number in astuple(self))

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read `1x800x1216x80`: batch, height, width, classes.

        Raises:
            D2ZeroError: It is not four whole numbers, or they are no shape.
        """
        parts = text.lower().split("x")
        if len(parts) != 4 or not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
            raise D2ZeroError(f"a shape is batch x height x width x classes, such as 1x800x1216x80, got {text!r}")
        return cls(*(int(part) for part in parts))


@dataclass(frozen=True)
class Profile:
    """The range of shapes that an engine runs.

    Args:
        min: The smallest.
        opt: The one that it is fastest at.
        max: The largest; memory follows from it.

    Raises:
        D2ZeroError: A number of `min` is above that of `opt`, or one of `opt` above that of `max`.
    """

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        for entry in fields(Shape):
            low, best, high = (getattr(shape, entry.name) for shape in (self.min, self.opt, self.max))
            if not low <= best <= high:
                raise D2ZeroError(
                    f"shapes must grow from min to opt to max, the {entry.name} goes {low}, {best}, {high}"
                    f" (min {self.min}, opt {self.opt}, max {self.max})"
                )

    def require(self, shape: Shape) -> None:
        """Refuse a shape that the engine was not built for.

        Raises:
            D2ZeroError: It is outside, in the numbers that the line names.
        """
        outside = [
            f"{entry.name} {getattr(shape, entry.name)} ({low} to {high})"
            for entry in fields(Shape)
            for low, high in [(getattr(self.min, entry.name), getattr(self.max, entry.name))]
            if not low <= getattr(shape, entry.name) <= high
        ]
        if outside:
            raise D2ZeroError(
                f"this engine runs shapes from {self.min} to {self.max}, got {shape}: {', '.join(outside)};"
                " build another with `d2zero export --format tensorrt --min … --max …`"
            )

    def to_json(self) -> dict[str, str]:
        """As text, one entry per shape."""
        return {"min": str(self.min), "opt": str(self.opt), "max": str(self.max)}

    @classmethod
    def from_json(cls, values: dict[str, str]) -> "Profile":
        """Read what `to_json` wrote.

        Raises:
            D2ZeroError: A shape is absent, or is none.
        """
        missing = [name for name in ("min", "opt", "max") if name not in values]
        if missing:
            raise D2ZeroError(f"the shapes of an engine lack {join_truncated(missing)}")
        return cls(Shape.parse(values["min"]), Shape.parse(values["opt"]), Shape.parse(values["max"]))
