"""Whether a backend gives each of several threads the result of its own call."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

from d2zero_runtime.backends.base import Backend

THREADS, CALLS = 4, 20


def assert_own_results(backend: Backend, width: int, size: tuple[int, int] = (64, 96)) -> None:
    """Run different images with different vocabularies in threads; results must equal those of one thread.

    Args:
        backend: Takes float arrays; called by several threads simultaneously.
        width: Of its class embeddings.
        size: (height, width) of the images.
    """
    random = np.random.default_rng(0)
    given = [
        (
            random.standard_normal((1, 3, *size)).astype(np.float32),
            random.standard_normal((2 + number, width)).astype(np.float32),
        )
        for number in range(THREADS)
    ]
    expected = [[np.array(part) for part in backend.run(*arguments)] for arguments in given]
    start = Barrier(THREADS)

    def work(number: int) -> None:
        start.wait()
        for _ in range(CALLS):
            for ours, theirs in zip(backend.run(*given[number]), expected[number], strict=True):
                np.testing.assert_array_equal(np.asarray(ours), theirs)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, number) for number in range(THREADS)]:
            done.result()
