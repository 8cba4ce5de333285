"""What to measure: the options of `d2zero benchmark`, checked once, and the candidates that follow from them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from d2zero_bench.candidates import VARIANTS, Spec
from d2zero_bench.gates import Gate
from d2zero_bench.peers import known_peers
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.formats import is_exported
from d2zero_runtime.images import Size
from d2zero_runtime.masks.postprocess import MASK_KINDS


@dataclass(frozen=True)
class Plan:
    """What to measure, and how.

    Args:
        models: Checkpoints, exported models, and folders of transformers.
        variants: Variants of each checkpoint, among `VARIANTS`; the model itself if left out.
        peers: Peers' names, or `all`; see `d2zero_bench.peers`.
        baseline: The candidate that others are compared with; the first by default.
        sizes: (height, width) of the images; the baseline's own size for an ordinary photo if left out.
        batches: Images per batch.
        classes: Numbers of drawn classes; None is the model's own vocabulary.
        grid: All combinations, instead of one thing at a time around the first of each.
        images: A folder of photos; drawn photos without it.
        annotations: COCO JSON of these photos, to measure accuracy too.
        limit: Measure accuracy on only the first so many images.
        rounds: Rounds per case; in each, every candidate runs one batch.
        warmup: Runs of a candidate before a case's first round, not counted.
        seed: Seed of the candidates' order in each round.
        compared: Batches whose raw outputs are compared.
        threads: Threads of each candidate; each library's own choice if left out.
        providers: Providers of an `.onnx`, one candidate per provider.
        providers_of: Providers of single files, instead of `providers`.
        device: Where torch runs: auto, cpu or cuda:N.
        masks: The kind of masks that post-processing makes.
        max_p90: Limits of the 90th percentile of file → detections, in milliseconds.
        min_hm: Limits of the harmonic mean of AP50.
        left_out: Candidates that could not be made, and why.
        all_must_open: Fail if a candidate cannot be opened, instead of leaving it out; the baseline always must.
        title: The report's title.

    Raises:
        D2ZeroError: The options do not fit together.
    """

    models: tuple[Path, ...]
    variants: tuple[str, ...] | None = None
    peers: tuple[str, ...] = ()
    baseline: str | None = None
    sizes: tuple[Size, ...] = ()
    batches: tuple[int, ...] = (1,)
    classes: tuple[int | None, ...] = (None,)
    grid: bool = False
    images: Path | None = None
    annotations: Path | None = None
    limit: int | None = None
    rounds: int = 20
    warmup: int = 2
    seed: int = 0
    compared: int = 1
    threads: int | None = None
    providers: tuple[str, ...] | None = None
    providers_of: Mapping[Path, tuple[str, ...]] = field(default_factory=dict)
    device: str = "auto"
    masks: str = "rle"
    max_p90: tuple[Gate, ...] = ()
    min_hm: tuple[Gate, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    all_must_open: bool = True
    title: str = "D2Zero benchmark"

    def __post_init__(self) -> None:
        exported = [path for path in self.models if is_exported(path) or path.is_dir()]
        if not self.models:
            raise D2ZeroError("there is no model to measure")
        if self.annotations and not self.images:
            raise D2ZeroError("--annotations need the folder of their images: give --images")
        if self.min_hm and not self.annotations:
            raise D2ZeroError("--min-hm needs accuracy: give --annotations and --images")
        if self.masks not in MASK_KINDS:
            raise D2ZeroError(f"--masks must be one of {', '.join(MASK_KINDS)}, got {self.masks!r}")
        if self.rounds < 1 or self.warmup < 0:
            raise D2ZeroError(f"--rounds must be at least 1 and --warmup 0, got {self.rounds} and {self.warmup}")
        if self.variants and len(exported) == len(self.models):
            raise D2ZeroError("--variant is for checkpoints (.safetensors), and none was given")
        if self.providers and not any(path.suffix == ".onnx" for path in self.models):
            raise D2ZeroError("--providers is for exported models (.onnx), and none was given")
        self._check_names()

    def _check_names(self) -> None:
        known = [spec.name for spec in self.specs]
        twice = [name for name, count in Counter(known).items() if count > 1]
        if twice:
            raise D2ZeroError(f"two candidates are called {twice[0]!r}; give files of different names")
        ours = [spec.name for spec in self.specs if not spec.peer]
        if self.baseline_name not in ours:
            raise D2ZeroError(f"--baseline must be one of {join_truncated(ours, 20)}; got {self.baseline!r}")
        for gate in (*self.max_p90, *self.min_hm):
            if gate.candidate and gate.candidate not in ours:
                raise D2ZeroError(f"a limit is for {gate.candidate!r}, but there are only {join_truncated(ours)}")

    @property
    def baseline_name(self) -> str:
        """The candidate that others are compared with."""
        return self.baseline or self.specs[0].name

    @cached_property
    def specs(self) -> tuple[Spec, ...]:
        """The candidates; peers get their queries and classes from the baseline, once it is open."""
        peers = (Spec(peer, peer=peer, device=self.device, threads=self.threads) for peer in known_peers(self.peers))
        return (*(spec for path in self.models for spec in self._specs_of(path)), *peers)

    def _specs_of(self, path: Path) -> list[Spec]:
        model = Spec(path.name, path, device=self.device, threads=self.threads, masks=self.masks)
        providers = self.providers_of.get(path, self.providers)
        if path.suffix == ".onnx" and providers:
            several = len(providers) > 1 or path in self.providers_of
            return [
                replace(model, name=f"{path.name}:{provider}" if several else path.name, providers=(provider,))
                for provider in providers
            ]
        if is_exported(path) or path.is_dir():
            return [model]
        chosen = self.variants or ("model",)
        unknown = [name for name in chosen if name not in VARIANTS]
        if unknown:
            raise D2ZeroError(f"--variant must be among {', '.join(VARIANTS)}; got {unknown[0]!r}")
        return [
            replace(model, name=path.name if name == "model" else f"{path.name}:{name}", variant=name)
            for name in chosen
        ]
