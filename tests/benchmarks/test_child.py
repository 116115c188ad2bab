"""A process's cost is its own: not its parent's, and not that of the files it maps."""

import sys
from pathlib import Path

import pytest

from child import ChildError, run

MEGABYTE = 1 << 20


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_what_a_child_writes_to_stdout_comes_back_even_when_it_is_much() -> None:
    _, said = run(python("print('x' * 1_000_000)"))
    assert said == "x" * 1_000_000 + "\n"


def test_memory_that_a_child_holds_is_seen_although_it_is_given_back() -> None:
    small, _ = run(python("import time; time.sleep(0.1)"))
    code = f"import time; x = b'1' * {200 * MEGABYTE}; time.sleep(0.2); del x; time.sleep(0.1)"
    large, _ = run(python(code))
    assert 195 * MEGABYTE < large.peak_anon - small.peak_anon < 220 * MEGABYTE
    assert 200 * MEGABYTE < large.peak_rss < 250 * MEGABYTE


def test_a_mapped_file_is_resident_and_not_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1" * 100 * MEGABYTE)
    code = f"""
import mmap, time
with open({str(path)!r}, "rb") as file:
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for page in range(0, len(view), 4096): view[page]
    time.sleep(0.2)
"""
    cost, _ = run(python(code))
    assert cost.peak_rss > 100 * MEGABYTE
    assert cost.peak_anon < 50 * MEGABYTE


def test_waiting_costs_wall_time_and_no_processor_time() -> None:
    cost, _ = run(python("import time; time.sleep(0.5)"))
    assert cost.wall_s >= 0.5
    assert cost.cpu_s < 0.4


def test_a_child_that_fails_is_quoted() -> None:
    with pytest.raises(ChildError, match=r"ended with 3: no bread"):
        run(python("import sys; print('no bread', file=sys.stderr); sys.exit(3)"))
