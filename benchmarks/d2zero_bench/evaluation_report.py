"""What a benchmark of the evaluation found: samples, and the figures that follow from them.

Its JSON is another than that of models (`d2zero_bench.report`) and lies in a folder of its own,
`benchmarks/results/evaluation/`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from d2zero_bench.figures import percentile, ratios
from d2zero_bench.report import write_json

FORMAT_VERSION = 1
QUANTITIES = ("wall_s", "cpu_s", "peak_mb")


@dataclass(frozen=True)
class Sample:
    """One run of one candidate, in a process of its own, from its start to its end.

    Args:
        candidate: its name.
        images: evaluated.
        wall_s: seconds.
        cpu_s: processor seconds, of the program and the system for it.
        peak_mb: largest resident memory in 1e6 bytes.
    """

    candidate: str
    images: int
    wall_s: float
    cpu_s: float
    peak_mb: float


@dataclass
class EvaluationReport:
    """Findings, filled while it is measured.

    Args:
        environment: where it ran.
        settings: how it ran.
        baseline: the candidate that others are compared with.
        samples: in order; those of a round are paired.
        equality: largest difference to the baseline in percentage points, by number of images.
        complete: whether all that was asked for was measured.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    baseline: str
    samples: list[Sample] = field(default_factory=list)
    equality: dict[int, float] = field(default_factory=dict)
    complete: bool = False

    @property
    def candidates(self) -> list[str]:
        """Those with samples, the baseline last."""
        found = dict.fromkeys(sample.candidate for sample in self.samples)
        return sorted(found, key=lambda name: (name == self.baseline, name))

    @property
    def images(self) -> list[int]:
        """Numbers of images, rising."""
        return sorted({sample.images for sample in self.samples})

    def values(self, candidate: str, images: int, quantity: str) -> list[float]:
        """A quantity of each round."""
        return [getattr(s, quantity) for s in self.samples if (s.candidate, s.images) == (candidate, images)]

    def median(self, candidate: str, images: int, quantity: str) -> float:
        """Over the rounds."""
        return percentile(self.values(candidate, images, quantity), 50)

    def ratio(self, candidate: str, images: int, quantity: str) -> float:
        """To the baseline, the median of the rounds' ratios."""
        of_baseline = self.values(self.baseline, images, quantity)
        return ratios(self.values(candidate, images, quantity), of_baseline).p50

    def growth(self, candidate: str, quantity: str) -> float | None:
        """For each image more, between the fewest and the most images; None if there is one number alone."""
        few, many = self.images[0], self.images[-1]
        if few == many:
            return None
        return (self.median(candidate, many, quantity) - self.median(candidate, few, quantity)) / (many - few)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the figures that follow from the samples."""
        return {"kind": "evaluation", "format_version": FORMAT_VERSION, **asdict(self), "figures": self._figures()}

    def _figures(self) -> dict[str, Any]:
        return {
            name: {
                "growth_an_image": {quantity: self.growth(name, quantity) for quantity in QUANTITIES},
                "images": {
                    str(images): {
                        quantity: {
                            "median": self.median(name, images, quantity),
                            "ratio": round(self.ratio(name, images, quantity), 4),
                        }
                        for quantity in QUANTITIES
                    }
                    for images in self.images
                },
            }
            for name in self.candidates
        }

    def write(self, path: Path) -> None:
        """Write the JSON, atomically."""
        write_json(path, self.to_dict())


def table(report: EvaluationReport) -> Table:
    """A row a candidate and number of images, and one for what an image more costs."""
    drawn = Table(title=f"evaluation, medians of {report.settings.get('repeats')} runs; × is to {report.baseline}")
    for head in ("", "images", "seconds", "×", "processor s", "×", "peak MB", "×"):
        drawn.add_column(head, justify="left" if not head else "right")
    for name in report.candidates:
        for images in report.images:
            cells = [_cells(report, name, images, quantity) for quantity in QUANTITIES]
            drawn.add_row(name, str(images), *(cell for pair in cells for cell in pair))
        growth = [report.growth(name, quantity) for quantity in QUANTITIES]
        if None not in growth:
            drawn.add_row(
                "", "each more", *(cell for value in growth for cell in (f"{value:.4f}", "")), end_section=True
            )
    return drawn


def _cells(report: EvaluationReport, name: str, images: int, quantity: str) -> Sequence[str]:
    return f"{report.median(name, images, quantity):.1f}", f"{report.ratio(name, images, quantity):.2f}"
