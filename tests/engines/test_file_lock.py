"""Two processes do not do the same work in one folder, and a dead one does not keep it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ltx_engines import file_lock

HOLD = (
    "import sys, pathlib; from ltx_engines import file_lock\n"
    "with file_lock.alone(pathlib.Path(sys.argv[1])) as alone:\n"
    "    print(alone, flush=True)\n"
    "    sys.stdin.read()\n"
)


def test_a_folder_is_for_one_at_a_time_and_free_again_afterwards(tmp_path: Path) -> None:
    with file_lock.alone(tmp_path) as first, file_lock.alone(tmp_path) as second:
        assert (first, second) == (True, False)
    with file_lock.alone(tmp_path) as third:
        assert third
    assert not list(tmp_path.iterdir())


def test_two_folders_have_nothing_to_do_with_each_other(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with file_lock.alone(tmp_path / "one") as one, file_lock.alone(tmp_path) as other:
        assert (one, other) == (True, True)


def test_the_system_takes_the_folder_back_from_a_process_that_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with file_lock.alone(tmp_path) as alone:
            assert not alone
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with file_lock.alone(tmp_path) as alone:
        assert alone


def test_a_bundle_that_gives_way_to_another_is_still_locked(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    with file_lock.beside(target) as first:
        target.rename(tmp_path / "old")
        target.mkdir()
        with file_lock.beside(target) as second:
            assert (first, second) == (True, False)
    assert {file.name for file in tmp_path.iterdir()} == {"bundle", "old"}


def test_a_bundle_that_is_not_there_yet_leaves_no_folder_for_its_lock(tmp_path: Path) -> None:
    with file_lock.beside(tmp_path / "new" / "deep" / "bundle") as free:
        assert free
    assert not list(tmp_path.iterdir())
    with file_lock.beside(tmp_path / "new" / "bundle"):
        (tmp_path / "new" / "bundle").mkdir()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["bundle"]


def test_a_lock_whose_file_its_holder_has_removed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file was opened while another had it, which is done when the lock is there."""
    place = tmp_path / ".bundle.lock"
    lock = file_lock._lock
    seen: list[int] = []

    def late(handle: int) -> None:
        if not seen:
            place.unlink()
        seen.append(handle)
        lock(handle)

    monkeypatch.setattr(file_lock, "_lock", late)
    with file_lock.beside(tmp_path / "bundle") as first:
        monkeypatch.setattr(file_lock, "_lock", lock)
        with file_lock.beside(tmp_path / "bundle") as second:
            assert (first, second) == (True, False)
    assert len(seen) == 2


def test_a_file_that_a_killed_process_has_left_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".bundle.lock").touch()
    with file_lock.building(tmp_path / "bundle"):
        pass
    assert not list(tmp_path.iterdir())
