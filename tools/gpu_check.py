"""Everything that only a GPU can show, in one command; what cannot run says why.

    python tools/gpu_check.py --out FOLDER

Kernels: quantized layers on the GPU against their float32 twins on the CPU. Then the benchmarks of
true size. FOLDER gets one JSON for each part; commit them under benchmarks/results/. The exit code
is 1 if a part failed, 0 if all passed or were skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ltx_engines.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((17, 128, 256), (300, 2048, 2048), (1024, 2048, 8192), (13, 4096, 16384))
"""Rows, inputs and outputs of a layer."""
BOUND = 2.0**-7
"""Of the largest output, between bfloat16 results of sums in different orders."""


def main(out: Annotated[Path, typer.Option(help="A folder for the JSON.")]) -> None:
    """Run each part; the last line is JSON."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device; run it on a machine with an NVIDIA GPU")
        print(json.dumps({"skipped": "no CUDA device"}))
        return
    parts: dict[str, Callable[[], dict[str, Any]]] = {"kernels": kernels, "quantized": quantized}
    verdicts = {}
    for name, part in parts.items():
        try:
            facts = part()
        except Exception as error:  # the other parts' proof is worth having
            facts = {"passed": False, "failed": f"{type(error).__name__}: {error}"}
            print(f"{name}: {facts['failed']}")
        (out / f"gpu-{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
        verdicts[name] = facts["passed"]
    print(json.dumps(verdicts))
    if not all(verdicts.values()):
        raise typer.Exit(1)


def kernels() -> dict[str, Any]:
    """The GPU's own products against the float32 products of the same codes."""
    rows = list(_products())
    for row in rows:
        print(f"{row['format']:<9} {row['size']}: {row['kernel']}, {row['error']:.2e}")
    passed = all(row["error"] <= BOUND and row["kernel"] == row["expected"] for row in rows)
    return {"passed": passed, "bound": BOUND, "rows": rows}


def expected(form: str, capability: tuple[int, int]) -> str:
    """What multiplies on a GPU that has the format's own units, for bfloat16 activations."""
    if form == "fp8" and capability >= (8, 9):
        return "scaled_mm by row" if capability < (10, 0) else "scaled_mm"
    if form == "int8" and capability >= (7, 5):
        return "int_mm"
    return "fake" if form in {"fp8", "int8", "nvfp4"} else "weight only"


def _products() -> Iterator[dict[str, Any]]:
    import numpy as np
    import torch

    from ltx_export import codes
    from ltx_ref.quantization import FORMATS
    from ltx_ref.quantized import QuantizedLinear

    rng = np.random.default_rng(0)
    for tokens, inputs, outputs in SIZES:
        weight = rng.standard_normal((outputs, inputs), np.float32) / np.float32(inputs**0.5)
        x = torch.from_numpy(rng.standard_normal((tokens, inputs), np.float32))
        amax = np.full(inputs, x.abs().max(), np.float32)
        for form in FORMATS:
            found = codes.layer(weight, form, input_amax=amax)
            parts = {name: _tensor(part) for name, part in found.items()}
            layer = QuantizedLinear.of(form, parts, torch.zeros(outputs))
            narrow = x.bfloat16()
            wanted = layer(narrow).float()
            layer = layer.to("cuda")
            given = layer(narrow.cuda()).float().cpu()
            error = float((given - wanted).abs().max() / wanted.abs().max())
            kernel = layer.kernel(narrow.cuda())
            size = [tokens, inputs, outputs]
            wished = expected(form, torch.cuda.get_device_capability())
            row = {"format": form, "size": size, "kernel": kernel, "expected": wished}
            yield {**row, "error": error}


def _tensor(array: Any) -> Any:
    """numpy has no fp8 of its own: bytes, then their meaning."""
    import numpy as np
    import torch

    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.ascontiguousarray(array))


def quantized() -> dict[str, Any]:
    """Memory and step time at true size."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "quantized_gpu.py"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if not done.stdout.strip():
        raise UserError("benchmarks/quantized_gpu.py said nothing; run it by itself")
    print(done.stdout, end="")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**facts, "passed": done.returncode == 0}


if __name__ == "__main__":
    typer.run(main)
