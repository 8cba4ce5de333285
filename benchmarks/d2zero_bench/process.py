"""A candidate in a process of its own: its memory is its own, and so are its threads.

The parent asks one candidate at a time; the others wait and take no time of the processor.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from d2zero_bench.candidates import Spec, open_candidate
from d2zero_bench.cases import Case
from d2zero_bench.report import Accuracy, CandidateInfo, Sample
from d2zero_runtime import D2ZeroError
from d2zero_runtime.backends.base import Raw

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class OwnProcess:
    """A candidate in a new process, which begins to open it; see `d2zero_bench.candidates.Candidate`."""

    info: CandidateInfo  # once it is open

    def __init__(self, spec: Spec) -> None:
        context = get_context("spawn")  # a fork would copy what this process has loaded
        self._connection, theirs = context.Pipe()
        self._name = spec.name
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        with _thread_variables(spec.threads):
            self._process.start()
        theirs.close()

    def open(self) -> "OwnProcess":
        """Wait until the candidate is open. Others may be opening meanwhile.

        Raises:
            D2ZeroError: It cannot be opened; its process has ended then.
        """
        try:
            self.info = self._answer()
        except BaseException:
            self.close()
            raise
        return self

    def prepare(self, case: Case) -> None:
        """See `Candidate`."""
        self._ask("prepare", case)

    def run(self, case: Case, paths: Sequence[Path]) -> Sample:
        """See `Candidate`."""
        sample: Sample = self._ask("run", case, paths)
        return sample

    def raw(self, case: Case, paths: Sequence[Path]) -> Raw | None:
        """See `Candidate`."""
        found: Raw | None = self._ask("raw", case, paths)
        return found

    def memory(self) -> tuple[float | None, float | None]:
        """See `Candidate`."""
        found: tuple[float | None, float | None] = self._ask("memory")
        return found

    def accuracy(self, annotations: Path, images: Path, limit: int | None) -> Accuracy | None:
        """See `Candidate`."""
        found: Accuracy | None = self._ask("accuracy", annotations, images, limit)
        return found

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._connection.close()
        self._process.terminate()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise D2ZeroError(f"{self._name}: its process has ended") from error
        return self._answer()

    def _answer(self) -> Any:
        try:
            good, content = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(5)
            raise D2ZeroError(
                f"{self._name}: its process ended with code {self._process.exitcode}; was there too little memory?"
            ) from error
        if not good:
            raise D2ZeroError(content)
        return content


def _serve(connection: Connection, spec: Spec) -> None:
    """The other process: open the candidate, then do what is asked, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    try:
        candidate = open_candidate(spec)
        connection.send((True, candidate.info))
        while True:
            method, arguments = connection.recv()
            try:
                connection.send((True, getattr(candidate, method)(*arguments)))
            except (D2ZeroError, RuntimeError, MemoryError) as error:  # torch's and CUDA's are RuntimeErrors
                connection.send((False, _line(spec, error)))
    except (EOFError, BrokenPipeError, ConnectionError):
        return
    except Exception as error:
        connection.send((False, _line(spec, error)))


def _line(spec: Spec, error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, D2ZeroError):
        text = f"{type(error).__name__}: {text[:300]}"
    return text if spec.name in text else f"{spec.name}: {text}"


@contextmanager
def _thread_variables(threads: int | None) -> Iterator[None]:
    """Set for a process that starts now: libraries read them once, when they load."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    if threads:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
