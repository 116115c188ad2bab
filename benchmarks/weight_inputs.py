"""Engines whose weights are inputs beside engines that hold them: builds here, steps on a GPU.

    python benchmarks/weight_inputs.py [--models 2b,13b] [--formats bf16,fp8,int8]
    python benchmarks/weight_inputs.py --gpu [--shape 1216x704x121]

The builds are for GPUs that need not be there: of LAYERS true-width blocks, in a process each. For
one block it says which kernels both kinds run. With --gpu the whole 2B transformer is built for
this machine's card in both ways and stepped; the experiment is kept if its steps take at most 10 %
longer. Everything written is removed. The last line is JSON, the exit code 1 when an aim is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import quantized_slice
from child import run
from report import Facts, attempt, machine

LAYERS = 2
TARGETS = ("SM89", "SM120")
TOKENS, TEXT = 13376, 256
"""Of 1216x704x121."""
SIZES = {"batch": 1, "tokens": TOKENS, "timesteps": 1, "text": TEXT}
CODES = {"fp8": "FP8", "int8": "Int8"}
LINEARS, ATTENTIONS = 10, 2
MOST = 1.10
"""Time of a step with weights as inputs, as a share of one with embedded weights."""

OF_BLOCK = "transformer_blocks.1"
"""The second: the first also computes what all share."""


def build(graph: Path, target: str, name: str) -> Facts:
    """Run in a process of its own. `name` is in the nodes of the block that is counted."""
    from engine_layers import build as built_from
    from ltx_export import layer_table

    start = time.perf_counter()
    built = built_from(graph, SIZES, target)
    seconds = time.perf_counter() - start
    layers = [x for x in built.layers if any(name in node for node in x.nodes)]
    found = layer_table.products(layers)
    return {
        "build_s": round(seconds, 2),
        "engine": built.bytes,
        "kernels": len(layers),
        "elements_moved": moved(layers),
        "products": {kind: of(found, kind, name) for kind in CODES.values()},
        "attentions": layer_table.attentions(layers),
        "score_kernels": len(layer_table.scores(layers, [TOKENS])),
        "weights_made_anew": len(made_anew(layers)),
    }


def of(found: dict[str, Any], kind: str, name: str) -> int:
    """Layers that are a product of codes: one kernel may compute those of several blocks."""
    return sum(kinds[kind] > 0 for path, kinds in found.items() if name in path)


def moved(layers: Sequence[Any]) -> int:
    """Numbers of activations that the kernels read and write."""
    operands = (o for layer in layers for o in (*layer.inputs, *layer.outputs))
    return sum(prod(o.shape) for o in operands if TOKENS in o.shape)


def made_anew(layers: Sequence[Any]) -> list[str]:
    """Kernels that read a weight and write as many numbers, not products: a copy in each run."""
    return [
        layer.name
        for layer in layers
        for operand in layer.inputs
        if operand.name.endswith(".weight") and len(operand.shape) == 2
        for output in layer.outputs
        if sorted(output.shape[-2:]) == sorted(operand.shape)
    ]


def cut(bundle: Path) -> dict[str, Path]:
    """The graphs of a bundle's transformer, weights as inputs."""
    import onnx_ir as ir

    from ltx_export import weight_inputs

    found = {}
    for piece in weight_inputs.cut(ir.load(bundle / "transformer.onnx")):
        found[piece.name] = bundle / f"{piece.name}.onnx"
        ir.save(piece.model, found[piece.name])
    return found


def measure(graph: Path, target: str, name: str = "") -> Facts:
    cost, said = run([sys.executable, __file__, "--build", graph, "--for", target, "--of", name])
    return {**cost.row(), **json.loads(said.splitlines()[-1])}


def made(folder: Path, model: str) -> Path:
    path = folder / f"{model}.safetensors"
    sizes = ("--layers", str(LAYERS), "--dtype", "bf16", "--vae", "0.9")
    maker = quantized_slice.ROOT / "tools/make_checkpoint.py"
    run([sys.executable, maker, "--model", model, *sizes, "--out", path])
    return path


def benchmark(models: Sequence[str], formats: Sequence[str], work: Path) -> Facts:
    found: Facts = {"machine": machine(), "layers": LAYERS, "tokens": TOKENS, "models": {}}
    for model in models:
        plain = made(work, model)
        for form in formats:
            file = plain if form == "bf16" else quantized_slice.quantized(plain, form, work)
            bundle = quantized_slice.exported(file)
            graphs = cut(bundle)
            for target in TARGETS:
                found["models"][f"{model} {form} {target}"] = compared(
                    f"{model} {form} {target}", bundle, graphs, target
                )
    return found | {"met": {what: met(row) for what, row in found["models"].items()}}


def compared(what: str, bundle: Path, graphs: dict[str, Path], target: str) -> Facts:
    graph = bundle / "transformer.onnx"
    rows = {"embedded": attempt(f"{what} embedded", lambda: measure(graph, target, OF_BLOCK))}
    for name, piece in graphs.items():
        rows[name] = attempt(f"{what} {name}", lambda p=piece: measure(p, target))  # type: ignore[misc]
    for row in rows.values():
        print(f"{'':<32}{said(row)}", flush=True)
    return rows


def said(row: Facts) -> str:
    if "failed" in row:
        return ""
    return (
        f"built in {row['build_s']:.1f} s, {row['engine'] / 1e6:.1f} MB, {row['kernels']} kernels "
        f"that move {row['elements_moved'] / 1e9:.2f} G, {row['products']}, "
        f"{row['attentions']} fused attentions, {row['weights_made_anew']} copies of weights"
    )


def met(rows: Facts) -> bool:
    """A block with weights as inputs is what the embedded one is."""
    if any("failed" in row for row in rows.values()):
        return False
    block, embedded = rows["block"], rows["embedded"]
    alike = all(block[key] == embedded[key] for key in ("products", "attentions", "score_kernels"))
    return alike and not block["weights_made_anew"]


def missing() -> str | None:
    """Why nothing can be stepped here."""
    from ltx_engines.errors import UserError
    from ltx_trt.session.device import Device

    try:
        with Device.open("tensorrt-rtx"):
            return None
    except UserError as error:
        return str(error)


def stepped(shape: str, work: Path) -> Facts:
    """Seconds of a step of the whole 2B transformer, one branch, in both ways."""
    path = work / "2b.safetensors"
    maker = quantized_slice.ROOT / "tools/make_checkpoint.py"
    run([sys.executable, maker, "--model", "2b", "--dtype", "bf16", "--out", path])
    rows: Facts = {}
    for form in ("bf16", "fp8"):
        file = path if form == "bf16" else quantized_slice.quantized(path, form, work)
        bundle = quantized_slice.exported(file)
        for kind in ("embedded", "inputs"):
            command = [sys.executable, __file__, "--step", bundle, "--weights", kind]
            rows[f"{form} {kind}"] = attempt(
                f"2b {form} {kind}",
                lambda c=command: json.loads(run([*c, "--shape", shape])[1].splitlines()[-1]),  # type: ignore[misc]
            )
    return {"shape": shape, "steps": rows, "met": fast(rows) and captured(rows)}


def captured(rows: Facts) -> bool:
    """No CUDA graph gives other bytes than what it was captured of."""
    return not any(row.get("same_when_captured") is False for row in rows.values())


def fast(rows: Facts) -> bool:
    if any("failed" in row for row in rows.values()):
        return False
    pairs = ((rows[f"{form} inputs"], rows[f"{form} embedded"]) for form in ("bf16", "fp8"))
    return all(ours["step_s"] <= MOST * theirs["step_s"] for ours, theirs in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--models", default="2b,13b")
    parser.add_argument("--formats", default="bf16,fp8,int8")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--shape", default="1216x704x121")
    parser.add_argument("--work", type=Path, default=quantized_slice.ROOT / "build")
    for name in ("--build", "--step"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    for name in ("--for", "--of", "--weights"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    if options["build"] is not None:
        print(json.dumps(build(options["build"], options["for"], options["of"])))
        return 0
    if options["step"] is not None:
        from weight_inputs_step import step

        print(json.dumps(step(options["step"], options["weights"], options["shape"])))
        return 0
    if options["gpu"] and (reason := missing()) is not None:
        print(f"skipped: {reason}")
        print(json.dumps({"skipped": reason}))
        return 0
    options["work"].mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options["work"], prefix="bench-inputs-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"  # the run leaves no memory
        work = Path(folder)
        models, formats = options["models"].split(","), options["formats"].split(",")
        found = stepped(options["shape"], work) if options["gpu"] else None
        found = found or benchmark(models, formats, work)
    print(json.dumps(found))
    return 0 if found["met"] is True or all(dict(found["met"]).values()) else 1


if __name__ == "__main__":
    sys.exit(main())
