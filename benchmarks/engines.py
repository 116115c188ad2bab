"""What `ltx-export build-engine` takes and makes of the true 2B model, without a GPU.

    python benchmarks/engines.py [--checkpoint 2B.safetensors] [--only NAME ...] [--work FOLDER]

Each row is the command as a process of its own, from a bfloat16 checkpoint of random weights (with
zeros alone the builder would keep one weight of each shape) to a bundle with an engine: graphs,
quantization on the way, the engine, its table. Then the command is run again, which must find that
all is up to date. The tiny rows are the shipped model, all stages, several GPUs in one command.
Ranges of activations are made up: they decide the numbers, not sizes, kernels or time. Everything
written is removed. The last line is JSON, the exit code 1 when an aim is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import quantized_slice
from child import ChildrenWatch, run
from ltx_engines.stages import STREAM
from report import Facts, attempt, machine

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "runtime/ltx_trt/ltx_tiny"
CONFIG = ROOT / "tools/tiny/ltx-tiny.yaml"

CLIP = "1216x704x121"
TILE = "608x352x65"
"""A quarter of the clip's area, in half of its frames."""
PIECE = 16
"""Frames at a time of a decoder that goes on, of the clip's whole area."""

MOST_MEMORY = 1.35
"""Anonymous memory of the transformer's builder, in sizes of the weights."""
MOST_ENGINE = 1.05
"""Bytes of an engine, in sizes of the weights."""
UP_TO_DATE = 1.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    gpus: tuple[str, ...]
    precision: str
    stage: str = "transformer"
    """`all` for the tiny model."""
    rest: str | None = None
    split: int | None = None

    @property
    def tiny(self) -> bool:
        return self.stage == "all"


ROWS = (
    Row("2b-bf16-sm89", ("sm89",), "bf16"),
    Row("2b-bf16-sm120", ("sm120",), "bf16"),
    Row("2b-bf16-sm89-split", ("sm89",), "bf16", split=2),
    Row("2b-fp8-sm89", ("sm89",), "fp8"),
    Row("2b-fp8-sm89-split", ("sm89",), "fp8", split=2),
    Row("2b-fp8-sm120", ("sm120",), "fp8"),
    Row("2b-fp8-both", ("sm89", "sm120"), "fp8"),
    Row("vae-decoder-tile-sm89", ("sm89",), "bf16", "vae_decoder"),
    Row("vae-decoder-stream-sm89", ("sm89",), "bf16", STREAM),
    Row("tiny-bf16", ("sm86", "sm89", "sm120"), "bf16", "all"),
    Row("tiny-fp8", ("sm89", "sm120"), "fp8", "all"),
    Row("tiny-int8", ("sm86", "sm89", "sm120"), "int8", "all"),
    Row("tiny-int8-fp16", ("sm75", "sm86", "sm89", "sm120"), "int8", "all", "fp16"),
)
NAMES = tuple(row.name for row in ROWS)


def command(row: Row, checkpoint: Path, ranges: Path, out: Path) -> list[str | Path]:
    words: list[str | Path] = [*quantized_slice.EXPORT, "build-engine"]
    if row.tiny:
        words += [TINY / "ltx-tiny.safetensors", "--text-encoder", TINY / "text_encoder"]
        words += ["--pipeline-config", CONFIG, "--shape", "96x96x17"]
    else:
        words += [checkpoint, "--stages", row.stage, "--shape", CLIP]
    words += [word for gpu in row.gpus for word in ("--gpu", gpu)]
    words += ["--precision", row.precision]
    if row.precision in quantized_slice.CALIBRATED:
        words += ["--calibration", ranges]
    if row.rest:
        words += ["--rest-precision", row.rest]
    if row.split:
        words += ["--split", str(row.split)]
    if row.stage == "vae_decoder":
        words += ["--vae-tile", TILE]
    if row.stage == STREAM:
        words += ["--vae-stream", str(PIECE)]
    return [*words, "--out", out]


def measure(row: Row, checkpoint: Path, work: Path) -> Facts:
    source = TINY / "ltx-tiny.safetensors" if row.tiny else checkpoint
    ranges, out = work / f"{source.stem}-ranges.safetensors", work / row.name
    if row.precision in quantized_slice.CALIBRATED and not ranges.exists():
        run([sys.executable, quantized_slice.__file__, source, ranges])
    words = command(row, checkpoint, ranges, out)
    try:
        cost, _ = run(words, ChildrenWatch)
        again, said = run(words)
        if "up to date" not in said:
            raise AssertionError(f"the second run said {said}")
        _, facts = run([sys.executable, __file__, "--facts", out])
    finally:
        shutil.rmtree(out, ignore_errors=True)
    stages = json.loads(facts.splitlines()[-1])
    found = cost.row() | {"up_to_date_s": round(again.wall_s, 2), "stages": stages}
    return found | {"met": met(row, found)}


def met(row: Row, found: Facts) -> dict[str, bool]:
    """The aims. A tiny engine is mostly kernels, and its builder mostly itself."""
    stages = found["stages"].values()
    aims = {
        "up_to_date": found["up_to_date_s"] <= UP_TO_DATE,
        "products": all(stage["products"] == stage["wanted_products"] for stage in stages),
        "attentions": all(stage["attentions"] >= stage["wanted_attentions"] for stage in stages),
        "no_scores": not any(stage["score_kernels"] for stage in stages),
    }
    if not row.tiny:
        stage = found["stages"][row.stage]
        found["memory_per_weight"] = round(found["peak_anon"] / stage["weights"], 3)
        found["engine_per_weight"] = round(stage["engine"] / stage["weights"], 3)
        if row.stage == "transformer":
            aims["memory"] = found["memory_per_weight"] <= MOST_MEMORY
        aims["engine"] = found["engine_per_weight"] <= MOST_ENGINE
    return aims


def facts(bundle: Path) -> Facts:
    """Of each stage's engines together; run in a process of its own."""
    from ltx_engines.bundle import open_bundle
    from ltx_export import engine_needs, engine_refusals

    opened, found = open_bundle(bundle), Facts()
    for engine in opened.manifest.engines:
        stage, counts = engine.key.stage, engine.counts
        graph = opened.file(opened.stage(stage).file)
        wanted = engine_refusals.wanted(opened, engine.key, graph)
        before = found.get(stage, {})
        sums = {
            "engine": opened.manifest.files[engine.file].bytes,
            "kernels": counts["kernels"],
            "products": sum(n for what, n in counts.items() if what.startswith("products")),
            "attentions": counts["fused attentions"],
            "score_kernels": counts["score kernels"],
        }
        found[stage] = {name: number + before.get(name, 0) for name, number in sums.items()} | {
            "parts": before.get("parts", 0) + 1,
            "weights": engine_needs.weight_bytes(graph),
            "activations": max(engine.activations, before.get("activations", 0)),
            "wanted_products": len(wanted.products) * wanted.profiles,
            "wanted_attentions": wanted.attentions * wanted.profiles,
        }
    return found


def benchmark(rows: Sequence[Row], checkpoint: Path, work: Path) -> Facts:
    report: Facts = {"machine": machine(), "clip": CLIP, "tile": TILE, "piece": PIECE, "rows": {}}
    for row in rows:
        result = attempt(row.name, partial(measure, row, checkpoint, work))
        report["rows"][row.name] = result
        print(f"{'':<32}{said(row, result)}", flush=True)
    return report


def said(row: Row, result: Facts) -> str:
    if "failed" in result:
        return ""
    sizes = ", ".join(f"{name} {s['engine'] / 1e6:.1f} MB" for name, s in result["stages"].items())
    memory = f"builder {result['peak_anon'] / 1e6:.0f} MB"
    if not row.tiny:
        memory += f" ({result['memory_per_weight']} x the weights)"
    missed = [aim for aim, well in result["met"].items() if not well]
    return f"{sizes}; {memory}; missed: {', '.join(missed) or 'nothing'}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="a random bfloat16 2B; else it is made")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build", help="a folder with 20 GB left"
    )
    parser.add_argument("--facts", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.facts is not None:
        print(json.dumps(facts(options.facts)))
        return 0
    rows = [row for row in ROWS if row.name in options.only]
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-engines-") as folder:
        work = Path(folder)
        os.environ["XDG_CACHE_HOME"] = f"{work}/cache"  # the run leaves no memory
        checkpoint = work / "2b.safetensors"
        if options.checkpoint is not None:
            checkpoint.symlink_to(options.checkpoint.resolve())
        elif not all(row.tiny for row in rows):
            maker = ROOT / "tools/make_checkpoint.py"
            run([sys.executable, maker, "--model", "2b", "--out", checkpoint])
        report = benchmark(rows, checkpoint, work)
    print(json.dumps(report))
    aims = [row.get("met", {"built": False}) for row in report["rows"].values()]
    return 0 if all(all(met.values()) for met in aims) else 1


if __name__ == "__main__":
    sys.exit(main())
