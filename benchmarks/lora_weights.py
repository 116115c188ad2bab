"""What it costs to add a LoRA at run time to one layer of LTX-Video 13B, on this machine's CPU.

    python benchmarks/lora_weights.py [FORMAT ...]       bfloat16, fp8, int8

A [16384, 4096] weight of random numbers, a LoRA of rank 64. The last line is JSON: seconds for a
billion weights, and bytes beside the weight that is made. Times the parameters of a model's linear
layers that is the wait before the first step.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from ltx_export import derive
from ltx_ref import codes
from ltx_ref.checkpoint import read_header
from ltx_ref.lora import Wish
from ltx_trt.session import lora_weights

ROWS, COLUMNS, RANK = 16384, 4096, 64
NAME = "model.diffusion_model.transformer_blocks.0.ff.net.0.proj"
STORED = {"bfloat16": "BF16", "fp8": "F8_E4M3", "int8": "I8"}


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    """A safetensors file of these element types and numbers."""
    target = derive.laid_out(path, {n: (t, a.shape) for n, (t, a) in tensors.items()}, {})
    with path.open("wb") as file:
        file.write(derive.head(target))
        for name, info in derive.in_order(target.tensors):
            file.seek(info.begin)
            tensors[name][1].tofile(file)
    return path


def layer(form: str, random: np.random.Generator) -> dict[str, tuple[str, np.ndarray]]:
    rows = random.standard_normal((ROWS, COLUMNS), np.float32) / 64
    if form == "bfloat16":
        return {f"{NAME}.weight": ("BF16", rows.astype(codes.BF16))}
    parts = codes.layer(rows, form, input_amax=np.ones(COLUMNS, np.float32))  # type: ignore[arg-type]
    types = {"weight": STORED[form], "weight_scale": "F32", "input_scale": "F32"}
    return {f"{NAME}.{part}": (types[part], np.asarray(a)) for part, a in parts.items()}


def measure(form: str, folder: Path) -> dict[str, float]:
    random = np.random.default_rng(0)
    header = read_header(write(folder / f"{form}.safetensors", layer(form, random)))
    factors = {
        f"{NAME}.lora_A.weight": ("F32", random.standard_normal((RANK, COLUMNS), np.float32) / 64),
        f"{NAME}.lora_B.weight": ("F32", random.standard_normal((ROWS, RANK), np.float32) / 640),
    }
    lora = write(folder / "lora.safetensors", factors)
    (changed,) = lora_weights.changes(header, [Wish(lora)]).values()
    made = sum(values.nbytes for _, _, values in changed.weights())
    started = time.perf_counter()
    for _ in changed.weights():
        pass
    seconds = time.perf_counter() - started
    tracemalloc.start()
    for _ in changed.weights():
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"seconds_per_billion": seconds * 1e9 / (ROWS * COLUMNS), "beside_bytes": peak - made}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {form: measure(form, Path(folder)) for form in sys.argv[1:] or STORED}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
