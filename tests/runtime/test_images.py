"""Reading and preparing images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2zero_runtime import D2ZeroError, Preprocessing, read_image


def picture(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("i.tif" if mode == "CMYK" else "i.png")
    image = Image.fromarray(picture()).convert(mode)
    image.save(path)
    found = read_image(path)
    assert found.shape == (6, 9, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


def test_sixteen_bit_greys_are_scaled(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 54).reshape(6, 9).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "i.png")
    found = read_image(tmp_path / "i.png")
    assert found.shape == (6, 9, 3)
    np.testing.assert_allclose(found[..., 0], grey / 257, atol=1)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(picture())
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    image.save(tmp_path / "i.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "i.png"), np.rot90(picture(), -1))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(D2ZeroError, match="does not exist"):
        read_image(tmp_path / "none.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(D2ZeroError, match="not an image"):
        read_image(tmp_path / "empty.png")
    Image.fromarray(picture(200, 200)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    with pytest.raises(D2ZeroError, match="damaged or cut short"):
        read_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((300, 1200), (333, 1333)), ((800, 800), (800, 800))],
)
def test_network_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert Preprocessing().network_size(size) == expected


def test_batch_normalises_and_pads_with_zeros() -> None:
    preprocessing = Preprocessing()
    image = picture()
    batch = preprocessing.batch([image], preprocessing.padded_size((6, 9)))
    assert batch.shape == (1, 3, 32, 32) and batch.dtype == np.float32
    expected = (image.astype(np.float64) - preprocessing.mean) / preprocessing.std
    np.testing.assert_allclose(batch[0, :, :6, :9], expected.transpose(2, 0, 1), atol=1e-5)
    assert not batch[0, :, 6:].any() and not batch[0, :, :, 9:].any()
