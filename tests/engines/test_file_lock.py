"""Two processes do not do the same work in one folder, and a dead one does not keep it."""

import signal
import subprocess
import sys
from pathlib import Path

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
