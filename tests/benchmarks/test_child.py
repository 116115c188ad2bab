"""A process's cost is its own: not its parent's, and not that of the files it maps."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import child

MEGABYTE = 1 << 20


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def cost(code: str) -> dict[str, Any]:
    """As a benchmark measures it: from a parent that, unlike this one, has imported nothing."""
    outer = "import json, sys, child; print(json.dumps(child.run(sys.argv[1:])[0].row()))"
    home = Path(str(child.__file__)).parent
    result = subprocess.run(
        [*python(outer), *python(code)], cwd=home, check=True, stdout=subprocess.PIPE
    )
    return dict(json.loads(result.stdout))


def test_what_a_child_writes_to_stdout_comes_back_even_when_it_is_much() -> None:
    _, said = child.run(python("print('x' * 1_000_000)"))
    assert said == "x" * 1_000_000 + "\n"


def test_memory_that_a_child_holds_is_seen_although_it_is_given_back() -> None:
    small = cost("import time; time.sleep(0.1)")
    large = cost(f"import time; x = b'1' * {200 * MEGABYTE}; time.sleep(0.2); del x")
    for kind in ("peak_anon", "peak_rss"):
        assert 190 * MEGABYTE < large[kind] - small[kind] < 210 * MEGABYTE


def test_a_mapped_file_is_resident_and_not_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1" * 100 * MEGABYTE)
    found = cost(f"""
import mmap, time
with open({str(path)!r}, "rb") as file:
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for page in range(0, len(view), 4096): view[page]
    time.sleep(0.2)
""")
    assert found["peak_rss"] > 100 * MEGABYTE
    assert found["peak_anon"] < 50 * MEGABYTE


def test_waiting_costs_wall_time_and_no_processor_time() -> None:
    found = cost("import time; time.sleep(0.5)")
    assert found["wall_s"] >= 0.5
    assert found["cpu_s"] < 0.4


def test_a_child_that_fails_is_quoted() -> None:
    with pytest.raises(child.ChildError, match=r"ended with 3: no bread"):
        child.run(python("import sys; print('no bread', file=sys.stderr); sys.exit(3)"))
