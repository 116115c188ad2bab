"""TensorRT-RTX engines of a quantized true-2B-width slice, beside bfloat16's: bytes and kernels.

    python benchmarks/quantized_engines.py [--layers 4] [--recipes fp8,int8,int4-wo,nvfp4]

Built for GPUs that need not be there. Each engine is built in a process of its own, from the bundle
that `ltx-export quantize` and `ltx-export onnx` make. For each it says how many linear layers are
products of codes, how many attentions are one kernel, and how many kernels write all scores of an
attention. Everything written is removed. The last line is JSON, the exit code 1 when an aim is
missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quantized_slice
from child import run
from report import Facts, attempt, machine

CAPABILITIES = ("SM89", "SM120")
SM120_ALONE = frozenset({"nvfp4"})
CODES = ("fp8", "int8", "nvfp4")
"""Recipes whose products are of codes."""

TOKENS, TEXT = 1024, 256
SIZES = {"batch": 1, "tokens": TOKENS, "timesteps": 1, "text": TEXT}
LINEARS, ATTENTIONS = 10, 2
"""Of a block."""

MOST = 0.65
"""Bytes of the engine, as a share of bfloat16's."""


def build(bundle: Path, capability: str) -> Facts:
    """Run in a process of its own."""
    from engine_layers import attentions, quantized, scores
    from engine_layers import build as built_from
    from ltx_engines.bundle import open_bundle

    entry = open_bundle(bundle).stage("transformer")
    built = built_from(bundle / entry.file, SIZES, capability)
    paths = {n.removesuffix("/MatMul") for layer in built.layers for n in layer.nodes}
    linears = {path for path in paths if ".transformer_blocks." in path}
    kinds = Counter(kind for path in linears if (kind := quantized(built, path)))
    return {
        "engine": built.bytes,
        "products": dict(kinds),
        "attentions": attentions(built),
        "score_kernels": len(scores(built, TOKENS)),
        "kernels": len(built.layers),
    }


def measure(bundle: Path, capability: str) -> Facts:
    cost, said = run([sys.executable, __file__, "--build", bundle, "--for", capability])
    return {**cost.row(), **json.loads(said.splitlines()[-1])}


def benchmark(recipes: Sequence[str], layers: int, work: Path) -> Facts:
    report: Facts = {"machine": machine(), "layers": layers, "tokens": TOKENS, "engines": {}}
    plain = quantized_slice.made(work, layers, "bf16")
    for recipe in ("bf16", *recipes):
        file = plain if recipe == "bf16" else quantized_slice.quantized(plain, recipe, work)
        bundle = quantized_slice.exported(file)
        for capability in CAPABILITIES:
            if recipe in SM120_ALONE and capability != "SM120":
                continue
            what = f"{recipe} {capability}"
            row = attempt(what, lambda b=bundle, c=capability: measure(b, c))  # type: ignore[misc]
            report["engines"][what] = row
            print(f"{'':<32}{said(row)}", flush=True)
    return report | judged(report["engines"], layers)


def said(row: Facts) -> str:
    if "failed" in row:
        return ""
    products = ", ".join(f"{count} {kind}" for kind, count in row["products"].items()) or "none"
    return (
        f"{row['engine'] / 1e6:8.1f} MB, products of codes: {products}; {row['attentions']} fused "
        f"attentions, {row['score_kernels']} kernels with all scores"
    )


def judged(engines: dict[str, Facts], layers: int) -> Facts:
    """Sizes as shares of bfloat16's, and whether the aims are met."""
    shares, met = {}, {}
    for what, row in engines.items():
        recipe, capability = what.split()
        if "failed" in row:
            met[what] = False
            continue
        share = row["engine"] / engines[f"bf16 {capability}"]["engine"]
        shares[what] = round(share, 3)
        products = sum(row["products"].values())
        wanted = LINEARS * layers if recipe in CODES else 0
        whole = row["attentions"] == ATTENTIONS * layers and not row["score_kernels"]
        met[what] = whole and products == wanted and (recipe == "bf16" or share <= MOST)
    return {"shares": shares, "met": met}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--recipes", default="fp8,int8,int4-wo,nvfp4")
    parser.add_argument("--work", type=Path, default=quantized_slice.ROOT / "build")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--for", dest="capability", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.build is not None:
        print(json.dumps(build(options.build, options.capability)))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-engines-") as work:
        os.environ["XDG_CACHE_HOME"] = f"{work}/cache"  # the run leaves no memory
        recipes = options.recipes.split(",")
        report: dict[str, Any] = benchmark(recipes, options.layers, Path(work))
    print(json.dumps(report))
    return 0 if all(report["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
