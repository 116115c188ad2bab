"""The benchmark of step caching: a table of rows, and an exit code from the methods' own ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import step_caching as benchmark
from ltx_trt.step_caching import THRESHOLDS, Method

OWN = THRESHOLDS[Method.easycache]

ROW = benchmark.Row("easycache", OWN, 22.0, 0.45, 1.6, 45.0, 0.99, 0.98, 22, 44.0, 0.99)


@pytest.mark.parametrize(
    ("change", "met"),
    [
        ({}, True),
        ({"hit_rate": 0.1}, False),
        ({"speed_up": 1.1}, False),
        ({"ssim": 0.9}, False),
        ({"threshold": 2 * OWN}, False),
    ],
)
def test_a_method_is_met_by_its_row_at_its_own_threshold(change: dict[str, Any], met: bool) -> None:
    other = replace(ROW, threshold=3 * OWN, ssim=0.0)
    assert benchmark.met(Method.easycache, [other, replace(ROW, **change)]) is met


def test_every_method_is_measured_at_its_own_threshold() -> None:
    assert all(THRESHOLDS[method] in benchmark.GRID[method] for method in Method)


def test_a_cached_clip_is_measured_against_one_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("STEPS", 12), ("WIDTH", 64), ("HEIGHT", 64), ("FRAMES", 9)):
        monkeypatch.setattr(benchmark, name, size)
    monkeypatch.setattr(benchmark, "GRID", {Method.easycache: (0.3,), Method.magcache: (0.0,)})
    out = tmp_path / "facts.json"
    code = benchmark.main(["--clips", "1", "--calibration", "1", "--out", str(out)])
    assert code == 1, "no row is at its method's own threshold"
    printed = capsys.readouterr().out.splitlines()
    facts = json.loads(printed[-1])
    assert facts == json.loads(out.read_text())
    easy, mag = facts["rows"]
    assert easy["computed"] == pytest.approx(12 * (1 - easy["hit_rate"]), abs=1e-3)
    assert 0 < easy["hit_rate"] < 1
    assert 0.5 < easy["worst_ssim"] <= easy["ssim"] < 1
    assert (mag["hit_rate"], mag["ssim"], mag["fewer_ssim"]) == (0.0, 1.0, 1.0)
    assert len(facts["ratios"]) == 12
    assert np.isfinite(facts["calibration"]["r2"])


def test_more_prompts_than_there_are_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"has \d+ prompts, not 1001"):
        benchmark.benchmark(clips=1, calibration=1000)
