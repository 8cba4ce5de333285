"""Events go to the logger `d2zero`: silent in a program that does not configure it, lines on standard error in ours."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Command
from tiny_model import write_model

from d2zero_runtime import load


def test_a_program_can_log_what_is_loaded_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = write_model(tmp_path / "m.onnx")
    (tmp_path / "broken.png").write_bytes(b"broken")
    with caplog.at_level(logging.INFO, "d2zero"):
        segmenter = load(model)
        segmenter.set_vocabulary(segmenter.vocabulary)
        assert not list(segmenter.stream([tmp_path / "broken.png"], on_error=lambda *_: None))
    assert {record.name for record in caplog.records} == {"d2zero"}
    loaded, changed, skipped = caplog.records
    assert str(model) in loaded.getMessage() and segmenter.backend.name in loaded.getMessage()
    assert loaded.levelname == changed.levelname == "INFO" and changed.getMessage().startswith("changed the vocabulary")
    assert skipped.levelname == "WARNING" and "broken.png" in skipped.getMessage()


def test_a_program_that_configures_nothing_hears_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from d2zero_runtime import load\n"
        "for _ in load(sys.argv[1]).stream([sys.argv[2]], on_error=lambda *_: None): pass"
    )
    (tmp_path / "broken.png").write_bytes(b"broken")
    words: list[str | Path] = [sys.executable, "-c", script, write_model(tmp_path / "m.onnx"), tmp_path / "broken.png"]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")


def test_the_command_warns_and_says_more_when_verbose(tmp_path: Path, command: Command) -> None:
    model = write_model(tmp_path / "m.onnx")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "broken.png").write_bytes(b"broken")
    words = ["predict", photos, "-m", model, "-o", tmp_path / "out"]
    quiet, verbose, after = command(*words), command("--verbose", *words), command(*words)
    assert quiet.err.count("warning: skipped: ") == verbose.err.count("warning: skipped: ") == 1
    assert f"info: loaded {model}: <Segmenter: " in verbose.err and "loaded" not in quiet.err + after.err
    assert "loaded" not in verbose.out and "skipped" not in quiet.out
