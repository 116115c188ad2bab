"""Weights as codes and scales: the arithmetic of each format, for the rows of one layer, in numpy.

Scales are rounded up to a bfloat16 number first, and codes are made with the rounded scale: then
every reader, in float32 or in bfloat16, has the same numbers, and the largest weight is kept whole.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ltx_ref.quantization import INT4_BLOCK, NVFP4_BLOCK, Format

Rows = NDArray[np.float32]
"""[N, K]"""

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
E4M3_MAX, E2M1_MAX, INT8_MAX, INT4_MAX = 448.0, 6.0, 127.0, 7.0

INPUT_MAX: dict[Format, float] = {"fp8": E4M3_MAX, "int8": INT8_MAX, "nvfp4": E4M3_MAX * E2M1_MAX}
"""The largest activation is this many input scales."""

SMALLEST = 2.0**-100
"""A scale of zeros: anything above 0."""


@dataclass(frozen=True, slots=True)
class Coded:
    """What a file keeps of rows of weights, in the layout of `ltx_ref.quantization`."""

    weight: NDArray[Any]
    weight_scale: NDArray[Any] | None = None


def scale(amax: NDArray[np.float32] | float, largest: float) -> NDArray[np.float32]:
    """amax / largest, rounded up to a bfloat16 number."""
    exact = np.asarray(np.asarray(amax, np.float64) / largest)
    words = np.maximum(exact, SMALLEST).astype(np.float32).view(np.uint32)
    up: NDArray[np.float32] = ((words + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    return up


def encode(rows: Rows, form: Format, amax: NDArray[np.float32] | None = None) -> Coded:
    """The codes of some rows.

    `amax`: the clipping value of each row, [N]; its largest absolute value if not given. For nvfp4
    it is that of the whole layer, [].
    """
    match form:
        case "fp8-cast":
            return Coded(_to_e4m3(rows))
        case "fp8" | "int8" | "int8-wo":
            limit = np.abs(rows).max(axis=1) if amax is None else amax
            scales = scale(limit, E4M3_MAX if form == "fp8" else INT8_MAX)
            shares = rows / scales[:, None]
            codes = _to_e4m3(shares) if form == "fp8" else _to_int(shares, INT8_MAX)
            return Coded(codes, scales)
        case "int4-wo":
            blocks = rows.reshape(len(rows), -1, INT4_BLOCK)
            scales = scale(np.abs(blocks).max(axis=2), INT4_MAX)
            codes = _to_int(blocks / scales[..., None], INT4_MAX).reshape(rows.shape)
            return Coded(_packed(codes.view(np.uint8) & np.uint8(0xF)), scales)
        case "nvfp4":
            if amax is None:
                raise ValueError("nvfp4 wants the largest weight of the whole layer")
            blocks = rows.reshape(len(rows), -1, NVFP4_BLOCK)
            second = weight_scale_2(float(amax))
            first = _to_e4m3(np.abs(blocks).max(axis=2) / E2M1_MAX / second)
            shares = blocks / np.maximum(first.astype(np.float32) * second, SMALLEST)[..., None]
            codes = np.clip(shares, -E2M1_MAX, E2M1_MAX).astype(E2M1).reshape(rows.shape)
            return Coded(_packed(codes.view(np.uint8) & np.uint8(0xF)), first)


def weight_scale_2(amax: float) -> np.float32:
    """The unit of nvfp4's block scales: the largest of them is e4m3's largest number."""
    return np.float32(scale(amax, E4M3_MAX * E2M1_MAX))


def _to_e4m3(numbers: NDArray[np.float32]) -> NDArray[Any]:
    """Clamped first: beyond 448 the cast gives NaN."""
    return np.clip(numbers, -E4M3_MAX, E4M3_MAX).astype(E4M3)


def _to_int(numbers: NDArray[np.float32], largest: float) -> NDArray[np.int8]:
    return np.clip(np.rint(numbers), -largest, largest).astype(np.int8)


def _packed(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Two codes in a byte, the first one in its lower half."""
    packed: NDArray[np.uint8] = codes[..., ::2] | (codes[..., 1::2] << np.uint8(4))
    return packed
