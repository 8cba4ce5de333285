"""Files are whole or not there."""

from pathlib import Path

import pytest

from d2zero_runtime.files import atomic_write


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.onnx"
    with atomic_write(path) as partial:
        partial.write_bytes(b"first")
        assert partial.parent == path.parent and not path.exists()
    with atomic_write(path) as partial:
        partial.write_bytes(b"second")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]


def test_what_cannot_take_its_place_is_not_left(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "m.onnx") as partial:
        partial.write_bytes(b"first")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"first")
    with pytest.raises(type(error)), atomic_write(path) as partial:
        partial.write_bytes(b"half of the sec")
        raise error
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one_and_permissions_are_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "v3.onnx", tmp_path / "current.onnx"
    target.write_bytes(b"first")
    target.chmod(0o664)
    link.symlink_to(target.name)
    with atomic_write(link) as partial:
        partial.write_bytes(b"second")
    assert link.is_symlink() and target.read_bytes() == b"second"
    assert target.stat().st_mode & 0o777 == 0o664


def test_names_may_have_the_most_bytes_that_a_name_can(tmp_path: Path) -> None:
    with atomic_write(tmp_path / ("é" * 120 + ".json")) as partial:
        partial.write_bytes(b"whole")
    assert len(list(tmp_path.iterdir())) == 1


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "private") as partial:
        partial.write_bytes(b"")
        partial.chmod(0o600)  # as some writers do
    assert (tmp_path / "private").stat().st_mode == (tmp_path / "plain").stat().st_mode
