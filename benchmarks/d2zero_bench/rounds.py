"""Candidates one after the other, round by round, in a new order each round.

A machine that drifts (heat, neighbours) slows all candidates of a round alike; ratios are of pairs of a round.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from d2zero_bench.environment import without_folders
from d2zero_runtime import D2ZeroError

Progress = Callable[[Iterator[int], int, str], Iterator[int]]
Found = TypeVar("Found")


def round_order(names: Sequence[str], label: str, number: int, seed: int) -> list[str]:
    """The order of candidates in one round: a function of the seed, the label and the round."""
    return Random(f"{seed} {label} {number}").sample(names, len(names))


def one_line(error: Exception) -> str:
    """What an error says; of others' errors, which may be long, the kind and the beginning."""
    text = " ".join(str(error).split())
    return text if isinstance(error, D2ZeroError) else f"{type(error).__name__}: {text[:400]}"


@dataclass
class Rounds:
    """Runs candidates; one that cannot go on is left out from there.

    Args:
        failures: By candidate, why it was measured no further; filled.
        seed: Seed of the orders.
        progress: Wraps loops, as `d2zero.cli.terminal.tracked` does.
        noted: The errors that leave a candidate out; others end the measurement.
    """

    failures: dict[str, str]
    seed: int
    progress: Progress
    noted: tuple[type[Exception], ...] = (D2ZeroError,)

    @contextmanager
    def noting_failure(self, name: str) -> Iterator[None]:
        """Note an error of one candidate; the others go on."""
        try:
            yield
        except self.noted as error:
            self.failures.setdefault(name, without_folders(one_line(error)))

    def take(
        self, names: Sequence[str], rounds: int, label: str, measure: Callable[[str, int], Found]
    ) -> Iterator[dict[str, Found]]:
        """Measure by name and number of the round; only whole rounds are given, as their samples are pairs."""
        for number in self.progress(iter(range(rounds)), rounds, label):
            found = {}
            for name in round_order(names, label, number, self.seed):
                if name not in self.failures:
                    with self.noting_failure(name):
                        found[name] = measure(name, number)
            yield found
