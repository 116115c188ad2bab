"""A benchmark goes on after a failure, says it, and compares like with like."""

import sys
from functools import partial
from pathlib import Path

import pytest

import load
from child import run
from report import Facts, attempt, ratios

OURS = {"wall_s": 2.0, "cpu_s": 1.0, "peak_rss": 100, "peak_anon": 50, "new_bytes": 10}


def fail() -> Facts:
    run([sys.executable, "-c", "raise SystemExit('no such option')"])
    return {}


def test_a_failed_row_is_said_and_has_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    failed = attempt("transformer-2b", fail)
    assert "no such option" in failed["failed"]
    assert "no such option" in capsys.readouterr().out
    assert ratios(failed, OURS) == ratios(OURS, failed) == {}


def test_a_good_row_passes_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    row = Facts(OURS)
    assert attempt("vae-decoder", partial(dict, row)) == row
    assert "2.0 s" in capsys.readouterr().out


def test_a_ratio_says_how_many_times_as_much_the_peer_takes() -> None:
    theirs = {key: 10 * value for key, value in OURS.items()}
    assert set(ratios(OURS, theirs).values()) == {10}


SESSION = {"ready_s": 1.0, "private": 10**8, "private_peak": 10**8, "first_step_s": 1.0}


@pytest.mark.parametrize(
    ("worse", "missed"),
    [
        ({}, set()),
        ({"ready_s": 1.6}, {"ready"}),
        ({"private_peak": 3 * 10**8}, {"private"}),
        ({"step_s_each": [1.1, 2.2, 1.9]}, {"step"}),
        ({"step_s_each": [1.0, 9.0, 2.0]}, set()),
    ],
)
def test_an_aim_is_met_or_missed_by_its_own_figure(worse: Facts, missed: set[str]) -> None:
    default = SESSION | {"step_s_each": [1.0, 2.0, 2.0], "sum": 7.0}
    verdict = load.judged(default | worse, default)
    assert {aim for aim, met in verdict["met"].items() if not met} == missed


@pytest.mark.parametrize(("missed", "code"), [(False, 0), (True, 1)])
def test_a_missed_aim_is_the_exit_code(
    missed: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = {"ready": True, "private": True, "step": not missed}
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # put back after main has set it
    monkeypatch.setattr(load, "benchmark", lambda *_: {"met": met})
    assert load.main(["--work", str(tmp_path / "new")]) == code
