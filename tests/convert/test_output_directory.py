"""An output directory appears complete or not at all, and replaces only what it may."""

import errno
import logging
import os
import shutil
import stat
from pathlib import Path

import pytest

from kdjax.convert.output_directory import output_directory, refuse_existing
from kdjax.types import UserError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A directory to write, in a directory that does not exist yet."""
    return tmp_path / "new" / "model"


def listing(out: Path) -> list[str]:
    return sorted(os.listdir(out.parent))


def test_it_appears_when_it_is_complete(out: Path) -> None:
    with output_directory(out, 10, force=False) as directory:
        assert not out.exists()
        assert directory.parent == out.parent
        (directory / "file").write_text("x")
    assert listing(out) == ["model"]
    assert (out / "file").read_text() == "x"


def test_it_has_the_usual_permissions(out: Path) -> None:
    """mkdtemp's are for the owner only; the process's umask decides."""
    before = os.umask(0o027)
    try:
        with output_directory(out, 10, force=False):
            pass
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), UserError("x"), OSError(errno.EACCES, "x")])
@pytest.mark.parametrize("exists", [False, True])
def test_it_is_removed_when_the_block_fails(out: Path, error: BaseException, exists: bool) -> None:
    if exists:
        out.mkdir(parents=True)
        (out / "old").touch()
    with pytest.raises(type(error)) as raised, output_directory(out, 10, force=exists) as directory:  # noqa: PT012
        (directory / "file").touch()
        raise error
    assert raised.value is error
    assert listing(out) == (["model"] if exists else [])
    assert not exists or os.listdir(out) == ["old"]


def test_force_replaces_a_directory(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "old").touch()
    with output_directory(out, 10, force=True) as directory:
        (directory / "new").touch()
        assert os.listdir(out) == ["old"]
    assert (listing(out), os.listdir(out)) == (["model"], ["new"])


def test_without_force_a_directory_that_appeared_meanwhile_stays(out: Path) -> None:
    with pytest.raises(OSError, match="not empty"), output_directory(out, 10, force=False) as directory:  # noqa: PT012
        (directory / "new").touch()
        out.mkdir()
        (out / "theirs").touch()
    assert (listing(out), os.listdir(out)) == (["model"], ["theirs"])


def test_the_old_directory_comes_back_when_the_new_one_cannot_be_renamed(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir(parents=True)
    (out / "old").touch()
    rename = Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        if (path / "new").exists():
            raise OSError(errno.EIO, "x")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="x"), output_directory(out, 10, force=True) as directory:
        (directory / "new").touch()
    assert (listing(out), os.listdir(out)) == (["model"], ["old"])


@pytest.mark.parametrize("free", [1_000_000, 999_999])
def test_a_disk_without_room(out: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9_000_000, 0, free))
    if free == 1_000_000:
        with output_directory(out, 1_000_000, force=False):
            pass
        return
    message = r"new has 1.0 MB free and the model may need 1.0 MB; free some space"
    with pytest.raises(UserError, match=message), output_directory(out, 1_000_000, force=False):
        pytest.fail("nothing may be written")
    assert listing(out) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        OSError(errno.EFBIG, "x"),
        ValueError(f"Error writing: {os.strerror(errno.ENOSPC)} [type=x]"),  # TensorStore's
        RuntimeError(f"Error writing: {os.strerror(errno.EDQUOT)}"),
    ],
)
def test_a_disk_that_fills_up(out: Path, error: Exception) -> None:
    message = r"new filled up before model was complete \(.*\); nothing was left behind. The model may need 2.5 MB"
    with pytest.raises(UserError, match=message), output_directory(out, 2_500_000, force=False):
        raise error
    assert listing(out) == []


def test_what_a_killed_conversion_left(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is reported and not touched."""
    (out.parent / ".model.incomplete-1234").mkdir(parents=True)
    (out.parent / ".other.incomplete-1234").mkdir()
    with caplog.at_level(logging.WARNING, "kdjax"), output_directory(out, 10, force=False):
        pass
    assert caplog.messages == [
        f"{out.parent}/.model.incomplete-1234 is left from a conversion that was killed (delete it), "
        "or one is still running"
    ]
    assert listing(out) == [".model.incomplete-1234", ".other.incomplete-1234", "model"]


def test_existing_directories(tmp_path: Path) -> None:
    out = tmp_path / "model"
    for force in (False, True):
        refuse_existing(out, force, "a/mark")
    out.mkdir()
    with pytest.raises(UserError, match=r"model exists already; name another directory, or pass --force to replace"):
        refuse_existing(out, False, "a/mark")
    with pytest.raises(UserError, match=r"--force replaces only directories that hold a/mark, and .*model does not"):
        refuse_existing(out, True, "a/mark")
    (out / "a" / "mark").mkdir(parents=True)
    with pytest.raises(UserError, match=r"move it away"):
        refuse_existing(out, True, "a/mark")  # the marker is a file
    (out / "a" / "mark").rmdir()
    (out / "a" / "mark").touch()
    refuse_existing(out, True, "a/mark")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"link exists already"):
        refuse_existing(tmp_path / "link", False, "a/mark")
