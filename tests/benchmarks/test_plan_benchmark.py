"""The benchmark of plans says yes or no with its exit code, and needs no folder made for it."""

import json
from pathlib import Path

import pytest

import plan as benchmark
from report import Facts

PLANNED = {"engine": 104, "build_memory": 60, "activations": 100}
MEASURED = {"engine": 100, "build_memory": 100, "activations": 100}


def test_a_plan_is_met_when_it_is_close_enough_on_either_side() -> None:
    row = benchmark.compared(PLANNED, MEASURED)
    assert row["errors"] == {"engine": 0.04, "build_memory": -0.4, "activations": 0.0}
    assert row["met"] == {"engine": True, "build_memory": False, "activations": True}


def test_every_stage_that_can_be_measured_has_sizes_for_its_profile() -> None:
    for ranges in benchmark.RANGES.values():
        assert all(least <= most for least, most in ranges.values())
    tokens = benchmark.RANGES["transformer"]["tokens"][1]
    width, height, frames = map(int, benchmark.SHAPE.split("x"))
    assert tokens == (width // 32) * (height // 32) * ((frames - 1) // 8 + 1)


@pytest.mark.parametrize(("engine", "code"), [(100, 0), (90, 1)])
def test_a_missed_limit_is_the_exit_code_and_the_folder_is_made(
    engine: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = {"engine": 100, "build_memory": 100, "activations": 100, "convolutions": {}}

    def measured(checkpoint: Path, stage: str, work: Path) -> Facts:
        assert work.is_dir()
        return {"engine": engine, "build_memory": 100, "activations": 100, "build_s": 1.0}

    monkeypatch.setattr(benchmark, "planned", lambda *_: {"vae_decoder": dict(plan)})
    monkeypatch.setattr(benchmark, "measured", measured)
    work = tmp_path / "new" / "folder"
    options = ["--stages", "vae_decoder", "--checkpoint", "x", "--work", str(work)]
    assert benchmark.main(options) == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["met"] is (code == 0)
    assert list(work.iterdir()) == []
