"""Quantized layers on the GPU against their float32 twins on the CPU: a part of gpu_check.py.

    python tools/gpu_kernels.py

Every format on several sizes. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

SIZES = ((17, 128, 256), (300, 2048, 2048), (1024, 2048, 8192), (13, 4096, 16384))
"""Rows, inputs and outputs of a layer."""
BOUND = 2.0**-7
"""Of the largest output, between bfloat16 results of sums in different orders."""


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

    from ltx_ref import codes
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


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "torch sees no CUDA device"}))
        return 0
    found = kernels()
    print(json.dumps(found))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
