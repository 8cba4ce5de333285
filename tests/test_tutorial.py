"""The tutorial in docs/own-data.md, on photos: five categories of one's own, of which two are never trained on."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import Command
from PIL import Image

from d2zero_runtime import TextEncoder, Vocabulary, load

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("d2zero ")
]
RENAMED = {"person": "worker", "chair": "seat", "car": "vehicle", "dog": "pet (dog)", "cup": "red mug"}
FAST = "--set augment.size=64 --set loss.num_points=64 --set model.num_queries=6 --device cpu"


@pytest.fixture(scope="module")
def photos(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty photos of COCO's in one folder, small ones, with categories and ids of one's own."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "photos").mkdir()
    content = json.loads((shared / "data/coco_tiny/annotations/instances_val2017.json").read_text())
    ids = {entry["id"]: RENAMED[entry["name"]] for entry in content["categories"] if entry["name"] in RENAMED}
    names = list(RENAMED.values())
    annotations = [
        {**entry, "category_id": names.index(ids[entry["category_id"]]) + 1}
        for entry in content["annotations"]
        if entry["category_id"] in ids and not entry["iscrowd"]
    ]
    used = {entry["image_id"] for entry in annotations}
    chosen = [entry for entry in content["images"] if entry["id"] in used]
    others = [entry for entry in content["images"] if entry["id"] not in used]
    random.Random(0).shuffle(others)
    images = (chosen + others)[:60]
    kept = {entry["id"] for entry in images}
    for entry in images:
        shutil.copy(shared / "data/coco_tiny/val2017" / entry["file_name"], folder / "photos")
    mine = {
        "images": images,
        "annotations": [entry for entry in annotations if entry["image_id"] in kept],
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(names)],
    }
    (folder / "mine.json").write_text(json.dumps(mine))
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_every_command_of_the_page(
    photos: Path, tmp_path_factory: pytest.TempPathFactory, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("open_clip")
    from tiny_clip import NAME, write_weights

    monkeypatch.chdir(photos)
    write_weights(photos)
    (photos / "my.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[0])
    ran = []
    for line in COMMANDS:
        words = shlex.split(line.replace("ViT-B-16", NAME).replace("clip.safetensors", f"{NAME}.pt"), comments=True)
        if words[1] == "train":
            words = [word for word in words if word not in ("--epochs", "50")]
            words += shlex.split(f"--preset shapes --steps 20 --batch-size 2 --eval-every 20 {FAST}")
        if words[1] == "export":
            words += ["--size", "64x96"]  # traced in a quarter of the time
        outcome = command(*words[1:])
        assert outcome.code == 0, (line, outcome.err[-2000:])
        ran.append(words[1])
    assert ran[:2] == ["data", "data"] and {"train", "eval", "export", "export-text", "predict", "vocab"} <= set(ran)
    assert Vocabulary.load("classes.npz").unseen_names == ("pet (dog)", "red mug")
    assert len(list(Path("found").glob("*.jpg"))) == 60
    assert Image.open("sheet.jpg").size[0] > 400
    typed = TextEncoder.load("text.onnx")(["zebra"])
    assert typed.names == ("zebra",) and typed.encoder == load("mine.onnx").vocabulary.encoder
    metrics = [_evaluated(flags) for flags in (["--jobs", "2"], [])]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "d2zero"]
    metrics.append(_evaluated([], torchrun))
    assert metrics[0] == metrics[1] == metrics[2]


def _evaluated(flags: list[str], start: list[str] | None = None) -> dict:
    """Metrics of the run's model, evaluated from the beginning."""
    shutil.rmtree("again", ignore_errors=True)
    files = ["--data", "my.yaml", "-o", "again", "--json", "again.json", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*(start or [sys.executable, "-m", "d2zero"]), "eval", "run", *files, *flags]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(Path("again.json").read_text())
    assert np.isfinite(content["segm"]["ap"])
    return content
