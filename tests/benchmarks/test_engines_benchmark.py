"""The engines' benchmark judges what it has measured, and measures the builder, not its parent."""

import sys
from pathlib import Path
from typing import Any

import pytest

import child
import engines
from engines import ROWS, Row

LARGE = next(row for row in ROWS if row.stage == "transformer")
TINY = next(row for row in ROWS if row.tiny)
COUNTS = ("products", "wanted_products", "attentions", "wanted_attentions")
STAGE = {"weights": 1000, "engine": 1010, "score_kernels": 0} | dict.fromkeys(COUNTS, 5)
FOUND = {"up_to_date_s": 0.9, "peak_anon": 1350, "stages": {"transformer": STAGE}}


def found(**changes: Any) -> dict[str, Any]:
    """As measured, with these changes to the run or to its stage."""
    stage = {name: value for name, value in changes.items() if name in STAGE}
    return FOUND | changes | {"stages": {"transformer": STAGE | stage}}


def test_what_meets_every_aim_is_said_with_its_shares() -> None:
    row = found()
    assert all(engines.met(LARGE, row).values())
    assert (row["memory_per_weight"], row["engine_per_weight"]) == (1.35, 1.01)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"peak_anon": 1360}, "memory"),
        ({"engine": 1600}, "engine"),
        ({"up_to_date_s": 1.1}, "up_to_date"),
        ({"products": 4}, "products"),
        ({"attentions": 4}, "attentions"),
        ({"score_kernels": 1}, "no_scores"),
    ],
)
def test_each_aim_can_be_missed(changes: dict[str, Any], missed: str) -> None:
    met = engines.met(LARGE, found(**changes))
    assert [aim for aim, well in met.items() if not well] == [missed]


def test_a_tiny_engine_is_not_judged_by_the_size_of_its_kernels() -> None:
    assert all(engines.met(TINY, found(peak_anon=9e9, engine=9e9)).values())


def test_a_row_is_the_command_that_a_user_would_give() -> None:
    row = Row("x", ("sm75", "sm86"), "int8", "all", "fp16")
    words = engines.command(row, Path("2b"), Path("ranges"), Path("out"))
    text = " ".join(map(str, words))
    assert "--gpu sm75 --gpu sm86 --precision int8 --calibration ranges" in text
    assert text.endswith("--rest-precision fp16 --out out")
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_memory_is_that_of_the_largest_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which holds it until it has been seen."""
    looked, seen = child.anonymous, tmp_path / "seen"

    def look(pid: int) -> int:
        if (found := looked(pid)) > 50 << 20:
            seen.touch()
        return found

    monkeypatch.setattr(child, "anonymous", look)
    wait = f"while not pathlib.Path({str(seen)!r}).exists(): time.sleep(0.01)"
    hungry = f"import pathlib, time; held = b'x' * {50 << 20}\n{wait}"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hungry!r}])"
    cost, _ = child.run([sys.executable, "-c", parent], child.ChildrenWatch)
    alone, _ = child.run([sys.executable, "-c", parent])
    assert cost.peak_anon > 50 << 20 > alone.peak_anon
