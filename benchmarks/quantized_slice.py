"""A few layers of the true 2B transformer, quantized by `ltx-export quantize` with made-up ranges.

The ranges decide the numbers, not the sizes, the kernels or the time. They are written as
`ltx-export calibrate` writes them, which would take longer than the measurement.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from child import run

ROOT = Path(__file__).resolve().parents[1]
EXPORT = (sys.executable, "-m", "ltx_export.cli")
CALIBRATED = ("fp8", "int8", "nvfp4")
RANGE = 6.0


def made(folder: Path, layers: int, dtype: str) -> Path:
    """The slice, with the first release's VAE: the smallest, because nothing here reads it."""
    path = folder / "slice.safetensors"
    sizes = ("--layers", str(layers), "--dtype", dtype, "--vae", "0.9")
    maker = ROOT / "tools/make_checkpoint.py"
    run([sys.executable, maker, "--model", "2b", *sizes, "--out", path])
    return path


def quantized(checkpoint: Path, recipe: str, folder: Path) -> Path:
    path, options = folder / f"{checkpoint.stem}-{recipe}.safetensors", list[str | Path]()
    if recipe in CALIBRATED:
        ranges = folder / f"{checkpoint.stem}-ranges.safetensors"
        run([sys.executable, __file__, checkpoint, ranges])
        options = ["--calibration", ranges]
    run([*EXPORT, "quantize", checkpoint, "--recipe", recipe, "--out", path, *options])
    return path


def exported(checkpoint: Path, options: Sequence[str | Path] = ()) -> Path:
    """Its bundle; only the transformer if nothing else is asked for."""
    out = checkpoint.with_suffix("")
    run([*EXPORT, "onnx", checkpoint, "--out", out, *(options or ("--stages", "transformer"))])
    return out


def write_ranges(checkpoint: Path, out: Path) -> None:
    """The same largest activation for every input of the blocks' linear layers."""
    import numpy as np

    from ltx_export import calibration
    from ltx_ref.checkpoint import read_header

    shapes = read_header(checkpoint).shapes()
    ranges = {
        name.removesuffix(".weight"): np.full(shape[1], RANGE, np.float32)
        for name, shape in shapes.items()
        if ".transformer_blocks." in name and name.endswith(".weight") and len(shape) == 2
    }
    facts = {
        "format_version": calibration.FORMAT,
        "done": 1,
        "runs": 1,
        "checkpoint": calibration.identity(checkpoint),
        "made_up": True,
    }
    calibration.write(calibration.Calibration(out, ranges, facts))


if __name__ == "__main__":
    write_ranges(Path(sys.argv[1]), Path(sys.argv[2]))
