"""The true 13B transformer in fp8, all 48 blocks, built in groups: memory of each builder, seconds,
bytes and kernels.

    python benchmarks/split.py [--layers 48] [--split auto] [--host-memory 12GB] [--work FOLDER]

The codes are random: of equal weights, as a sparse file's, a builder keeps one (two such blocks
made 0.14 GB instead of 0.54). So 14 GB are written for the checkpoint and 14 GB for the engines,
and removed in the end. TensorRT-RTX builds for a GPU that need not be there. The last line is JSON,
the exit code 1 when a builder's memory is above the limit, or kernels are not as the recipe says.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from child import run
from report import Facts, machine

ROOT = Path(__file__).resolve().parents[1]
MAKE = ROOT / "tools/make_checkpoint.py"
EXPORT = (sys.executable, "-m", "ltx_export.cli")

SHAPE, GPU = "1216x704x121", "rtx4090"
LINEARS, ATTENTIONS = 10, 2
"""Of a block."""

SCALE = 2.0**-6
PIECE = 1 << 26
INTERVAL = 0.02
KINDS = ("RssAnon", "RssFile", "VmHWM")
"""What the kernel says of a process: anonymous memory, pages of mapped files, and the most of both
together that it ever had."""


class Builders:
    """The most memory of each process that a process starts, in the order of their starts."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peaks: dict[int, dict[str, int]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> list[dict[str, int]]:
        self._done.set()
        self._thread.join()
        return list(self.peaks.values())

    def _look(self) -> None:
        while not self._done.wait(INTERVAL):
            for pid in map(int, _read(self.pid, f"task/{self.pid}/children").split()):
                status = _read(pid, "status")
                if "VmHWM" in status and b"ltx_export.build" in _read(pid, "cmdline").encode():
                    peaks = self.peaks.setdefault(pid, dict.fromkeys(KINDS, 0))
                    for kind in KINDS:
                        peaks[kind] = max(peaks[kind], _bytes(status, kind))


def _read(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _bytes(status: str, kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def quantized(checkpoint: Path, out: Path) -> None:
    """What `ltx-export quantize --recipe fp8` would write, with numbers of its size. Run in a
    process of its own."""
    import quantized_slice
    from ltx_export import calibration, derive, quantization_plan, recipes
    from ltx_ref.checkpoint import read_header
    from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX

    ranges = out.with_suffix(".ranges.safetensors")
    quantized_slice.write_ranges(checkpoint, ranges)
    header = read_header(checkpoint)
    found = calibration.read(ranges, header)
    target = quantization_plan.plan(header, recipes.load("fp8"), found).target
    with out.open("wb") as file:
        file.write(derive.head(target))
        file.truncate(derive.size(target))
        for name, info in derive.in_order(target.tensors):
            if name.startswith(TRANSFORMER_PREFIX):  # the VAE stays a hole
                file.seek(info.begin)
                for begin in range(info.begin, info.end, PIECE):
                    file.write(numbers(info.dtype, min(PIECE, info.end - begin)))


def numbers(dtype: str, size: int) -> bytes:
    """Finite ones, all different from one another: scales, codes, or bfloat16 below 2**-6."""
    import numpy as np

    words = np.random.default_rng().integers(0, 2**64, -(-size // 8), np.uint64, endpoint=False)
    if dtype == "F32":
        return np.full(size // 4, SCALE, np.float32).tobytes()
    if dtype == "F8_E4M3":  # 0x7F and 0xFF are no numbers
        return (words & 0xF7F7F7F7F7F7F7F7).tobytes()[:size]
    return (words & 0x80FF80FF80FF80FF | 0x3C003C003C003C00).tobytes()[:size]


def built(bundle: Path, split: str, host_memory: str) -> tuple[float, list[dict[str, int]], str]:
    """Seconds, the builders' memory, and what the command said."""
    limit = ["--host-memory", host_memory] if split == "auto" else []
    options = ["--gpu", GPU, "--shape", SHAPE, "--split", split, *limit]
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [*EXPORT, "build-engine", str(bundle), *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        builders = Builders(process.pid)
        said, _ = process.communicate()
        peaks = builders.end()
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"build-engine ended with {process.returncode}: {errors.read()}")
    return time.perf_counter() - start, peaks, said


def benchmark(layers: int, split: str, host_memory: str, work: Path) -> Facts:
    plain, checkpoint = work / "13b.safetensors", work / "13b-fp8.safetensors"
    sizes = ["--layers", str(layers), "--vae", "0.9"]
    run([sys.executable, MAKE, "--model", "13b", *sizes, "--sparse", "--out", plain])
    run([sys.executable, __file__, "--quantize", plain, "--work", checkpoint])
    bundle = work / "bundle"
    run([*EXPORT, "onnx", str(checkpoint), "--out", bundle, "--stages", "transformer"])
    seconds, peaks, said = built(bundle, split, host_memory)
    print(said, flush=True)
    manifest = json.loads((bundle / "manifest.json").read_text())
    parts = [e for e in manifest["engines"] if e["key"]["stage"] == "transformer"]
    parts.sort(key=lambda engine: engine["key"]["part"]["index"])
    rows = [_row(e, manifest, p) for e, p in zip(parts, peaks, strict=False)]
    return {
        "machine": machine(),
        "gpu": GPU,
        "shape": SHAPE,
        "layers": layers,
        "version": parts[0]["key"]["version"],
        "profiles": parts[0]["key"]["profiles"],
        "checkpoint": checkpoint.stat().st_size,
        "host_memory": host_memory,
        "seconds": round(seconds, 1),
        "parts": rows,
    }


def _row(engine: dict[str, Any], manifest: dict[str, Any], peaks: dict[str, int]) -> Facts:
    part, counts = engine["key"]["part"], engine["counts"]
    blocks = part["end"] - part["first"]
    profiles = len(engine["key"]["profiles"])
    whole = (
        counts.get("products in FP8") == LINEARS * blocks * profiles
        and counts["fused attentions"] == ATTENTIONS * blocks * profiles
        and counts["score kernels"] == 0
    )
    return {
        "blocks": [part["first"], part["end"] - 1],
        "engine": manifest["files"][engine["file"]]["bytes"],
        "activations": engine["activations"],
        "peak_anon": peaks["RssAnon"],
        "peak_file": peaks["RssFile"],
        "peak_rss": peaks["VmHWM"],
        "counts": counts,
        "as_the_recipe": whole,
    }


def judged(found: Facts, limit: int) -> Facts:
    met = {
        f"blocks {first} to {last}": part["as_the_recipe"] and part["peak_rss"] <= limit
        for part in found["parts"]
        for first, last in [part["blocks"]]
    }
    return {**found, "met": met}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--split", default="auto")
    parser.add_argument("--host-memory", default="12GB")
    parser.add_argument("--work", type=Path, help="A folder with 30 GB free.")
    parser.add_argument("--quantize", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.quantize is not None:
        quantized(chosen.quantize, chosen.work)
        return 0
    from ltx_engines import byte_sizes

    limit = byte_sizes.parse(chosen.host_memory, "--host-memory")
    with tempfile.TemporaryDirectory(dir=chosen.work, prefix="bench-split-") as work:
        found = benchmark(chosen.layers, chosen.split, chosen.host_memory, Path(work))
    judgement = judged(found, limit)
    print(json.dumps(judgement))
    return 0 if all(judgement["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
