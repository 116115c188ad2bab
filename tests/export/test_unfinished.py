"""Of two processes with one --out, one works, whatever the other does meanwhile."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from ltx_engines.errors import UserError
from ltx_export import unfinished


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def test_who_holds_it_keeps_others_away_and_leaves_nothing(out: Path) -> None:
    for _ in range(2):
        with unfinished.held(out):
            with pytest.raises(UserError, match=f"is at work on {out}; "), unfinished.held(out):
                pass
            with unfinished.held(out.with_name("other.safetensors")):
                pass
        assert not list(out.parent.iterdir())


def test_what_a_killed_process_left_is_in_nobodys_way(out: Path) -> None:
    out.with_name(f".{out.name}.lock").touch()
    out.with_name(f".{out.name}.0123abcd.partial").touch()
    other = out.with_name(f".{out.name}.other.0123abcd.partial")
    other.touch()
    with unfinished.held(out):
        assert {file.name for file in out.parent.iterdir()} == {f".{out.name}.lock", other.name}
    assert list(out.parent.iterdir()) == [other]


def test_a_calibration_that_is_killed_while_it_writes_leaves_nothing_for_ever(out: Path) -> None:
    """What is half written has a name that the next one knows."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from ltx_export import calibration\n"
        "calibration.os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "calibration.write(calibration.Calibration(Path(sys.argv[1]), {}, {}))"
    )
    assert subprocess.run([sys.executable, "-c", code, out], check=False).returncode == -9
    assert len(list(out.parent.iterdir())) == 1
    with unfinished.held(out):
        pass
    assert not list(out.parent.iterdir())


def test_a_lock_that_its_owner_unlinked_is_not_taken(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = out.with_name(f".{out.name}.lock"), fcntl.flock
    calls = ["unlink", "replace", "leave"]

    def late(file: int, how: int) -> None:
        if (call := calls.pop(0)) != "leave":
            path.unlink()
        if call == "replace":
            path.touch()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with unfinished.held(out):
        assert not calls
        monkeypatch.undo()
        with pytest.raises(UserError, match="is at work on"), unfinished.held(out):
            pass


def test_where_nothing_can_be_locked_a_warning_is_left(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with unfinished.held(out):
        pass
    assert "cannot be locked" in caplog.text


def test_what_cannot_be_written_is_said_at_once(out: Path) -> None:
    long = out.with_name("x" * 245 + ".safetensors")
    with pytest.raises(UserError, match=r"cannot write .*: File name too long"):
        unfinished.held(long).__enter__()
