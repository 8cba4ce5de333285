"""Everything that the README shows runs as it is printed, in its order, from the root of a checkout."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import Command

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
SETS_UP = ("make setup", "source .venv/bin/activate", "pip wheel", "pip install")  # CI and test_wheel run these


@pytest.mark.slow
def test_every_command_and_snippet(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "d2zero/demo/shapes.safetensors"
    checkpoint.parent.mkdir(parents=True)
    shutil.copy(ROOT / "d2zero/demo/shapes.safetensors", checkpoint)
    ran = 0
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), {})
            ran += 1
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "d2zero":
                outcome = command(*words[1:])
                assert outcome.code == 0, (line, outcome)
                ran += 1
            else:
                assert line.startswith(SETS_UP), f"nothing runs {line!r}"
    assert ran >= 10
    assert (tmp_path / "overlay.png").stat().st_size > 1000
    assert len(list((tmp_path / "found").glob("*.jpg"))) == len(list((tmp_path / "found-by-onnx").glob("*.jpg"))) == 24


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_tables_are_short() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert table.count("\n") - 2 <= 8, table
    assert text.count("\n") < 160
