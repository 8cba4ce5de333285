"""Masks made by torch where the logits are, against those made in NumPy; and packed masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernels import assert_pass_in_the_interpreter, compiled_for_hopper, needs_triton

from d2zero_runtime import D2ZeroError, Detections, Vocabulary, postprocess
from d2zero_runtime.masks import device as device_masks
from d2zero_runtime.masks import rle
from d2zero_runtime.masks.device import DeviceLogits
from d2zero_runtime.masks.packed import PackedMasks
from d2zero_runtime.masks.postprocess import MaskKind

coco_mask = pytest.importorskip("pycocotools.mask")

SIZES = [
    ((64, 96), (60, 90), (60, 90)),  # used as it is
    ((64, 96), (60, 90), (37, 201)),  # shrunk and stretched
    ((64, 96), (64, 96), (128, 100)),
]


def raw(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    masks = random.standard_normal((6, 16, 24)).astype(np.float32).cumsum(1).cumsum(2) - 2
    masks[2] = -1  # found nowhere
    return random.standard_normal((6, 4)).astype(np.float32) * 5, masks


def both(kind: MaskKind, sizes: tuple, **options: Any) -> list[Detections]:
    padded, used, output = sizes
    class_logits, masks = raw()
    words = Vocabulary(("a", "b", "c"), np.eye(3, dtype=np.float32))
    return [
        postprocess(
            class_logits,
            logits,
            words,
            input_size=used,
            output_size=output,
            padded_size=padded,
            masks=kind,
            **options,
        )
        for logits in (masks, DeviceLogits(torch.from_numpy(masks)))
    ]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["rle", "bitmap", "packed", "none"])
def test_a_device_finds_what_numpy_finds(kind: MaskKind, sizes: tuple) -> None:
    ours, theirs = both(kind, sizes)
    assert ours.names == theirs.names
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
    np.testing.assert_array_equal(ours.boxes, theirs.boxes)
    assert type(ours.masks) is type(theirs.masks)
    if kind != "none":
        np.testing.assert_array_equal(ours.bitmaps(), theirs.bitmaps())
        assert ours.bitmaps().any()


def test_many_masks_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = both("packed", SIZES[1])[1]
    monkeypatch.setattr(device_masks, "CHUNK_BYTES", 1)
    np.testing.assert_array_equal(both("packed", SIZES[1])[1].bitmaps(), whole.bitmaps())


def test_half_precision_logits_are_upsampled_in_float32() -> None:
    logits = torch.from_numpy(raw()[1])
    sizes = device_masks.Sizes(*SIZES[1])
    half, full = (DeviceLogits(tensor).upsampled([0, 1], sizes, "packed", 1) for tensor in (logits.half(), logits))
    assert half[0].quality == pytest.approx(full[0].quality, abs=1e-3)


def test_packed_masks_are_those_that_were_packed() -> None:
    masks = np.random.default_rng(0).random((3, 21, 35)) > 0.6
    masks[1] = False
    packed = PackedMasks.of(masks)
    np.testing.assert_array_equal(packed.bitmaps(), masks)
    np.testing.assert_array_equal(packed[[2, 0]].bitmaps(), masks[[2, 0]])
    for row, mask in enumerate(masks):
        theirs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        assert packed.encoded(row) == {"size": [21, 35], "counts": theirs["counts"].decode()} == rle.encode(mask)


def test_packed_detections_convert_and_draw_like_others() -> None:
    coded, packed = both("rle", SIZES[0])[0], both("packed", SIZES[0])[0]
    ids = {"a": 1, "b": 2, "c": 3}
    assert coded.to_coco(7, ids) == packed.to_coco(7, ids)
    assert coded.to_pandas().equals(packed.to_pandas())
    best = packed[:1].masks
    assert len(packed.above(packed.scores[1])) == 2 and isinstance(best, PackedMasks) and best.size == (60, 90)
    image = np.zeros((60, 90, 3), np.uint8)
    bitmaps = both("bitmap", SIZES[0])[0]
    assert coded.plot(image).tobytes() == packed.plot(image).tobytes() == bitmaps.plot(image).tobytes()


def test_packed_masks_of_another_size_are_refused() -> None:
    with pytest.raises(D2ZeroError, match=r"must be \(N, 21, 5\) uint8, got \(3, 21, 4\)"):
        PackedMasks(np.zeros((3, 21, 4), np.uint8), (21, 35))


@pytest.mark.slow
@needs_triton
@pytest.mark.long
def test_the_kernel_in_the_interpreter() -> None:
    assert_pass_in_the_interpreter(Path(__file__).parent / "interpreted_masks.py")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize(
    "logits", ["fp16", pytest.param("fp32", marks=pytest.mark.long), pytest.param("bf16", marks=pytest.mark.long)]
)
def test_the_kernel_compiles_for_hopper(
    logits: str, resized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from d2zero_runtime.masks.kernel import mask_kernel

    constants = {"RESIZED": resized, "PACKED": True, "ROWS": device_masks.TILE[0], "BYTES": device_masks.TILE[1]}
    numbers = ["i32"] * 4 + ["fp32"] * 2 + ["i32"] * 2 + ["fp32"] * 2 + ["i32"] * 2
    types = [f"*{logits}", "*i64", "*u8", "*fp32", *numbers]
    stages = compiled_for_hopper(mask_kernel, types, constants, 4, None)
    assert stages["cubin"] and ".local" not in stages["ptx"]  # nothing goes through memory


def test_without_a_gpu_torchs_operators_make_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_masks, "in_one_kernel", None)
    assert len(both("packed", SIZES[0])[1])
