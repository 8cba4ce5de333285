"""A shard of an index: a Parquet file with one row per image, which any tool reads.

Columns: `path`, `sha256` of the file, `height`, `width`, and of its Q queries `boxes` (4·Q), `qualities` (Q), `masks`
(Q COCO run lengths), `queries` (Q·C features) and `background` (C). Under `d2zero_model` in the file's metadata is the
identity of the model (`Segmenter.identity`).

Letters: N images, Q queries, C hidden channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.errors import D2ZeroError, optional
from d2zero_runtime.files import atomic_write, file_hash
from d2zero_runtime.images import Size
from d2zero_runtime.masks.queries import KeptMasks
from d2zero_runtime.segments import Segments

MODEL_KEY = b"d2zero_model"
Features = Literal["float16", "float32"]


@dataclass(frozen=True)
class IndexedImage:
    """An image of an index.

    Args:
        path: The file that was segmented.
        sha256: The hash of its content.
        size: (height, width).
    """

    path: str
    sha256: str
    size: Size

    @property
    def problem(self) -> str:
        """Why the file cannot be drawn on; empty if it is there and the same."""
        try:
            return "" if file_hash(self.path) == self.sha256 else "image has changed"
        except FileNotFoundError:
            return "image is gone"
        except OSError:
            return "image cannot be read"


@dataclass(frozen=True, eq=False)
class Rows:
    """Some images of a shard.

    Args:
        images: N images.
        queries_NQC: Features, float32.
        background_NC: float32.
        boxes_NQ4: Pixels, float32.
        qualities_NQ: float32.
        counts: N·Q run lengths.
    """

    images: tuple[IndexedImage, ...]
    queries_NQC: NDArray[np.float32]
    background_NC: NDArray[np.float32]
    boxes_NQ4: NDArray[np.float32]
    qualities_NQ: NDArray[np.float32]
    counts: "_Texts"

    def __len__(self) -> int:
        return len(self.images)

    def masks(self, row: int) -> KeptMasks:
        """The masks of one image, as post-processing takes them."""
        count = self.qualities_NQ.shape[1]
        texts = self.counts.part(row * count, (row + 1) * count)
        return KeptMasks(self.boxes_NQ4[row], self.qualities_NQ[row], texts, self.images[row].size)


class _Texts(Sequence[str]):
    """Texts of an Arrow array, which become Python's when they are asked for: most masks get no name."""

    def __init__(self, ends: NDArray[np.integer[Any]], content: memoryview) -> None:
        self._ends, self._content = ends, content

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: Any) -> Any:
        return str(self._content[self._ends[place] : self._ends[place + 1]], "ascii")

    def part(self, start: int, stop: int) -> "_Texts":
        return _Texts(self._ends[start : stop + 1], self._content)


def schema_of(contract: ModelContract, features: Features, model: str) -> Any:
    """The Arrow schema of an index's shards.

    Args:
        contract: The model's contract.
        features: The type that features are stored in.
        model: The model's identity (`Segmenter.identity`).
    """
    pa = optional("pyarrow")
    queries, width = contract.num_queries, contract.query_dim
    kinds = {"float16": pa.float16(), "float32": pa.float32()}
    return pa.schema(
        [
            ("path", pa.string()),
            ("sha256", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("boxes", pa.list_(pa.float32(), 4 * queries)),
            ("qualities", pa.list_(pa.float32(), queries)),
            ("masks", pa.list_(pa.string(), queries)),
            ("queries", pa.list_(kinds[features], queries * width)),
            ("background", pa.list_(pa.float32(), width)),
        ],
        metadata={MODEL_KEY: model},
    )


def write_shard(path: Path, rows: Sequence[tuple[IndexedImage, Segments]], schema: Any) -> None:
    """Write a shard, whole or not at all.

    Args:
        path: Ends in `.parquet`.
        rows: Images with what was found in them.
        schema: What `schema_of` made.
    """
    pa, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    images, found = zip(*rows, strict=True)
    floats = {
        "boxes": np.stack([segments.boxes for segments in found]),
        "qualities": np.stack([segments.qualities for segments in found]),
        "queries": np.stack([segments.queries for segments in found]),
        "background": np.stack([segments.background for segments in found]),
    }
    columns = {
        "path": [image.path for image in images],
        "sha256": [image.sha256 for image in images],
        "height": [image.size[0] for image in images],
        "width": [image.size[1] for image in images],
        "masks": [[mask["counts"] for mask in segments.masks] for segments in found],
    }
    for name, values in floats.items():
        kind = schema.field(name).type
        flat = pa.array(values.astype(kind.value_type.to_pandas_dtype()).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, type=kind)
    table = pa.table(columns, schema=schema)
    with atomic_write(path) as partial:
        parquet.write_table(
            table,
            partial,
            compression="zstd",
            use_dictionary=False,
            use_byte_stream_split=["queries.list.element"],
            row_group_size=len(rows),
            write_page_checksum=True,
        )


def read_shard(path: Path, schema: Any, size: int) -> Iterator[Rows]:
    """The images of a shard, some at a time.

    Args:
        path: The file.
        schema: What `schema_of` made.
        size: N at most.

    Raises:
        D2ZeroError: It is cut short or damaged, or another model's.
    """
    with _opened(path, schema) as file:
        for batch in file.iter_batches(batch_size=size, columns=schema.names):
            yield _rows(batch)


def paths_in(path: Path, schema: Any) -> list[str]:
    """The paths of a shard's images; refuses what `read_shard` does."""
    with _opened(path, schema) as file:
        paths: list[str] = file.read(columns=["path"])["path"].to_pylist()
        return paths


def shard_length(path: Path, schema: Any) -> int:
    """The number of a shard's images; refuses what `read_shard` does, except for damage before the file's end."""
    with _opened(path, schema) as file:
        return int(file.metadata.num_rows)


@contextmanager
def _opened(path: Path, schema: Any) -> Iterator[Any]:
    try:
        with optional("pyarrow.parquet").ParquetFile(path, page_checksum_verification=True) as file:
            model = (file.schema_arrow.metadata or {}).get(MODEL_KEY)
            if model is None:
                raise D2ZeroError(f"{path} is no shard of an index")
            if model != schema.metadata[MODEL_KEY] or not file.schema_arrow.equals(schema):
                raise D2ZeroError(f"{path} was made with another model than the index")
            yield file
    except D2ZeroError:
        raise
    except Exception as error:  # pyarrow's, of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise D2ZeroError(
            f"{path} is cut short or damaged ({reason}); delete it and run `d2zero index` again"
        ) from error


def _rows(batch: Any) -> Rows:
    count = batch.num_rows
    paths, hashes, heights, widths = (batch[name].to_pylist() for name in ("path", "sha256", "height", "width"))
    images = tuple(
        IndexedImage(path, sha256, (height, width))
        for path, sha256, height, width in zip(paths, hashes, heights, widths, strict=True)
    )
    boxes, qualities, queries, background = (
        batch[name].flatten().to_numpy().astype(np.float32, copy=False).reshape(count, -1)
        for name in ("boxes", "qualities", "queries", "background")
    )
    masks = batch["masks"].flatten()
    _, ends, content = masks.buffers()
    places = np.frombuffer(ends, np.int32)[masks.offset : masks.offset + len(masks) + 1]
    return Rows(
        images,
        queries.reshape(count, qualities.shape[1], -1),
        background,
        boxes.reshape(count, -1, 4),
        qualities,
        _Texts(places, memoryview(content)),
    )
