"""One evaluation by many processes: those that `torchrun` started, or workers of this one.

Both go the same way (`d2zero.evaluation.run`): one process plans, each evaluates every n-th batch of the plan into
files of its own, one sums up. A fresh run has the batches of a single process, so with as many threads its metrics are
equal to the last digit. Processes may be killed at any moment, and another number of them can continue.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from d2zero.data.coco_values import Id
from d2zero.evaluation.run import EvaluationRun, Progress
from d2zero.processes import Processes, joined
from d2zero_runtime import D2ZeroError, Mode, Segmenter

LONGEST_WAIT = timedelta(days=7)  # of a process that has finished its share, for the others
KEPT = "what was evaluated is kept; run the command again to continue"


def run_joined(run: EvaluationRun, device: str, progress: Progress | None = None) -> dict[Mode, dict[str, Any]] | None:
    """Join the processes of `torchrun` and evaluate a share; in the main process, wait for the others and sum up.

    Args:
        run: The same in all processes, except for the device of its model.
        device: Where a checkpoint runs, as `joined` takes it.
        progress: Shows the main process's share.

    Returns:
        As `EvaluationRun.run` in the main process, None in the others.

    Raises:
        D2ZeroError: Another process has ended before its share was evaluated.
    """
    with joined(device, "gloo", LONGEST_WAIT) as processes:  # gloo, as they finish minutes apart
        evaluate_share(run, processes, progress)
    return run.summaries() if processes.is_main else None


def evaluate_share(run: EvaluationRun, processes: Processes, progress: Progress | None = None) -> None:
    """Evaluate this process's share of the main one's plan, and wait until all have evaluated theirs.

    Args:
        run: The same in all processes, except for the device of its model.
        processes: This one among all, which have joined.
        progress: Shows the main process's share.

    Raises:
        D2ZeroError: Another process has ended before its share was evaluated.
    """
    plan: list[Any] = [run.plan(), run.folder] if processes.is_main else [None, None]
    with _others_alive():
        processes.share(plan)
    batches, run.folder = plan  # the main process's: a folder's name depends on the device
    share = batches[processes.rank :: processes.count]
    run.evaluate(share, processes.rank, progress if processes.is_main else None)
    with _others_alive():
        processes.wait()


def run_jobs(
    run: EvaluationRun, open_model: Callable[[], Segmenter], jobs: int, progress: Progress | None = None
) -> dict[Mode, dict[str, Any]]:
    """Evaluate in worker processes and sum up in this one; a script that calls it needs `if __name__ == "__main__"`.

    Args:
        run: What to evaluate; its model only says which vocabulary it has.
        open_model: Opens the same model in a worker; can be pickled.
        jobs: The number of workers.
        progress: Shows the batches that all workers have finished.

    Raises:
        D2ZeroError: A worker has ended early; the others are stopped then.
    """
    batches = run.plan()
    with closing(_finished(run, open_model, batches, min(jobs, len(batches)))) as finished:
        for _ in progress(finished, len(batches), "evaluating") if progress and batches else finished:
            pass
    return run.summaries()


def _finished(
    run: EvaluationRun, open_model: Callable[[], Segmenter], batches: Sequence[list[Id]], jobs: int
) -> Generator[list[Id], None, None]:
    """Start workers and yield each batch that one has finished; none outlives this."""
    context = multiprocessing.get_context("spawn")  # a fork would copy what this process has loaded
    given = {part.name: getattr(run, part.name) for part in fields(run) if part.init and part.name != "model"}
    given["annotations"] = replace(run.annotations, annotations={})  # large, and only summing up needs them
    workers: dict[Connection, BaseProcess] = {}
    try:
        with _interrupts_ignored():  # and so by the workers: Ctrl-C reaches all, and this process decides
            for shard in range(jobs):
                ours, theirs = context.Pipe(duplex=False)
                workers[ours] = context.Process(
                    target=_work,
                    args=(theirs, open_model, given, batches[shard::jobs], shard),
                    name=f"worker {shard + 1} of {jobs}",
                    daemon=True,
                )
                workers[ours].start()
                theirs.close()
        waiting = list(workers)
        while waiting:
            ready = wait(waiting)
            for pipe in [pipe for pipe in waiting if pipe in ready]:
                try:
                    content = pipe.recv()
                except (EOFError, OSError):  # it has ended, perhaps in the middle of a message
                    waiting.remove(pipe)
                    _check_finished(workers[pipe])
                    continue
                if isinstance(content, Exception):
                    raise content
                yield content
    finally:
        for process in workers.values():
            if process.pid is not None:
                process.kill()  # its files are whole up to its last line
                process.join()


def _work(
    pipe: Connection,
    open_model: Callable[[], Segmenter],
    given: dict[str, Any],
    batches: Sequence[list[Id]],
    shard: int,
) -> None:
    """A worker's process: evaluate a share and tell of each batch, or of the error that ended it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("d2zero").setLevel(logging.ERROR)  # the parent has warned of the same

    def told(items: Iterator[list[Id]], _length: int, _label: str) -> Iterator[list[Id]]:
        for batch in items:
            yield batch
            pipe.send(batch)

    try:
        EvaluationRun(open_model(), **given).evaluate(batches, shard, told)
    except (D2ZeroError, OSError) as error:
        pipe.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check_finished(process: BaseProcess) -> None:
    process.join()
    code = process.exitcode or 0
    if code:
        how = f"was killed by signal {-code}; was there too little memory?" if code < 0 else f"ended with code {code};"
        raise D2ZeroError(f"{process.name} (process {process.pid}) {how} {KEPT}")


@contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's
        raise D2ZeroError(f"another process has ended before its share was evaluated; {KEPT}") from error


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Only the main thread can ignore them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
