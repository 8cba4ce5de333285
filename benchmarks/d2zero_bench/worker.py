"""A candidate in a process of its own: its memory is its own, and so are its threads.

The parent has one worker at a time call a function (`prepare`, `run`, `read_memory`, `evaluate`) with its candidate,
and waits for the result; the other workers are idle meanwhile.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from d2zero_bench.candidates import Candidate, Outcome, Spec
from d2zero_bench.cases import Case
from d2zero_bench.memory import gpu_peak_mb, host_peak_mb, reset_gpu_peak, reset_host_peak
from d2zero_bench.peers import Peer
from d2zero_bench.report import Accuracy, CandidateInfo
from d2zero_bench.rounds import one_line
from d2zero_bench.transformers_model import TransformersModel
from d2zero_runtime import D2ZeroError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
Measured = Candidate | Peer | TransformersModel
Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")


class Memory(NamedTuple):
    """The most that a worker has held since `prepare`, in 1e6 bytes."""

    host_mb: float | None
    gpu_mb: float | None


def prepare(candidate: Measured, case: Case) -> None:
    """Get ready for a case, and forget the last one's memory."""
    candidate.prepare(case)
    reset_host_peak()
    reset_gpu_peak()


def run(candidate: Measured, case: Case, paths: Sequence[Path], with_logits: bool = False) -> Outcome:
    """Run one batch, from files to detections; of a peer, its network."""
    return candidate.run(case, paths, with_logits)


def read_memory(candidate: Measured) -> Memory:
    """Tell the peak memory."""
    return Memory(host_peak_mb(), gpu_peak_mb())


def evaluate(candidate: Measured, annotations: Path, images: Path, limit: int | None) -> Accuracy | None:
    """Measure the accuracy on annotated images; None for a peer."""
    return candidate.evaluate(annotations, images, limit)


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

    def ask(
        self,
        function: Callable[Concatenate[Measured, Arguments], Answer],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Answer:
        """Call a function of this module with the candidate and more arguments, and wait for its result.

        Raises:
            D2ZeroError: The candidate cannot do it, or its process has ended.
        """
        try:
            self._connection.send((function, arguments, named))
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
    """The worker's process: open the candidate, then call functions until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    try:
        candidate = _opened(spec)
        connection.send(candidate.info)
        while True:
            function, arguments, named = connection.recv()
            try:
                connection.send(function(candidate, *arguments, **named))
            except (D2ZeroError, RuntimeError, MemoryError) as error:  # torch's and CUDA's are RuntimeErrors
                connection.send(_told(spec, error))
    except (EOFError, BrokenPipeError, ConnectionError):
        return
    except Exception as error:
        connection.send(_told(spec, error))


def _opened(spec: Spec) -> Measured:
    if spec.path is None:
        return Peer(spec)
    return TransformersModel(spec) if spec.path.is_dir() else Candidate(spec)


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
