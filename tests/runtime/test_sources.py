"""Which files a source names, and what is read of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2zero_runtime import D2ZeroError, read_image, sources
from d2zero_runtime.images import Preprocessing
from d2zero_runtime.sources import IMAGE_SUFFIXES, expand, is_many, open_rgb


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Visible pictures in a folder whose name has a pattern's signs, and what is not input."""
    root = tmp_path / "a [1]"
    for name in ("b.png", "a.jpg", "below/c.png", "._a.png", ".ipynb_checkpoints/a.png", "found/00001-a.jpg"):
        picture(root / name)
    (root / "notes.txt").write_text("no image")
    return root


def test_a_folder_has_its_visible_pictures(folder: Path) -> None:
    names = [Path(str(path)).relative_to(folder).as_posix() for path in expand(folder, leave_out=folder / "found")]
    assert names == ["a.jpg", "b.png", "below/c.png"]
    assert len(expand(folder)) == 4


def test_a_pattern_in_a_folder_with_brackets_finds_its_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [Path(str(path)).name for path in expand(folder / "*.png")] == ["b.png"]
    assert len(expand(str(folder / "**/*.png"))) == 2
    monkeypatch.chdir(folder)
    assert [str(path) for path in expand("*.jpg")] == ["a.jpg"]
    assert is_many("*.jpg") and is_many(folder) and not is_many("a.jpg")
    with pytest.raises(D2ZeroError, match="no file matches"):
        expand("nothing/*.jpg")


def test_every_listed_format_is_read(tmp_path: Path) -> None:
    for suffix in IMAGE_SUFFIXES:
        if suffix == ".avif" and "AVIF" not in sources._readable():
            continue
        path = tmp_path / f"picture{suffix}"
        Image.new("RGB", (6, 4), (200, 10, 10)).save(path, {".jfif": "JPEG", ".mpo": "MPO"}.get(suffix))
        assert read_image(path).shape == (4, 6, 3) and expand(tmp_path)


def test_a_pillow_image_is_treated_as_its_file_is(tmp_path: Path) -> None:
    path, turned = tmp_path / "turned.jpg", Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)).save(path, exif=turned)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(np.asarray(open_rgb(opened)), read_image(path))
        assert opened.size == (16, 8)  # the caller's image stays as it was
    assert read_image(path).shape == (16, 8, 3)


def test_a_damaged_pillow_image_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with Image.open(path) as opened, pytest.raises(D2ZeroError, match=r"cut\.jpg is damaged"):
        open_rgb(opened)


@pytest.mark.parametrize(("high", "expected"), [(1.0, 128), (255.0, 128)])
def test_float_images_are_scaled(tmp_path: Path, high: float, expected: int) -> None:
    levels = np.array([[0, high / 2, high]], np.float32)
    Image.fromarray(levels).save(tmp_path / "f.tif")
    assert read_image(tmp_path / "f.tif")[0, :, 0].tolist() == [0, expected, 255]


@pytest.mark.parametrize("value", [-1.0, 300.0, np.nan, np.inf])
def test_float_images_of_other_ranges_are_refused(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(D2ZeroError, match=r"f\.tif: its float values"):
        read_image(tmp_path / "f.tif")


def test_images_beyond_the_limit_and_other_formats_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture(tmp_path / "large.png", size=(40, 30))
    monkeypatch.setattr(sources, "LARGEST_IMAGE", 1000)
    with pytest.raises(D2ZeroError, match=r"large\.png has 0 megapixels, at most 0 are read"):
        read_image(path)
    Image.new("RGB", (4, 4)).save(tmp_path / "p.ppm")
    with pytest.raises(D2ZeroError, match="not an image in a format that is read"):
        read_image(tmp_path / "p.ppm")


def test_resizing_a_pillow_image_and_its_array_are_the_same() -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    preprocessing = Preprocessing(shortest_edge=32, longest_edge=64)
    np.testing.assert_array_equal(preprocessing.resize(Image.fromarray(array)), preprocessing.resize(array))
