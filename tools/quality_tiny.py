"""Calibrate, quantize, export and play ltx-tiny by every recipe, and report how near each stays.

    python tools/quality_tiny.py

Everything goes through the command lines that users have. The prompts of the report describe scenes
that training never showed, those of the calibration are others; beside the measures of pictures
stands the share of clips in which `tiny.detector`, which is no model, sees what was asked for.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eval_tiny import held_out, missed
from ltx_engines.metrics import Frames
from ltx_export import cli, console, quality, quality_report
from ltx_export.quality import Comparison, Order, Quality, Scorer
from tiny.clips import Scene
from tiny.detector import detect

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "runtime/ltx_trt/ltx_tiny"
CONFIG = ROOT / "tools/tiny/ltx-tiny.yaml"
CALIBRATION_PROMPTS, CALIBRATION_COUNT = ROOT / "tools/tiny/prompts.txt", 8
REFERENCE = "float32"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a recipe must reach against the float bundle; `score` is how far the share of obeyed
    prompts may be from the reference's."""

    ssim: float
    psnr: float | None = None
    score: float | None = None


BOUNDS: Mapping[str, Bounds | None] = {
    "fp8": Bounds(ssim=0.97, psnr=32.0, score=0.02),
    "int8": Bounds(ssim=0.97, psnr=32.0, score=0.02),
    "fp8-cast": Bounds(ssim=0.98),
    "int8-wo": Bounds(ssim=0.98),
    "int4-wo": None,
}
"""By recipe; the last one is there to be looked at."""

CALIBRATED = ("fp8", "int8")


def main(
    out: Annotated[Path, typer.Option(help="The folder of the report.")] = ROOT
    / "benchmarks/results/quality",
    work: Annotated[Path, typer.Option(help="The folder of what is made on the way.")] = ROOT
    / "build/quality",
    prompts: Annotated[int, typer.Option(min=1, help="How many clips of each bundle.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts and of the first clip.")] = 0,
) -> None:
    """Exit code 1 if a recipe misses its bounds."""
    quality_report.check(out, overwrite=True)
    work.mkdir(parents=True, exist_ok=True)
    bundles = tuple(made(work))
    asked = held_out(prompts, seed)
    file = work / "held-out.txt"
    file.write_text("".join(f"{prompt}\n" for _, prompt in asked), encoding="utf-8")
    reference, *others = bundles
    order = Order(tuple(others), reference, file, seed=seed, scratch=work)
    found = measured(order, detector({prompt: scene for scene, prompt in asked}))
    quality_report.write(found, out, "python tools/quality_tiny.py")
    print("\n".join(quality_report.table(found)))
    if failures := list(failed(found)):
        print("\n".join(failures))
        raise typer.Exit(1)


def made(work: Path) -> Iterator[Path]:
    """The float bundle, then one for each recipe; all are made anew but for the ranges."""
    checkpoint, text_encoder = MODEL / "ltx-tiny.safetensors", MODEL / "text_encoder"
    ranges = work / "ltx-tiny.calibration.safetensors"
    common = ("--text-encoder", text_encoder, "--pipeline-config", CONFIG)
    yield exported(checkpoint, work / REFERENCE, *common)
    texts = ("--prompts", CALIBRATION_PROMPTS, "--first", CALIBRATION_COUNT)
    ltx_export("calibrate", checkpoint, *common, *texts, "--out", ranges)
    for recipe in BOUNDS:
        smaller = work / f"ltx-tiny-{recipe}.safetensors"
        more = ("--calibration", ranges) if recipe in CALIBRATED else ()
        target = ("--out", smaller, "--overwrite")
        ltx_export("quantize", checkpoint, "--recipe", recipe, *more, *target)
        yield exported(smaller, work / recipe, *common)


def exported(checkpoint: Path, bundle: Path, *options: object) -> Path:
    precision = ("--precision", "float32", "--overwrite")
    ltx_export("onnx", checkpoint, *options, "--out", bundle, *precision)
    return bundle


def ltx_export(*words: object) -> None:
    """A command of the exporter; its own words say why it failed."""
    arguments = [str(word) for word in words]
    print(f"$ ltx-export {shlex.join(arguments)}", flush=True)
    if code := cli.main(arguments):
        raise typer.Exit(code)


def measured(order: Order, scorer: Scorer) -> Quality:
    found: list[Quality] = []

    def steps() -> Iterator[str]:
        found.append((yield from quality.run(order, scorer)))

    console.follow(steps())
    return found[0]


def detector(scenes: Mapping[str, Scene]) -> Scorer:
    """1 for a clip whose colours and direction are those of its prompt."""

    def score(prompt: str, clip: Frames) -> float:
        return float(not missed(scenes[prompt], detect(clip)))

    return Scorer("detector", score)


def failed(found: Quality) -> Iterator[str]:
    """A sentence for each bound that is missed."""
    for comparison in found.comparisons:
        bounds = BOUNDS[comparison.name]
        if bounds is None:
            continue
        limits = quality.Minima(ssim=bounds.ssim, psnr=bounds.psnr)
        yield from limits.missed(comparison)
        if bounds.score is not None:
            yield from _astray(comparison, found.reference_score, bounds.score)


def _astray(comparison: Comparison, reference: float | None, limit: float) -> Iterator[str]:
    if comparison.score is None or reference is None:
        raise ValueError(f"{comparison.name} was measured without the detector")
    if abs(comparison.score - reference) > limit + 1e-9:  # a share of 40 clips is not exact
        yield (
            f"{comparison.name}: the detector's score is {comparison.score:.1%}, the reference's "
            f"{reference:.1%}; more than {limit:.0%} apart"
        )


if __name__ == "__main__":
    typer.run(main)
