"""What `ltx-export quantize` costs for a true-size checkpoint: memory, seconds and bytes.

    python benchmarks/quantize.py [--model 13b] [--recipes fp8-cast,int8-wo] [--work FOLDER]

The checkpoint is a hole as long as its weights, so that it takes no disk and reads as zeros; the
quantized file is real: 16 GB for 13B in 8 bits. Everything written is removed. The last line is
JSON, the exit code 1 when the peak memory is above LIMIT.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from child import run
from report import Facts, attempt, machine

ROOT = Path(__file__).resolve().parents[1]
MAKE = ROOT / "tools/make_checkpoint.py"

LIMIT = 1_500_000_000
"""Bytes of resident memory."""


def quantized(checkpoint: Path, recipe: str, work: Path) -> Facts:
    out = work / f"{recipe}.safetensors"
    options = ["--recipe", recipe, "--out", str(out)]
    command = [sys.executable, "-m", "ltx_export.cli", "quantize", str(checkpoint), *options]
    try:
        cost, said = run(command)
        new = out.stat().st_size
    finally:
        out.unlink(missing_ok=True)
    share = round(new / checkpoint.stat().st_size, 4)
    counted = said.splitlines()[0]
    return cost.row() | {"new_bytes": new, "share": share, "said": counted}


def benchmark(model: str, recipes: Sequence[str], work: Path) -> Facts:
    checkpoint = work / f"{model}.safetensors"
    run([sys.executable, MAKE, "--model", model, "--sparse", "--out", checkpoint])
    rows = {
        recipe: attempt(f"{model} to {recipe}", lambda r=recipe: quantized(checkpoint, r, work))  # type: ignore[misc]
        for recipe in recipes
    }
    met = {name: row.get("peak_rss", LIMIT + 1) <= LIMIT for name, row in rows.items()}
    return {"machine": machine(), "model": model, "recipes": rows, "met": met}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="13b", choices=("2b", "13b"))
    parser.add_argument("--recipes", default="fp8-cast,int8-wo")
    parser.add_argument("--work", type=Path, help="A folder with 16 GB free.")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=chosen.work) as work:
        found = benchmark(chosen.model, chosen.recipes.split(","), Path(work))
    print(json.dumps(found))
    return 0 if all(found["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
