"""`d2zero benchmark` of a folder of transformers beside the checkpoint that was converted from it: equal weights."""

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from commands import Command
from safetensors.torch import load_file

pytest.importorskip("transformers")

from mask2former_layouts import NAMES, mask2former, resnet, transformers

from d2zero.checkpoints.files import save_model
from d2zero.checkpoints.mask2former import model_of
from d2zero.checkpoints.transformers_folder import read_folder
from d2zero_bench.candidates import Spec
from d2zero_bench.report import NETWORK, STAGES
from d2zero_bench.transformers_model import TransformersModel
from d2zero_runtime import D2ZeroError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mask2former")
    mask2former(resnet()).save_pretrained(folder)
    transformers.Mask2FormerImageProcessor().save_pretrained(folder)
    return folder


def test_a_folder_is_measured_through_all_stages_and_compared(folder: Path, tmp_path: Path, command: Command) -> None:
    checkpoint = save_model(model_of(read_folder(folder)), tmp_path / "converted.safetensors", {})
    options = ("--rounds", "2", "--warmup", "0", "--size", "64x96", "--threads", "1", "--json", tmp_path / "all.json")
    outcome = command("benchmark", folder, checkpoint, *options)
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "all.json").read_text())
    kinds = {info["name"]: (info["kind"], info["decoder_layers"]) for info in report["candidates"]}
    assert kinds == {folder.name: ("transformers", 4), "converted.safetensors": ("d2zero", 4)}
    (equality,) = report["equality"]
    assert equality["failures"] == [] and equality["class_logits"] < 1e-3 and equality["mask_logits"] < 1e-3
    for result in report["results"]:
        assert {*STAGES, NETWORK} <= result["samples"][0].keys()


def test_what_a_folder_cannot_do_is_one_line(folder: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("benchmark", folder, "--size", "64x96", "--classes", "7", "--rounds", "1")
    assert outcome.code == 2 and "has 5 classes and no others" in outcome.err, outcome.err
    outcome = command("benchmark", tmp_path, "--size", "64x96", "--rounds", "1")
    assert outcome.code == 2 and "config.json" in outcome.err and len(outcome.err.strip().splitlines()) == 1


def test_weights_that_would_be_unpickled_are_refused(folder: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    assert model_of(read_folder(old)).vocabulary.names == NAMES
    with pytest.raises(D2ZeroError, match=r"has its weights in pytorch_model\.bin, which is converted, but not loaded"):
        TransformersModel(Spec("old", old))


def test_only_the_weights_that_are_loaded_count(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "other.safetensors").write_bytes(bytes(9_000_000))
    expected = (folder / "model.safetensors").stat().st_size / 1e6
    assert TransformersModel(Spec("copy", copy)).info.megabytes == pytest.approx(expected)


def test_the_package_is_named_where_it_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(D2ZeroError, match=r"measuring the folder .* needs transformers; install it with"):
        TransformersModel(Spec("m", folder))


def test_an_error_without_a_message_is_named_by_its_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **named: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(transformers.Mask2FormerForUniversalSegmentation, "from_pretrained", failing)
    with pytest.raises(D2ZeroError, match=r"transformers cannot load .*: RuntimeError"):
        TransformersModel(Spec("m", folder))


def test_a_runs_folder_means_its_checkpoint(tmp_path: Path, command: Command) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "best.safetensors").write_bytes(b"no weights")
    outcome = command("benchmark", tmp_path, "--size", "64x96", "--rounds", "1")
    assert outcome.code == 2 and "best.safetensors is damaged" in outcome.err, outcome.err
    outcome = command("benchmark", tmp_path, "--images", tmp_path, "--annotations", tmp_path)
    assert outcome.code == 2 and "--annotations takes a COCO JSON file" in outcome.err, outcome.err
