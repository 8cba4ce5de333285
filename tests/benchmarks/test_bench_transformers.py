"""`d2zero benchmark` of a folder of transformers beside the checkpoint that was converted from it: equal weights."""

import json
from pathlib import Path

import pytest
from commands import Command

pytest.importorskip("transformers")

from mask2former_layouts import mask2former, resnet, transformers

from d2zero.checkpoints.files import save_model
from d2zero.checkpoints.mask2former import model_of
from d2zero.checkpoints.transformers_folder import read_folder
from d2zero_bench.report import NETWORK, STAGES


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
