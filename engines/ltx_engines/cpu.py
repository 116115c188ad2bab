"""What ONNX Runtime's CPU must be told about a stage's formats, by whoever opens a session.

Without VNNI, x86 adds products of bytes in pairs that saturate at 16 bits: 255 * 127 * 2 is more.
The sums of int8 layers are wrong there, and nothing says so, unless weights lose their sign too.
"""

import platform
from collections.abc import Collection
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

VNNI = frozenset({"avx_vnni", "avx512_vnni"})
"""Flags of Linux for instructions that sum four products of bytes in 32 bits."""

X86 = frozenset({"x86_64", "amd64", "i386", "i686", "x86"})


def saturates(machine: str | None = None, cpuinfo: Path = CPUINFO) -> bool:
    """Whether this CPU's sums of products of bytes may; true of an x86 that does not tell."""
    if (machine or platform.machine()).lower() not in X86:
        return False
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    flags = [set(line.split()) for line in lines if line.startswith("flags")]
    return not flags or any(not known & VNNI for known in flags)


def session_options(formats: Collection[str], *, exact: bool | None = None) -> dict[str, str]:
    """Entries of ONNX Runtime's session options for a stage with layers of these formats.

    `exact` where the sums of int8 layers would saturate (this CPU's, if not given).
    """
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
    elif saturates() if exact is None else exact:
        found["session.x64quantprecision"] = "1"
    return found
