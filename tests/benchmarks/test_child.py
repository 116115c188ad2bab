"""A process's cost is its own: not its parent's, and not that of the files it maps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import child
from tests.waiting import HANG

MEGABYTE = 1 << 20


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


OUTER = """
import json, os, sys, child
from pathlib import Path

least, *command = sys.argv[1:]
looked, waits, seen = child.anonymous, Path("waits"), Path("seen")
for left in (waits, seen):
    left.unlink(missing_ok=True)

def look(pid):
    waited = waits.exists()
    found = looked(pid)
    if waited and found >= int(least):
        seen.touch()
    return found

child.anonymous = look
print(json.dumps(child.run(command)[0].row()))
"""
UNTIL_SEEN = """
import pathlib, time
pathlib.Path("waits").touch()
while not pathlib.Path("seen").exists(): time.sleep(0.01)
"""


def cost(code: str, folder: Path, least: int = 0) -> dict[str, Any]:
    """As a benchmark measures it: from a parent that, unlike this one, has imported nothing. What
    waits UNTIL_SEEN ends after a look that began while it waited, and saw so many bytes."""
    home = str(Path(str(child.__file__)).parent)
    result = subprocess.run(
        [*python(OUTER), str(least), *python(code)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": home},
        check=True,
        stdout=subprocess.PIPE,
        timeout=HANG,
    )
    return dict(json.loads(result.stdout))


def test_what_a_child_writes_to_stdout_comes_back_even_when_it_is_much() -> None:
    _, said = child.run(python("print('x' * 1_000_000)"))
    assert said == "x" * 1_000_000 + "\n"


def test_memory_that_a_child_holds_is_seen_although_it_is_given_back(tmp_path: Path) -> None:
    small = cost(UNTIL_SEEN, tmp_path)
    size = 200 * MEGABYTE
    large = cost(f"x = b'1' * {size}\n{UNTIL_SEEN}\ndel x", tmp_path, size)
    for kind in ("peak_anon", "peak_rss"):
        assert 190 * MEGABYTE < large[kind] - small[kind] < 210 * MEGABYTE


def test_a_mapped_file_is_resident_and_not_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1" * 100 * MEGABYTE)
    found = cost(
        f"""
import mmap
file = open({str(path)!r}, "rb")
view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
for page in range(0, len(view), 4096): view[page]
{UNTIL_SEEN}
""",
        tmp_path,
    )
    assert found["peak_rss"] > 100 * MEGABYTE
    assert found["peak_anon"] < 50 * MEGABYTE


def test_waiting_costs_wall_time_and_no_processor_time(tmp_path: Path) -> None:
    """Of what passes beside it a machine may take as long as it likes for Python's own start."""
    found = cost("import time; time.sleep(0.5)", tmp_path)
    assert found["wall_s"] >= 0.5
    assert found["cpu_s"] < found["wall_s"] - 0.4


def test_a_child_that_fails_is_quoted() -> None:
    with pytest.raises(child.ChildError, match=r"ended with 3: no bread"):
        child.run(python("import sys; print('no bread', file=sys.stderr); sys.exit(3)"))
