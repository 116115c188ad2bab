"""The report on ltx-tiny: what its bounds mean, and what the detector says of drawn clips."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import quality_tiny
from eval_tiny import held_out
from ltx_engines import prompts
from ltx_engines.metrics import Measures
from ltx_export.quality import Clip, Comparison, Order, Quality
from ltx_export.recipes import load
from ltx_export.runtime_process import Terms
from quality_tiny import BOUNDS, CALIBRATED, CALIBRATION_COUNT, CALIBRATION_PROMPTS, failed
from tiny import clips
from tiny.clips import Format, Scene

ROOT = Path(__file__).parents[2]
SCENE = Scene("circle", "red", "blue", "right")
STRIP = np.zeros((8, 8, 3), np.uint8)
CLIPS = 40


def comparison(name: str, ssim: float, psnr: float, wrong: int) -> Comparison:
    """Of forty clips of which the detector finds some wrong."""
    measures = Measures(psnr, ssim, 1.0, 0.0)
    scores = [0.0] * wrong + [1.0] * (CLIPS - wrong)
    return Comparison(name, tuple(Clip("a", 0, measures, STRIP, score) for score in scores))


def found(*comparisons: Comparison, score: float = 1.0) -> Quality:
    terms = Terms(0, 25, 128, 128, 24.0, "euler", (1.0, 0.0))
    return Quality("float32", "p", terms, "no", "detector", (STRIP,) * CLIPS, score, comparisons)


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_codes_of_activations_have_three_bounds(recipe: str) -> None:
    assert not list(failed(found(comparison(recipe, 0.97, 32, wrong=0))))
    bad = list(failed(found(comparison(recipe, 0.9699, 31.9, wrong=1))))
    assert [line.split(": ")[1][:4] for line in bad] == ["SSIM", "PSNR", "the "]
    assert "the detector's score is 97.5%, the reference's 100.0%" in bad[2]


@pytest.mark.parametrize("recipe", ["fp8-cast", "int8-wo"])
def test_codes_of_weights_alone_must_be_nearer(recipe: str) -> None:
    assert not list(failed(found(comparison(recipe, 0.98, 20, wrong=9))))
    assert len(list(failed(found(comparison(recipe, 0.9799, 60, wrong=0))))) == 1


def test_a_score_above_the_references_is_as_far_as_one_below() -> None:
    better = comparison("int8", 1, 60, wrong=0)
    assert len(list(failed(found(better, score=0.975)))) == 1
    assert not list(failed(found(better, score=0.98)))


def test_a_comparison_without_the_detector_is_a_programmers_mistake() -> None:
    blind = comparison("int8", 1, 60, wrong=0)
    blind = replace(blind, clips=tuple(replace(clip, score=None) for clip in blind.clips))
    with pytest.raises(ValueError, match="without the detector"):
        list(failed(found(blind)))


def test_the_detector_scores_colours_and_direction() -> None:
    scorer = quality_tiny.detector({"a": SCENE, "b": replace(SCENE, direction="left")})
    clip = clips.draw(SCENE, Format(25, 128, 128, 24.0), np.random.default_rng(0))
    assert (scorer.score("a", clip), scorer.score("b", clip)) == (1, 0)


def test_every_recipe_of_the_report_is_shipped_and_calibrated_as_it_says() -> None:
    assert {name for name in BOUNDS if load(name).calibrated} == set(CALIBRATED)


def test_there_are_prompts_to_calibrate_with_and_none_is_of_the_report() -> None:
    calibrated = prompts.read(CALIBRATION_PROMPTS)
    assert len(calibrated) >= CALIBRATION_COUNT
    assert not set(calibrated) & {prompt for _, prompt in held_out(CLIPS, 0)}


def test_the_shipped_report_is_of_every_recipe_and_reaches_the_bounds() -> None:
    import json

    report = json.loads((ROOT / "benchmarks/results/quality/report.json").read_text())
    assert set(report["bundles"]) == set(BOUNDS)
    assert report["clips"] == CLIPS
    for name, bounds in BOUNDS.items():
        if bounds is not None:
            means = report["bundles"][name]["means"]
            assert means["ssim"] >= bounds.ssim, name
            assert means["psnr"] >= (bounds.psnr or 0), name
            away = abs(report["bundles"][name]["score"] - report["reference_score"])
            assert away <= (bounds.score or 1), name


def test_two_clips_of_ltx_tiny_are_measured_and_scored(tmp_path: Path) -> None:
    """The shipped bundle against a copy of itself: equal, and the detector sees what was asked."""
    pytest.importorskip("onnxruntime")
    copy = tmp_path / "copy"
    shutil.copytree(quality_tiny.MODEL, copy)
    asked = held_out(2, 0)
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for _, prompt in asked))
    scorer = quality_tiny.detector({prompt: scene for scene, prompt in asked})
    order = Order((copy,), quality_tiny.MODEL, file, seed=0, scratch=tmp_path)
    result = quality_tiny.measured(order, scorer)
    assert result.comparisons[0].mean("ssim") == 1
    assert result.reference_score == result.comparisons[0].score == 1
