"""All that a benchmark found, as data: written to JSON, read back, and what tables and plots are made from.

Samples are kept, in milliseconds; statistics are derived from them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from d2zero_bench.cases import Case
from d2zero_runtime import D2ZeroError
from d2zero_runtime.files import write_text

FORMAT_VERSION = 2  # 1 had no stage "inference": its "network" was that
STAGES = ("decode", "preprocess", "inference", "postprocess")
NETWORK = "network"  # measured separately: inputs on the device, outputs left there
STAGE_NAMES = {
    NETWORK: "network",
    "decode": "decode",
    "preprocess": "preprocess",
    "inference": "inference",
    "postprocess": "post-process",
}
ARRAY, FILE = "array → detections", "file → detections"
SCOPES = {ARRAY: STAGES[1:], FILE: STAGES}

Sample = dict[str, float]  # milliseconds by stage, and of the network; a peer has only its network


@dataclass(frozen=True)
class Spread:
    """Percentiles of one quantity."""

    p10: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Of at least one sample."""
        return cls(*(float(value) for value in np.percentile(samples, (10, 50, 90, 99))))


def throughput(milliseconds: Sequence[float], batch: int) -> float:
    """Images per second, one batch after the other."""
    return 1000 * batch * len(milliseconds) / sum(milliseconds)


def ratios(samples: Sequence[float], baseline: Sequence[float]) -> Spread:
    """How many times the baseline's time a candidate takes, from samples of the same rounds.

    Both of a pair ran within moments of each other: what slows the machine for a while slows both.
    """
    return Spread.of([ours / theirs for ours, theirs in zip(samples, baseline, strict=True)])


@dataclass(frozen=True)
class CandidateInfo:
    """What was measured.

    Args:
        name: The candidate's name, unique in the report.
        kind: `d2zero`; `transformers`, from file to instances, too; or `peer` (only the network, random weights).
        backend: What ran its network, and where.
        precision: What it computes in.
        megabytes: The size of its file; None without one.
        queries: The model's queries.
        classes: Classes of its own vocabulary.
        decoder_layers: The model's decoder layers; 0 where that is not known.
    """

    name: str
    kind: str
    backend: str
    precision: str = "float32"
    megabytes: float | None = None
    queries: int = 0
    classes: int = 0
    decoder_layers: int = 0


@dataclass
class Result:
    """One candidate in one case.

    Args:
        candidate: The candidate's name.
        case: The setting.
        samples: One sample per round, in order; those of all candidates are paired.
        host_mb: The high-water mark of the candidate's own process while it was measured here, in 1e6 bytes.
        gpu_mb: What that process then held of GPUs.
    """

    candidate: str
    case: Case
    samples: list[Sample] = field(default_factory=list)
    host_mb: float | None = None
    gpu_mb: float | None = None

    @property
    def whole(self) -> bool:
        """Whether all stages were measured, from file to detections."""
        return bool(self.samples) and set(STAGES) <= set(self.samples[0])

    def times(self, what: str) -> list[float]:
        """Milliseconds of a stage, of the network or of a scope, one per round; empty if not measured."""
        parts = SCOPES.get(what, (what,))
        return [sum(sample[part] for part in parts) for sample in self.samples if set(parts) <= set(sample)]

    def spread(self, what: str) -> Spread | None:
        """Percentiles of a stage, of the network or of a scope."""
        found = self.times(what)
        return Spread.of(found) if found else None

    @property
    def images_per_second(self) -> float | None:
        """Throughput from files, stages one after the other; for a peer, of its network."""
        found = self.times(FILE) or self.times(NETWORK)
        return throughput(found, self.case.batch) if found else None


@dataclass(frozen=True)
class Equality:
    """Raw outputs compared with the baseline's.

    Args:
        candidate: The candidate's name.
        case: Where they ran.
        class_logits: The largest difference; None if shapes differ.
        mask_logits: The largest difference.
        failures: What exceeds the limits of the precision; empty if nothing does.
        class_most: The largest difference of nine queries in ten (`d2zero_export.parity`); None in older reports.
        mask_most: The same of mask logits.
    """

    candidate: str
    case: Case
    class_logits: float | None
    mask_logits: float | None
    failures: tuple[str, ...] = ()
    class_most: float | None = None
    mask_most: float | None = None


@dataclass(frozen=True)
class Accuracy:
    """Metrics of one candidate in percent, of masks; by name as `d2zero eval` has them."""

    candidate: str
    mode: str
    images: int
    figures: dict[str, float | None]


@dataclass
class Report:
    """A benchmark's findings, filled while it runs.

    Args:
        title: The report's title.
        environment: Where it ran.
        settings: How it ran.
        baseline: The candidate that others are compared with.
    """

    title: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    baseline: str
    candidates: list[CandidateInfo] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    equality: list[Equality] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # by candidate: why it was measured no further
    complete: bool = False

    @property
    def cases(self) -> list[Case]:
        """Those with results, in order."""
        return list(dict.fromkeys(result.case for result in self.results if result.samples))

    def find(self, candidate: str, case: Case) -> Result | None:
        """A candidate's result in a case, if it has samples."""
        fits = (r for r in self.results if r.candidate == candidate and r.case == case and r.samples)
        return next(fits, None)

    def of_case(self, case: Case) -> list[Result]:
        """Results of a case in the order of the candidates."""
        found = (self.find(info.name, case) for info in self.candidates)
        return [result for result in found if result is not None]

    def ratio(self, result: Result, what: str = FILE) -> Spread | None:
        """How many times the baseline's time, from paired rounds; None if either was not measured."""
        base = self.find(self.baseline, result.case)
        ours, theirs = result.times(what), base.times(what) if base else []
        rounds = min(len(ours), len(theirs))  # one that failed has fewer
        return ratios(ours[:rounds], theirs[:rounds]) if rounds else None

    def accuracy_of(self, candidate: str) -> Accuracy | None:
        """A candidate's accuracy, if it was measured."""
        return next((entry for entry in self.accuracy if entry.candidate == candidate), None)

    def equality_of(self, candidate: str, case: Case) -> Equality | None:
        """What was compared at a case's size and classes, whatever its batch."""
        return next(
            (
                entry
                for entry in self.equality
                if entry.candidate == candidate
                and (entry.case.height, entry.case.width) == (case.height, case.width)
                and entry.case.classes == case.classes
            ),
            None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the statistics that follow from the samples for those who read the JSON."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        for entry, result in zip(content["results"], self.results, strict=True):
            entry["samples"] = [
                {stage: round(value, 4) for stage, value in sample.items()} for sample in entry["samples"]
            ]
            entry["figures"] = self._figures(result)
        return content

    def _figures(self, result: Result) -> dict[str, Any]:
        spreads = {what: result.spread(what) for what in (*STAGES, NETWORK, *SCOPES)}
        both = {what: self.ratio(result, what) for what in (NETWORK, *SCOPES)}
        return {
            "milliseconds": {stage: asdict(spread) for stage, spread in spreads.items() if spread},
            "ratio": {stage: asdict(spread) for stage, spread in both.items() if spread},
            "images_per_second": result.images_per_second,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Report":
        """Read what `to_dict` made, now or in version 1.

        Raises:
            D2ZeroError: It was written by a newer version, or is something else.
        """
        version = content.get("format_version") if isinstance(content, dict) else None
        if version not in (1, FORMAT_VERSION):
            raise D2ZeroError(f"expected a benchmark's report up to version {FORMAT_VERSION}, got version {version}")
        try:
            report = msgspec.convert(content, cls)
        except msgspec.ValidationError as error:
            raise D2ZeroError(f"this report of a benchmark is damaged: {error}") from error
        for sample in (sample for result in report.results for sample in result.samples):
            if version == 1 and "decode" in sample:  # its network ran between the other stages, copies included
                sample["inference"] = sample[NETWORK]
        return report

    def write(self, path: Path) -> None:
        """Write the JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read a written report.

        Raises:
            D2ZeroError: It is no report.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise D2ZeroError(f"{path} is no JSON: {error}") from error
        except D2ZeroError as error:
            raise D2ZeroError(f"{path}: {error}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain data, atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def names(report: Report, kinds: Sequence[str] = ("d2zero", "transformers", "peer")) -> list[str]:
    """Names of the candidates of some kinds."""
    return [info.name for info in report.candidates if info.kind in kinds]
