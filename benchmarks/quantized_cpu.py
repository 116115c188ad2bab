"""INT8 against float32 on ONNX Runtime's CPU, in one run: a true-2B-width slice, and ltx-tiny.

    python benchmarks/quantized_cpu.py [--layers 2] [--tokens 1024] [--rounds 9]

Both bundles are what `ltx-export` makes and `ltx-trt` runs. The slice's two sessions are open at
once and step in turn; ltx-tiny makes whole clips, in turn too. Everything written is removed. The
last line is JSON, the exit code 1 when an aim is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import quantized_slice
from child import run
from load import worker
from report import Facts, machine

ROOT = quantized_slice.ROOT
TINY = ROOT / "runtime/ltx_trt/ltx_tiny"
PROMPT = "a white triangle moves down on a red background"

LEAST, SLOWEST = 2.2, 1.05
"""How many times as fast the slice's steps are to be, and how many times as long ltx-tiny may take:
two runs of the same differ by so much."""


def slices(layers: int, tokens: int, rounds: int, work: Path) -> Facts:
    """Seconds of steps of both sessions, alternating so that both meet the same machine."""
    plain = quantized_slice.made(work, layers, "f32")
    files = {"float32": plain, "int8": quantized_slice.quantized(plain, "int8", work)}
    bundles = {kind: quantized_slice.exported(file) for kind, file in files.items()}
    rows: Facts = {}
    with ExitStack() as stack:
        workers = {k: stack.enter_context(worker("ours", b, tokens)) for k, b in bundles.items()}
        for kind, one in workers.items():
            one.tell("read")
            opened = one.tell("open")
            one.tell("step")
            rows[kind] = {"ready_s": opened["seconds"], "private": opened["anon"], "step_s": []}
        for turn in range(rounds):
            for kind in workers if turn % 2 == 0 else reversed(workers):
                rows[kind]["step_s"].append(workers[kind].tell("step")["seconds"])
    for kind, row in rows.items():
        row["bytes"] = files[kind].stat().st_size
        print(f"{kind:<10}{median(row['step_s']):8.3f} s a step of {layers} layers", flush=True)
    faster = median(rows["float32"]["step_s"]) / median(rows["int8"]["step_s"])
    return rows | {"faster": round(faster, 2)}


def tiny(rounds: int, work: Path) -> Facts:
    """Seconds of whole clips, from the command to the file."""
    plain = TINY / "ltx-tiny.safetensors"
    settings = ROOT / "tools/tiny/ltx-tiny.yaml"
    options: list[str | Path] = ["--text-encoder", TINY / "text_encoder"]
    options += ["--pipeline-config", settings, "--precision", "float32", "--weights", "copy"]
    copy = work / "ltx-tiny-float32.safetensors"
    copy.write_bytes(plain.read_bytes())
    files = {"float32": copy, "int8": quantized_slice.quantized(copy, "int8", work)}
    bundles = {kind: quantized_slice.exported(file, options) for kind, file in files.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in bundles}
    for turn in range(rounds + 1):  # the first fills caches
        for kind in bundles if turn % 2 == 0 else reversed(bundles):
            bundle = bundles[kind]
            command = [sys.executable, "-m", "ltx_trt.cli", "run", "--no-prompt-cache"]
            command += ["--prompt", PROMPT]
            cost, _ = run([*command, "--bundle", bundle, "-o", work / f"{kind}.mp4"])
            if turn:
                seconds[kind].append(round(cost.wall_s, 3))
    for kind, clips in seconds.items():
        print(f"{kind:<10}{median(clips):8.3f} s a clip of ltx-tiny", flush=True)
    slower = median(seconds["int8"]) / median(seconds["float32"])
    return {"clip_s": seconds, "slower": round(slower, 3)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clips", type=int, default=15)
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="a folder with 5 GB left")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "tokens": options.tokens}
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-int8-") as work:
        os.environ["XDG_CACHE_HOME"] = f"{work}/cache"  # the run leaves no memory
        folder = Path(work)
        report["slice"] = slices(options.layers, options.tokens, options.rounds, folder)
        report["ltx_tiny"] = tiny(options.clips, folder)
    faster, slower = report["slice"]["faster"], report["ltx_tiny"]["slower"]
    report["met"] = {"slice": faster >= LEAST, "ltx_tiny": slower <= SLOWEST}
    print(f"int8 is {faster} times as fast; ltx-tiny takes {slower} times as long", flush=True)
    print(json.dumps(report))
    return 0 if all(report["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
