"""The wheel, installed with only the `cpu` extra in a clean environment, predicts from another directory."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2zero_runtime import Vocabulary

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_predicts_without_torch(exported: Path, tmp_path: Path) -> None:
    def uv(*arguments: object) -> None:
        done = subprocess.run([sys.executable, "-m", "uv", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    uv("build", "--wheel", "--out-dir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        shipped = content.namelist()
    assert "d2zero_bench/page.html.jinja" in shipped
    assert not [name for name in shipped if name.startswith(("studies", "gpu", "benchmarks", "tests"))]
    uv("venv", "--python", sys.executable, tmp_path / "env")
    python = tmp_path / "env/bin/python"
    uv("pip", "install", "--python", python, "-c", ROOT / "constraints.txt", f"{wheel}[cpu]")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(exported, elsewhere / "m.onnx")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (96, 120, 3), np.uint8)).save(elsewhere / "photo.png")
    Vocabulary(("a", "b"), random.standard_normal((2, 64)).astype(np.float32)).save(elsewhere / "two.npz")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(arguments, cwd=elsewhere, env=environment, capture_output=True, text=True)

    command = str(tmp_path / "env/bin/d2zero")
    done = run(command, "predict", "photo.png", "-m", "m.onnx", "-o", "out", "--score", "0")
    assert done.returncode == 0, done.stderr
    assert 20 < len(json.loads((elsewhere / "out/detections.json").read_text())["annotations"]) <= 100
    assert list((elsewhere / "out").glob("*.jpg"))
    assert run(command, "vocab", "set", "m.onnx", "two.npz").returncode == 0
    code = (
        "import d2zero_runtime as r; d = r.load('m.onnx')('photo.png', score_threshold=0.0);"
        " print(0 < len(d) <= 30, sorted(set(d.names)))"
    )
    assert run(str(python), "-c", code).stdout == "True ['a', 'b']\n"
    assert run(str(python), "-c", "import torch").returncode != 0
    for arguments in (("train", "--preset", "shapes", "--data", ".", "-v", "two.npz", "-o", "run"), ("demo",)):
        done = run(command, *arguments)
        assert done.returncode == 2 and "pip install 'd2zero[train]'" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
