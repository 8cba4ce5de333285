"""What tests share: the reference data beside the checkout, the published model, a small model, the command."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Outcome
from filelock import FileLock
from models import SHARED, published_model, published_vocabulary

from d2zero.checkpoints.files import load_model
from d2zero.cli.main import main
from d2zero.data.shapes import ShapesConfig, vocabulary, write_dataset
from d2zero.demo.run import packaged_checkpoint
from d2zero.model import D2Zero, build
from d2zero.training.config import shapes
from d2zero_export.onnx_export import export_onnx
from d2zero_export.options import OnnxOptions

# A shell ignores interrupts for what it starts in the background, and so would each process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference cases, photos and embeddings; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("needs reference cases and embeddings in ../shared or where D2ZERO_SHARED says; they are absent")
    return SHARED


@pytest.fixture(scope="session")
def model_48_17(shared: Path) -> D2Zero:
    return published_model(published_vocabulary(shared, "48_17"))


@pytest.fixture
def small_model() -> D2Zero:
    """The demo's architecture with fresh weights; cheap, and every part is there."""
    torch.manual_seed(0)
    return build(shapes().model, vocabulary()).eval()


@pytest.fixture(scope="module")
def demo_model() -> D2Zero:
    return load_model(packaged_checkpoint())


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small drawn data set; not to be changed."""
    directory = tmp_path_factory.mktemp("shapes")
    write_dataset(directory, ShapesConfig(train_images=48, val_images=24))
    return directory


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The demo's model as ONNX, not verified; not to be changed. Made once for all of xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    path = (base if worker_id == "master" else base.parent) / "demo.onnx"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            export_onnx(load_model(packaged_checkpoint()), path, OnnxOptions(verify=False), checkpoint_hash="abc")
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `d2zero …` in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return run
