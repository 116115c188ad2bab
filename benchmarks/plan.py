"""What `ltx-export plan` says of an engine, against TensorRT-RTX building it on this machine.

    python benchmarks/plan.py [--stages transformer,vae_decoder] [--checkpoint FILE] [--work FOLDER]

The true 2B model in bf16 for SM89, up to 2 branches of 16,384 tokens (1024x1024x121): the engine's
bytes, the builder's host memory and the activation memory that it reports. No GPU is needed, but
12 GB of memory, and 11 GB of disk. Everything written is removed. The last line is JSON, the
exit code 1 when the plan is further off than LIMITS.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from child import run
from report import Facts, machine

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "benchmarks/build_once.py"
MAKE = ROOT / "tools/make_checkpoint.py"

SHAPE = "1024x1024x121"
BRANCHES = 2
RANGES = {
    "transformer": {"batch": (1, BRANCHES), "tokens": (256, 16384)}
    | {"text": (256, 256), "timesteps": (1, 1)},
    "vae_decoder": {"batch": (1, 1), "latent_frames": (16, 16)}
    | {"latent_height": (32, 32), "latent_width": (32, 32)},
    "vae_encoder": {"batch": (1, 1), "frames": (121, 121), "height": (1024, 1024)}
    | {"width": (1024, 1024), "latent_frames": (16, 16)}
    | {"latent_height": (32, 32), "latent_width": (32, 32)},
}
"""Of the profiles: the smallest and the largest size of each axis."""

LIMITS = {"engine": 0.05, "build_memory": 0.25, "activations": 0.25}
"""How far a plan may be from what is measured."""


def planned(checkpoint: Path, stages: Sequence[str]) -> dict[str, Facts]:
    options = ["--stages", ",".join(stages)]
    cost, said = run([sys.executable, __file__, "--plan", checkpoint, *options])
    print(f"planned in {cost.wall_s:.1f} s, {cost.peak_rss / 1e6:.0f} MB", flush=True)
    found: dict[str, Facts] = json.loads(said)
    return found


def print_plan(checkpoint: Path, stages: Sequence[str]) -> None:
    """Run in a process of its own: this one stays small, so that it does not count in others'."""
    from ltx_export import plan, plan_report, sources, stage_plan
    from ltx_export.plan_question import Question

    question = Question((SHAPE,), branches=BRANCHES, gpus=("rtx 4090",))
    found = plan.make(question, stage_plan.parts(sources.read(checkpoint), question, stages))
    print(json.dumps(plan_report.document(found)["stages"]))


def measured(checkpoint: Path, stage: str, work: Path) -> Facts:
    bundle, engine = work / stage, work / f"{stage}.engine"
    options = ["--out", str(bundle), "--stages", stage, "--opset", "23"]
    run([sys.executable, "-m", "ltx_export.cli", "onnx", checkpoint, *options])
    ranges = json.dumps(RANGES[stage])
    cost, said = run([sys.executable, BUILD, bundle / f"{stage}.onnx", engine, ranges])
    engine.unlink()
    facts: Facts = json.loads(said.splitlines()[-1])
    return facts | cost.row() | {"build_memory": cost.peak_rss}


def compared(plan: Facts, found: Facts) -> Facts:
    """How much the plan is above what was measured, as a share of it."""
    errors = {key: round(plan[key] / found[key] - 1, 4) for key in LIMITS}
    met = {key: abs(error) <= LIMITS[key] for key, error in errors.items()}
    return {"plan": plan, "measured": found, "errors": errors, "met": met}


def benchmark(checkpoint: Path, stages: Sequence[str], work: Path) -> Facts:
    plans = planned(checkpoint, stages)
    report: Facts = {"machine": machine(), "shape": SHAPE, "branches": BRANCHES}
    for stage in stages:
        row = compared(plans[stage], measured(checkpoint, stage, work))
        del row["plan"]["convolutions"]
        report[stage] = row
        said = ", ".join(
            f"{key} {row['plan'][key] / 1e9:.3f} planned, {row['measured'][key] / 1e9:.3f} GB "
            f"({error:+.1%})"
            for key, error in row["errors"].items()
        )
        print(f"{stage}: built in {row['measured']['build_s']} s; {said}", flush=True)
    return report | {"met": all(all(report[stage]["met"].values()) for stage in stages)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", default="transformer,vae_decoder")
    parser.add_argument(
        "--checkpoint", type=Path, help="else a random 2B; zeros are too small an engine"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build", help="a folder with 11 GB left"
    )
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    stages = options.stages.split(",")
    if options.plan:
        print_plan(options.plan, stages)
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        checkpoint = options.checkpoint or work / "2b.safetensors"
        if not options.checkpoint:
            run([sys.executable, MAKE, "--model", "2b", "--out", checkpoint])
        report = benchmark(checkpoint, stages, work)
    print(json.dumps(report))
    return 0 if report["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
