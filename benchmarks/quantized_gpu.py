"""The true transformer in bf16, fp8, int8 and fp8-cast on this machine's GPU, beside diffusers.

    python benchmarks/quantized_gpu.py [--models 2b,13b] [--shape 1216x704x121] [--steps 5]

Each variant runs in a process of its own. Without a GPU it says so, and its JSON has the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import child
import report

HERE = Path(__file__).parent
VARIANTS = ("bf16", "fp8", "int8", "fp8-cast", "diffusers")
MOST_OF_BF16 = 0.62
"""Peak memory of 13B in fp8-cast, as a share of bf16."""


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--models", default="2b,13b")
    words.add_argument("--shape", default="1216x704x121")
    words.add_argument("--steps", type=int, default=5)
    asked = words.parse_args()
    if (reason := missing()) is not None:
        print(f"skipped: {reason}")
        print(json.dumps({"skipped": reason}))
        return 0
    found = {model: measure(model, asked.shape, asked.steps) for model in asked.models.split(",")}
    verdict = met(found)
    facts = {"machine": report.machine(), "shape": asked.shape, "models": found}
    shares = {model: share(rows) for model, rows in found.items()}
    print(json.dumps({**facts, "fp8_cast_of_bf16": shares, "met": verdict}))
    return 0 if verdict else 1


def met(found: dict[str, dict[str, Any]]) -> bool:
    """Every variant ran, with the GPU's own products where its format has them, and 13B, if it was
    asked for, is as small as it should be."""
    rows = [row for model in found.values() for row in model.values()]
    ran = all("failed" not in row and "fake" not in row.get("kernels", ()) for row in rows)
    part = share(found["13b"]) if "13b" in found else None
    return bool(rows) and ran and (part is None or part <= MOST_OF_BF16)


def missing() -> str | None:
    """Why nothing can be measured here."""
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device; run it on a machine with an NVIDIA GPU of 80 GB"
    return None


def measure(model: str, shape: str, steps: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / f"{model}.safetensors"
        maker = HERE.parent / "tools" / "make_checkpoint.py"
        child.run([sys.executable, maker, "--model", model, "--sparse", "--out", checkpoint])
        for variant in VARIANTS:
            script = HERE / "quantized_gpu_once.py"
            try:
                _, said = child.run(
                    [sys.executable, script, variant, checkpoint, shape, str(steps)]
                )
                rows[variant] = json.loads(said.splitlines()[-1])
            except child.ChildError as error:
                rows[variant] = {"failed": str(error)}
            print(f"{model} {variant:<10} {line(rows[variant])}", flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return str(row["failed"])
    peak, load = row["step_peak"] / 1e9, row["load_peak"] / 1e9
    return f"{row['step_s'] * 1e3:9.1f} ms a step, {peak:6.2f} GB stepping, {load:6.2f} GB loading"


def share(rows: dict[str, Any]) -> float | None:
    """Peak memory of fp8-cast over that of bf16."""
    if any("peak" not in rows.get(name, {}) for name in ("bf16", "fp8-cast")):
        return None
    part: float = rows["fp8-cast"]["peak"] / rows["bf16"]["peak"]
    return round(part, 3)


if __name__ == "__main__":
    sys.exit(main())
