"""Indexes: what is stored gets the names that the model gives, and what is damaged is named."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_model import WIDTH
from tiny_network import tiny

from d2zero_runtime import D2ZeroError, Detections, Mode, Segmenter, Vocabulary, load
from d2zero_runtime.index import Index, IndexDescription, IndexWriter
from d2zero_runtime.index import index as index_module
from d2zero_runtime.index.index import DESCRIPTION, shards_in
from d2zero_runtime.index.shards import write_shard

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
SIZES = [(40, 64), (64, 48), (33, 50), (64, 64), (20, 70), (48, 48), (52, 30)]


def words(count: int = 4, **fields: object) -> Vocabulary:
    rows = np.random.default_rng(count).standard_normal((count, WIDTH)).astype(np.float32)
    seen = np.arange(count) % 2 == 0
    return Vocabulary(tuple(f"word {number}" for number in range(count)), rows, seen=seen, **fields)  # type: ignore[arg-type]


@dataclass
class Made:
    """A model with photos."""

    segmenter: Segmenter
    photos: list[Path]
    descriptions: dict[str, IndexDescription]

    def write(self, folder: Path, features: str = "float16", rows: int = 3, count: int = len(SIZES)) -> Path:
        with IndexWriter(folder, self.descriptions[features], rows) as writer:
            left = [path for path in self.photos[:count] if path not in writer]
            for path, segments in self.segmenter.segment_stream(left):
                writer.add(Path(str(path)), segments)
        return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    photos = []
    for number, (height, width) in enumerate(SIZES):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
        photos.append(folder / f"{number}.png")
        coarse.resize((width, height)).save(photos[-1])
    model = tiny()
    model.config = replace(model.config, preprocessing=replace(model.config.preprocessing, shortest_edge=64))
    model.set_vocabulary(words(3))
    segmenter = model.segmenter()
    first = IndexDescription.of(segmenter, "float16")
    return Made(segmenter, photos, {"float16": first, "float32": replace(first, features="float32")})


def by_mask(found: Detections) -> dict[tuple[str, str], float]:
    """Scores by name and mask; of equal ones the best."""
    assert isinstance(found.masks, tuple)
    keys = [(name, mask["counts"]) for name, mask in zip(found.names, found.masks, strict=True)]
    return dict(reversed(list(zip(keys, found.scores.tolist(), strict=True))))


@pytest.mark.parametrize(("features", "limit"), [("float16", 1e-3), ("float32", 1e-6)])
@pytest.mark.parametrize("mode", Mode)
def test_an_index_names_what_the_model_names(
    made: Made, features: str, limit: float, mode: Mode, tmp_path: Path
) -> None:
    index = Index(made.write(tmp_path, features))
    with_synonym = words(6, synonyms={"word 3": "word 1"}).with_active(["word 0", "word 1", "word 5"])
    for vocabulary in (None, words(7), with_synonym):
        for (image, found), path in zip(index.name(vocabulary, mode, score_threshold=0), made.photos, strict=True):
            expected = made.segmenter(path, mode, vocabulary=vocabulary, score_threshold=0)
            assert image.path == str(path) and image.size == found.image_size == expected.image_size
            assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            ours, theirs = by_mask(found), by_mask(expected)
            assert len(found) == len(expected) > 0 and ours.keys() == theirs.keys()
            assert max(abs(score - theirs[key]) for key, score in ours.items()) <= limit
            assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_options_are_those_of_a_segmenter(made: Made, tmp_path: Path) -> None:
    index = Index(made.write(tmp_path))
    everything = [found for _, found in index.name(words(5), score_threshold=0)]
    threshold = float(np.median(np.concatenate([found.scores for found in everything])))
    for whole, (_, found) in zip(everything, index.name(words(5), score_threshold=threshold), strict=True):
        assert len(found) == (whole.scores >= threshold).sum()
    for (_, few), whole in zip(index.name(words(5), score_threshold=0, max_detections=2), everything, strict=True):
        assert len(few) <= 2 and set(by_mask(few)) <= set(by_mask(whole))
    for (_, found), whole in zip(index.name(words(5), score_threshold=0, masks="bitmap"), everything, strict=True):
        assert np.array_equal(found.bitmaps(), whole.bitmaps())


def test_any_tool_reads_a_shard(made: Made, tmp_path: Path) -> None:
    shards = shards_in(made.write(tmp_path))
    assert [path.name for path in shards] == [f"shard-{number:05d}.parquet" for number in range(3)]
    table = parquet.read_table(shards[0])
    contract = made.segmenter.contract
    assert table.num_rows == 3 and str(table.schema.field("queries").type.value_type) == "halffloat"
    segments = made.segmenter.segment(made.photos[1])
    row = table.slice(1, 1).to_pylist()[0]
    assert row["path"] == str(made.photos[1]) and (row["height"], row["width"]) == SIZES[1]
    assert row["masks"] == [mask["counts"] for mask in segments.masks]
    assert np.array_equal(np.array(row["boxes"]).reshape(-1, 4), segments.boxes)
    queries = np.array(row["queries"], np.float32).reshape(contract.num_queries, contract.query_dim)
    assert np.abs(queries - segments.queries).max() < 2e-3


def test_an_index_goes_on_without_doubles(made: Made, tmp_path: Path) -> None:
    made.write(tmp_path, count=4)
    first = {path: path.read_bytes() for path in shards_in(tmp_path)}
    made.write(tmp_path)
    made.write(tmp_path)
    assert list(Index(tmp_path).paths()) == [str(path) for path in made.photos] and len(Index(tmp_path)) == 7
    assert all(path.read_bytes() == content for path, content in first.items())


def test_what_waits_is_written_when_the_work_fails(made: Made, tmp_path: Path) -> None:
    def failing() -> Iterator[Path]:
        yield from made.photos[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), IndexWriter(tmp_path, made.descriptions["float16"]) as writer:
        for path in failing():
            writer.add(path, made.segmenter.segment(path))
    assert len(Index(tmp_path)) == 2


def test_slow_images_are_written_now_and_then(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SECONDS", -1.0)
    made.write(tmp_path, rows=100)
    assert len(shards_in(tmp_path)) == len(SIZES)


def test_an_index_is_written_by_one_process(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2zero_runtime.files.PATIENCE", 0.1)
    with (
        IndexWriter(tmp_path, made.descriptions["float16"]),
        pytest.raises(D2ZeroError, match="another process is writing the index"),
    ):
        IndexWriter(tmp_path, made.descriptions["float16"])
    IndexWriter(tmp_path, made.descriptions["float16"]).__exit__(None, None, None)  # free again


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damaged_inside(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    parquet.write_table(pyarrow.table({"a": [1, 2]}), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "is cut short or damaged"),
        (damaged_inside, "is cut short or damaged"),
        (flipped, "is cut short or damaged"),
        (empty, "is cut short or damaged"),
        (foreign, "is no shard of an index"),
    ],
)
def test_a_bad_shard_is_named_and_the_others_are_used(
    made: Made, damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    shards = shards_in(made.write(tmp_path))
    damage(shards[1])
    bad: dict[Path, str] = {}

    def told(path: Path, error: D2ZeroError) -> None:
        bad[path] = str(error)

    found = [image.path for image, _ in Index(tmp_path, on_bad_shard=told).name()]
    assert found == [str(path) for path in (*made.photos[:3], *made.photos[6:])]
    assert list(bad) == [shards[1]] and message in bad[shards[1]] and "\n" not in bad[shards[1]]
    with pytest.raises(D2ZeroError, match=message):
        list(Index(tmp_path).name())


def test_images_of_a_bad_shard_are_segmented_again(made: Made, tmp_path: Path) -> None:
    shards = shards_in(made.write(tmp_path))
    cut(shards[1])
    bad: list[Path] = []
    with IndexWriter(
        tmp_path, made.descriptions["float16"], on_bad_shard=lambda path, error: bad.append(path)
    ) as writer:
        left = [path for path in made.photos if path not in writer]
        for path, segments in made.segmenter.segment_stream(left):
            writer.add(Path(str(path)), segments)
    assert bad == [shards[1]] and left == made.photos[3:6]
    assert not shards[1].exists() and shards[1].with_name("shard-00001.parquet.bad").exists()
    assert sorted(Index(tmp_path).paths()) == sorted(map(str, made.photos))


def test_a_shard_of_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    shards = shards_in(made.write(tmp_path))
    schema = replace(made.descriptions["float16"], model="0" * 64).schema
    rows = [(image, made.segmenter.segment(image.path)) for image, _ in list(Index(tmp_path).name())[:2]]
    write_shard(shards[0], rows, schema)
    with pytest.raises(D2ZeroError, match=r"shard-00000.parquet was made with another model than the index"):
        Index(tmp_path)


def test_an_index_of_another_model_is_not_gone_on_with(made: Made, tmp_path: Path) -> None:
    made.write(tmp_path)
    description = made.descriptions["float16"]
    contract = made.segmenter.contract
    for changes in ({"checkpoint": "another"}, {"precision": "bfloat16"}):
        model = replace(contract, **changes).identity  # type: ignore[arg-type]
        with pytest.raises(D2ZeroError, match="is an index of another model, or of the same in another precision"):
            IndexWriter(tmp_path, replace(description, model=model))
    with pytest.raises(D2ZeroError, match="stores features as float16, not float32"):
        IndexWriter(tmp_path, made.descriptions["float32"])
    renamed = replace(
        description, contract=description.contract.with_vocabulary(words(9)), embeddings=words(9).embeddings
    )
    with IndexWriter(tmp_path, renamed) as writer:  # the default classes do not matter
        assert len(writer) == len(SIZES)


def test_classes_that_do_not_fit_are_refused(made: Made, tmp_path: Path) -> None:
    index = Index(made.write(tmp_path))
    wide = Vocabulary(("a",), np.ones((1, WIDTH + 1), np.float32))
    with pytest.raises(D2ZeroError, match=f"reads class embeddings of width {WIDTH}"):
        list(index.name(wide))
    seen_only = Vocabulary(("a",), np.ones((1, WIDTH), np.float32))
    with pytest.raises(D2ZeroError, match="needs unseen classes"):
        list(index.name(seen_only, "zsis"))


def test_what_is_no_index_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(D2ZeroError, match=r"is no index: it has no index\.json"):
        Index(tmp_path)
    made.write(tmp_path)
    text = (tmp_path / DESCRIPTION).read_text()
    (tmp_path / DESCRIPTION).write_text(text[: len(text) // 2])
    with pytest.raises(D2ZeroError, match=r"index.json is damaged"):
        Index(tmp_path)
    (tmp_path / DESCRIPTION).write_text(text)
    for path in shards_in(tmp_path):
        path.unlink()
    with pytest.raises(D2ZeroError, match="holds no images that can be used"):
        list(Index(tmp_path).name())


def test_a_moved_index_is_whole(made: Made, tmp_path: Path) -> None:
    """The classifier is inside: neither the model's file nor the photos are needed."""
    photos = [Path(shutil.copy(photo, tmp_path)) for photo in made.photos]
    replace(made, photos=photos).write(tmp_path / "here")
    for photo in photos:
        photo.unlink()
    shutil.move(tmp_path / "here", tmp_path / "there")
    found = list(Index(tmp_path / "there").name(words(5)))
    assert [image.problem for image, _ in found] == ["image is gone"] * len(SIZES)


def test_batches_of_many_classes_are_small() -> None:
    def largest(classes: int) -> int:
        return index_module._batch_size(classes)

    assert largest(80) == index_module.LARGEST_BATCH and largest(1203) == 1 and largest(100_000) == 1


def test_a_photo_that_is_gone_is_not_added(made: Made, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    shutil.copy(made.photos[0], photo)
    segments = made.segmenter.segment(photo)
    photo.unlink()
    with (
        IndexWriter(tmp_path / "index", made.descriptions["float16"]) as writer,
        pytest.raises(D2ZeroError, match="cannot be read any more"),
    ):
        writer.add(photo, segments)


def test_odd_names_of_files(made: Made, tmp_path: Path) -> None:
    segments = made.segmenter.segment(made.photos[0])
    strange = tmp_path / os.fsdecode(b"\xff.png")
    shutil.copy(made.photos[0], strange)
    with IndexWriter(tmp_path / "index", made.descriptions["float16"]) as writer:
        with pytest.raises(D2ZeroError, match="has a name that is not UTF-8"):
            writer.add(strange, segments)
        for name in ("ä ü.png", "木.png", "a\nb.png"):
            writer.add(Path(shutil.copy(made.photos[0], tmp_path / name)), segments)
    index = Index(tmp_path / "index")
    assert [Path(path).name for path in index.paths()] == ["ä ü.png", "木.png", "a\nb.png"]
    assert [image.problem for image, _ in index.name()] == [""] * 3


def test_shards_are_ordered_by_number_and_others_ignored(made: Made, tmp_path: Path) -> None:
    first, *_ = shards_in(made.write(tmp_path))
    for name in ("shard-99999.parquet", "shard-100000.parquet", "shard-00001 (copy).parquet", "shard-old.parquet"):
        shutil.copy(first, tmp_path / name)
    assert [path.name for path in shards_in(tmp_path)][-2:] == ["shard-99999.parquet", "shard-100000.parquet"]
    assert len(shards_in(tmp_path)) == 5
    with IndexWriter(tmp_path, made.descriptions["float16"]) as writer:
        writer.add(made.photos[0], made.segmenter.segment(made.photos[0]))
    assert shards_in(tmp_path)[-1].name == "shard-100001.parquet"


def test_a_network_that_overflows_is_named_at_once(made: Made) -> None:
    model = tiny()
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("inf"))
    with pytest.raises(D2ZeroError, match="the network's output is not finite"):
        model.segmenter().segment(made.photos[0])


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_exported_models_fill_an_index(exported: Path, made: Made, provider: str, tmp_path: Path) -> None:
    if provider == "openvino":
        pytest.importorskip("openvino")
    segmenter = load(exported, provider)
    own = segmenter.vocabulary
    description = IndexDescription.of(segmenter, "float32")
    index = Index(Made(segmenter, made.photos, {"float32": description}).write(tmp_path, "float32"))
    for mode, chosen in product(Mode, (own, own.select(own.names[3:30]))):
        for (_, found), photo in zip(index.name(chosen, mode, score_threshold=0.01), made.photos, strict=True):
            expected = segmenter(photo, mode, vocabulary=chosen, score_threshold=0.01)
            ours, theirs = by_mask(found), by_mask(expected)
            assert ours.keys() == theirs.keys()
            assert max((abs(score - theirs[key]) for key, score in ours.items()), default=0) <= 3e-6


def features_of(index: Index) -> NDArray[np.float32]:
    return np.concatenate([rows.queries_NQC for rows in index._rows(2)])


def test_features_do_not_depend_on_how_many_are_read(made: Made, tmp_path: Path) -> None:
    index = Index(made.write(tmp_path, "float32"))
    expected = np.stack([made.segmenter.segment(path).queries for path in made.photos])
    assert np.array_equal(features_of(index), expected)
