"""Images on their way to the network: read ahead in threads, and grouped into batches."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d2zero_runtime.backends.inputs import Input
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.images import Size
from d2zero_runtime.sources import ImageLike

logger = logging.getLogger("d2zero")

OnError = Callable[[ImageLike, D2ZeroError], None]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Prepared:
    """One image, ready for the network."""

    source: ImageLike
    pixels: Input  # of one image
    input_size: Size
    output_size: Size
    padded_size: Size
    image: Image.Image | NDArray[np.uint8] | None  # as it was read, if that is wanted


def read_ahead(
    sources: Iterator[ImageLike],
    prepare: Callable[[ImageLike], Prepared],
    readers: ThreadPoolExecutor,
    ahead: int,
    on_error: OnError | None,
) -> Iterator[Prepared]:
    """Sources in order, some of them being read at a time.

    Args:
        sources: Images.
        prepare: Reads one.
        readers: Threads that do so.
        ahead: The number of sources that are read before they are asked for.
        on_error: Told of a source that cannot be read, which is then skipped; without it, that raises.
    """
    waiting: deque[tuple[ImageLike, Future[Prepared]]] = deque()
    for source in sources:
        waiting.append((source, readers.submit(prepare, source)))
        if len(waiting) > ahead:
            yield from _taken(*waiting.popleft(), on_error)
    while waiting:
        yield from _taken(*waiting.popleft(), on_error)


def _taken(source: ImageLike, future: Future[Prepared], on_error: OnError | None) -> Iterator[Prepared]:
    try:
        yield future.result()
    except D2ZeroError as error:
        if on_error is None:
            raise
        logger.warning("skipped: %s", error)
        on_error(source, error)


def one_behind(submitted: Iterator[Future[T]]) -> Iterator[T]:
    """What other threads make, in order: the next is handed over before the last is waited for."""
    waiting: deque[Future[T]] = deque()
    for future in submitted:
        waiting.append(future)
        if len(waiting) > 1:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def grouped(prepared: Iterator[Prepared], batch_size: int) -> Iterator[list[Prepared]]:
    """Neighbours of one padded size, at most `batch_size` of them."""
    group: list[Prepared] = []
    for entry in prepared:
        if group and (len(group) == batch_size or entry.padded_size != group[0].padded_size):
            yield group
            group = []
        group.append(entry)
        if len(group) == batch_size:
            yield group
            group = []
    if group:
        yield group
