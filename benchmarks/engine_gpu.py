"""Milliseconds of a step by an engine on this machine's GPU, beside its roofline and beside torch.

    python benchmarks/engine_gpu.py [--model 2b] [--layers N] [--precisions bf16,fp8]
                                    [--shape 1216x704x121] [--steps 10] [--peers]

A checkpoint of the true size with random weights (a GPU computes faster on zeros) is exported and
built for the card that is here; a step is one pass of the transformer and the sampler. The roofline
is `ltx-export plan`'s: no kernel is faster than its arithmetic and its bytes. With --peers the same
step by ltx_ref and diffusers, as they are and compiled. Without a GPU it says so, and why. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantized_slice
import report
from child import ChildError, run
from quantized_slice import EXPORT

HERE = Path(__file__).parent
PRECISIONS = ("bf16", "fp8", "int8")
PEERS = ("bf16", "bf16-compiled", "diffusers", "diffusers-compiled")
TRANSFORMER = ("--stages", "transformer")
SPELLED = {
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA A100 80GB PCIe": "A100 80GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
}
"""How the driver calls cards that targets.py calls otherwise."""


@dataclass(frozen=True, slots=True)
class Question:
    """`gpu` is a name of targets.py, or smXX; `layers` None is all of them."""

    model: str
    layers: int | None
    shape: str
    steps: int
    gpu: str


def missing() -> str | None:
    """Why nothing can be measured here."""
    from ltx_export import card

    if card.at_hand() is None:
        return "no NVIDIA GPU is here; run it on a machine that has one"
    return None


def target() -> str:
    """The card by name where its roofline is known, else by its compute capability."""
    from ltx_engines import targets
    from ltx_engines.errors import UserError
    from ltx_export import card

    if (here := card.at_hand()) is None:
        raise AssertionError("asked for without a GPU")
    try:
        return targets.find(SPELLED.get(here.name, here.name)).name
    except UserError:
        return f"sm{here.capability}"


def checkpoint(question: Question, work: Path) -> Path:
    path = work / f"{question.model}.safetensors"
    maker = quantized_slice.ROOT / "tools/make_checkpoint.py"
    size = [] if question.layers is None else ["--layers", str(question.layers)]
    words: list[str | Path] = ["--model", question.model, "--dtype", "bf16", *size]
    run([sys.executable, maker, *words, "--out", path])
    return path


def engine(question: Question, file: Path, precision: str) -> dict[str, Any]:
    """Built and stepped, with CUDA graphs and without."""
    source = file
    if precision != "bf16":
        source = quantized_slice.quantized(file, precision, file.parent)
    bundle = quantized_slice.exported(source)
    sizes = ["--gpu", question.gpu, "--shape", question.shape, "--branches", "1"]
    cost, said = run([*EXPORT, "build-engine", bundle, *TRANSFORMER, *sizes])
    print(said, end="", flush=True)
    step = HERE / "engine_gpu_step.py"
    stepper: list[str | Path] = [sys.executable, step, bundle, question.shape]
    stepper.append(str(question.steps))
    rows: dict[str, Any] = {}
    for name, options in (("graphs", ()), ("kernels", ("--no-cuda-graphs",))):
        _, said = run([*stepper, *options])
        rows[name] = json.loads(said.splitlines()[-1])
    limit = roofline(question, source)
    return {
        "build_s": round(cost.wall_s, 1),
        **rows["graphs"],
        "without_graphs_s": rows["kernels"]["step_s"],
        "graph_gain": round(rows["kernels"]["step_s"] / rows["graphs"]["step_s"], 3),
        "roofline_s": limit,
        "of_roofline": None if limit is None else round(limit / rows["graphs"]["step_s"], 3),
    }


def roofline(question: Question, source: Path) -> float | None:
    """Seconds of one pass at the card's own rates; None for a card whose rates are not known, and
    for one on which the model does not fit."""
    if question.gpu.startswith("sm"):  # plan would take the least card of that capability
        return None
    command: list[str | Path] = [*EXPORT, "plan", source, *TRANSFORMER, "--gpu", question.gpu]
    command += ["--shape", question.shape, "--branches", "1", "--steps", "1", "--json"]
    try:
        _, said = run(command)
    except ChildError:
        return None
    (gpu,) = json.loads(said)["gpus"]
    seconds: float | None = gpu["seconds"].get("transformer")
    return seconds


def peer(question: Question, file: Path, variant: str) -> dict[str, Any]:
    script = HERE / "quantized_gpu_once.py"
    _, said = run([sys.executable, script, variant, file, question.shape, str(question.steps)])
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def benchmark(
    question: Question, precisions: Sequence[str], peers: Sequence[str]
) -> dict[str, Any]:
    """A row that failed says how, and does not end the others."""
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as folder:
        file = checkpoint(question, Path(folder))
        rows = {}
        for precision in precisions:
            rows[f"engine {precision}"] = attempt(question, file, precision, engine)
            print(f"engine {precision:<20} {line(rows[f'engine {precision}'])}", flush=True)
        for variant in peers:
            rows[variant] = attempt(question, file, variant, peer)
            print(f"{variant:<27} {line(rows[variant])}", flush=True)
    return rows


def attempt(question: Question, file: Path, name: str, work: Any) -> dict[str, Any]:
    try:
        row: dict[str, Any] = work(question, file, name)
    except ChildError as error:
        return {"failed": str(error)}
    return row


def line(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return str(row["failed"])
    text = f"{row['step_s'] * 1e3:9.2f} ms a step"
    if row.get("of_roofline") is not None:
        text += f", {row['of_roofline']:.0%} of the roofline"
    if "graph_gain" in row:
        text += f", {row['graph_gain']:.2f}x by CUDA graphs"
        text += f", {max(row['transfers_per_step'], default=0)} copies to or from the host"
    return text


def passed(rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """The engines ran, and nothing went between host and GPU in a step."""
    ours = [row for name, row in rows.items() if name.startswith("engine ")]
    ran = all("failed" not in row for row in ours)
    return bool(ours) and ran and not any(any(row["transfers_per_step"]) for row in ours)


def main(arguments: Sequence[str] | None = None) -> int:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--model", default="2b")
    words.add_argument("--layers", type=int)
    words.add_argument("--precisions", default="bf16,fp8")
    words.add_argument("--shape", default="1216x704x121")
    words.add_argument("--steps", type=int, default=10)
    words.add_argument("--peers", action="store_true")
    asked = words.parse_args(arguments)
    if (reason := missing()) is not None:
        print(f"skipped: {reason}")
        print(json.dumps({"skipped": reason}))
        return 0
    question = Question(asked.model, asked.layers, asked.shape, asked.steps, target())
    rows = benchmark(question, asked.precisions.split(","), PEERS if asked.peers else ())
    facts = {"machine": report.machine(), "gpu": question.gpu, "shape": asked.shape}
    print(json.dumps({**facts, "model": asked.model, "rows": rows, "passed": passed(rows)}))
    return 0 if passed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
