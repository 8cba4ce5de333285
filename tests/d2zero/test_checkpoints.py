"""Our own checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import d2zero
from d2zero.checkpoints.files import load_model, read_notes, save_model
from d2zero.model import D2Zero
from d2zero_runtime import D2ZeroError
from d2zero_runtime.files import file_hash


def test_round_trip(small_model: D2Zero, tmp_path: Path) -> None:
    path = save_model(small_model, tmp_path / "new" / "m.safetensors", {"steps": 3})
    again = d2zero.load(path)
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    left, right = small_model.predict_raw([image]), again.predict_raw([image])
    assert np.array_equal(left.class_logits, right.class_logits) and np.array_equal(left.mask_logits, right.mask_logits)
    assert again.vocabulary.names == small_model.vocabulary.names
    assert again.vocabulary.source == small_model.vocabulary.source
    assert again.config == small_model.config
    assert read_notes(path) == {"steps": 3}
    assert [entry.name for entry in path.parent.iterdir()] == ["m.safetensors"]


def test_bad_files(small_model: D2Zero, tmp_path: Path) -> None:
    path = save_model(small_model, tmp_path / "m.safetensors")
    with pytest.raises(D2ZeroError, match="does not exist"):
        load_model(tmp_path / "none.safetensors")
    for cut in (4, 1000, path.stat().st_size - 100):
        (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(D2ZeroError, match="damaged, cut short"):
            load_model(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(D2ZeroError, match="no d2zero model description"):
        load_model(tmp_path / "other.safetensors")
    (tmp_path / "old.pth").touch()
    with pytest.raises(D2ZeroError, match="d2zero convert"):
        load_model(tmp_path / "old.pth")
    with pytest.raises(D2ZeroError, match=r"saved as \.safetensors"):
        save_model(small_model, tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=9), "version 9"),
        (lambda c: c.pop("vocabulary"), "lacks vocabulary"),
        (lambda c: c["config"].update(num_queries=16), "1 misshapen|2 misshapen"),
        (lambda c: c["config"].update(flux=1), "unknown model settings flux"),
    ],
)
def test_descriptions_that_do_not_fit(
    change: Callable[[dict[str, Any]], object], message: str, small_model: D2Zero, tmp_path: Path
) -> None:
    path = save_model(small_model, tmp_path / "m.safetensors")
    with safe_open(path, "pt") as file:
        contract = json.loads(file.metadata()["d2zero"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(contract)
    save_file(arrays, path, metadata={"d2zero": json.dumps(contract)})
    with pytest.raises(D2ZeroError, match=message):
        load_model(path)


def test_hash_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    (tmp_path / "c").write_text("y")
    assert file_hash(tmp_path / "a") == file_hash(tmp_path / "b") != file_hash(tmp_path / "c")
