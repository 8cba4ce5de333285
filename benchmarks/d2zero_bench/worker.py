"""A candidate in a process of its own: its memory is its own, and so are its threads.

The parent sends one of four messages (`Prepare`, `Run`, `ReadMemory`, `Evaluate`) to one worker at a time and waits
for its answer; the other workers are idle meanwhile.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from d2zero_bench.candidates import Candidate, Outcome, Spec
from d2zero_bench.cases import Case
from d2zero_bench.memory import gpu_peak_mb, host_peak_mb, reset_gpu_peak, reset_host_peak
from d2zero_bench.peers import Peer
from d2zero_bench.report import Accuracy, CandidateInfo
from d2zero_bench.rounds import one_line
from d2zero_runtime import D2ZeroError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
Answer = TypeVar("Answer", covariant=True)


class Memory(NamedTuple):
    """The most that a worker has held since `Prepare`, in 1e6 bytes."""

    host_mb: float | None
    gpu_mb: float | None


class Message(Protocol[Answer]):
    """What the parent asks of a worker."""

    def answer(self, candidate: Candidate | Peer) -> Answer:
        """Done in the worker's process."""


@dataclass(frozen=True)
class Prepare:
    """Get ready for a case, and forget the last one's memory."""

    case: Case

    def answer(self, candidate: Candidate | Peer) -> None:
        """See `Message`."""
        candidate.prepare(self.case)
        reset_host_peak()
        reset_gpu_peak()


@dataclass(frozen=True)
class Run:
    """Run one batch, from files to detections; of a peer, its network."""

    case: Case
    paths: Sequence[Path]
    with_logits: bool = False

    def answer(self, candidate: Candidate | Peer) -> Outcome:
        """See `Message`."""
        return candidate.run(self.case, self.paths, self.with_logits)


@dataclass(frozen=True)
class ReadMemory:
    """Tell the peak memory."""

    def answer(self, candidate: Candidate | Peer) -> Memory:
        """See `Message`."""
        return Memory(host_peak_mb(), gpu_peak_mb())


@dataclass(frozen=True)
class Evaluate:
    """Measure the accuracy on annotated images; None for a peer."""

    annotations: Path
    images: Path
    limit: int | None = None

    def answer(self, candidate: Candidate | Peer) -> Accuracy | None:
        """See `Message`."""
        return candidate.evaluate(self.annotations, self.images, self.limit)


class Worker:
    """A new process, which begins to open a candidate."""

    info: CandidateInfo  # once it is open

    def __init__(self, spec: Spec) -> None:
        context = get_context("spawn")  # a fork would copy what this process has loaded
        self._connection, theirs = context.Pipe()
        self.name = spec.name
        self.process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        with _thread_variables(spec.threads):
            self.process.start()
        theirs.close()

    def open(self) -> "Worker":
        """Wait until the candidate is open. Others may be opening meanwhile.

        Raises:
            D2ZeroError: It cannot be opened; its process has ended then.
        """
        try:
            self.info = self._receive()
        except BaseException:
            self.close()
            raise
        return self

    def ask(self, message: Message[Answer]) -> Answer:
        """Send a message and wait for its answer.

        Raises:
            D2ZeroError: The candidate cannot do it, or its process has ended.
        """
        try:
            self._connection.send(message)
        except OSError as error:
            raise D2ZeroError(f"{self.name}: its process has ended") from error
        answer: Answer = self._receive()
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._connection.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()

    def _receive(self) -> Any:
        try:
            content = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join(5)
            raise D2ZeroError(
                f"{self.name}: its process ended with code {self.process.exitcode}; was there too little memory?"
            ) from error
        if isinstance(content, D2ZeroError):
            raise content
        return content


def _serve(connection: Connection, spec: Spec) -> None:
    """The worker's process: open the candidate, then answer messages until nobody sends any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    try:
        candidate = Peer(spec) if spec.peer else Candidate(spec)
        connection.send(candidate.info)
        while True:
            message = connection.recv()
            try:
                connection.send(message.answer(candidate))
            except (D2ZeroError, RuntimeError, MemoryError) as error:  # torch's and CUDA's are RuntimeErrors
                connection.send(_told(spec, error))
    except (EOFError, BrokenPipeError, ConnectionError):
        return
    except Exception as error:
        connection.send(_told(spec, error))


def _told(spec: Spec, error: Exception) -> D2ZeroError:
    text = one_line(error)
    return D2ZeroError(text if spec.name in text else f"{spec.name}: {text}")


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
