"""What ONNX Runtime's CPU must be told about a stage's formats, by whoever opens a session.

Without VNNI, x86 adds the products of codes in pairs, in 16 bits, where 2 * 255 * 127 does not fit.
ONNX Runtime's sums of unsigned and signed codes are wrong there, and nothing says so, unless it is
told to make the weights unsigned too. (onnxruntime 1.31, ltx-tiny in int8, a Haswell of qemu 7.2,
2026-11: 3.4 % off in L2; so told, bit for bit what a CPU with VNNI gives.)
"""

import platform
from collections.abc import Collection
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

VNNI = frozenset({"avx_vnni", "avx512_vnni"})
"""Linux' names of instructions that add four products of codes in 32 bits."""

X86 = frozenset({"x86_64", "amd64", "x86", "i386", "i686"})


def saturates() -> bool:
    """Whether this CPU's sums may be wrong: an x86 without VNNI, or one that does not say."""
    if platform.machine().lower() not in X86:
        return False
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    cores = [set(line.split()) for line in lines if line.startswith("flags")]
    return not cores or not all(flags & VNNI for flags in cores)


def session_options(formats: Collection[str]) -> dict[str, str]:
    """Entries of ONNX Runtime's session options for a stage whose layers have these formats."""
    found = {}
    if formats:
        # ONNX Runtime makes integer products of QuantizeLinear and DequantizeLinear, where it finds
        # them. Ours are already such products, and those of fp8 must not become any: there is no
        # kernel (onnxruntime 1.31: `tensor(float8e4m3fn) of operator (MatMulIntegerToFloat) is
        # invalid`).
        found["session.disable_quant_qdq"] = "1"
    if "int8" not in formats:
        # Weights are used as they lie in the mapped file, not repacked: the session is there at
        # once and no step is slower (`benchmarks/load.py`). Not so where there are int8 layers:
        # their products are 1.4 times as fast from a private, repacked copy, for which the other
        # weights are copied too (`benchmarks/quantized_cpu.py`).
        found["session.disable_prepacking"] = "1"
    elif saturates():
        found["session.x64quantprecision"] = "1"
    return found
