"""Weights as codes and scales: the arithmetic of each format, for the rows of one layer, in numpy.

Scales are rounded up to a bfloat16 number first, and codes are made with the rounded scale: then
every reader, in float32 or in bfloat16, has the same numbers, and the largest weight is kept whole.

Smoothing multiplies an activation by `pre` and divides the weights by it, channel by channel of the
layer's inputs, so that the widest activations are not the only ones that codes are left for:

    x @ W.T = (x * pre) @ (W / pre).T        pre = wmax^(1 - alpha) / amax^alpha

(SmoothQuant, arXiv 2211.10438, as ModelOpt 0.47 spells it.)
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ltx_ref.quantization import CALIBRATED, INT4_BLOCK, NVFP4_BLOCK, Format

Rows = NDArray[np.float32]
"""[N, K]"""
Vector = NDArray[np.float32]

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
E4M3_MAX, E2M1_MAX, INT8_MAX, INT4_MAX = 448.0, 6.0, 127.0, 7.0
E4M3_MIN = 2.0**-9
"""The smallest number of e4m3 above zero."""
E4M3_NORMAL = 2.0**-6
"""From here on e4m3 has three bits behind the leading one; below, its steps are E4M3_MIN."""

INPUT_MAX: dict[Format, float] = {"fp8": E4M3_MAX, "int8": INT8_MAX, "nvfp4": E4M3_MAX * E2M1_MAX}
"""The largest activation is this many input scales."""

SMALLEST = 2.0**-100
"""A scale of zeros: anything above 0."""

SMOOTHING = (1e-4, 1e4)
"""The least and the largest `pre`: ModelOpt's."""
UNSEEN = 2.0**-31
"""A channel of activations that never exceeds this one is not smoothed: ModelOpt's epsilon."""


@dataclass(frozen=True, slots=True)
class Coded:
    """What a file keeps of rows of weights, in the layout of `ltx_ref.quantization`."""

    weight: NDArray[Any]
    weight_scale: NDArray[Any] | None = None


def scale(amax: NDArray[np.float32] | float, largest: float) -> NDArray[np.float32]:
    """amax / largest, rounded up to a bfloat16 number."""
    exact = np.maximum(np.asarray(amax, np.float64) / largest, SMALLEST)
    near = np.asarray(exact, np.float32)
    near = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
    up = (near.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    return up.view(np.float32).reshape(np.shape(amax))


def layer(
    weight: Rows,
    form: Format,
    *,
    input_amax: Vector | None = None,
    pre: Vector | None = None,
    clip: Vector | None = None,
) -> dict[str, NDArray[Any]]:
    """All parts of a quantized layer, by the names that they have in a file after `PATH.`.

    `input_amax` is the largest absolute activation of each input, [K]; `clip` that of each row's
    weights that keeps its value, [N].

    Raises:
        ValueError: the format quantizes activations and their range is not given.
    """
    rows = smoothed(weight, pre)
    coded = encode(rows, form, np.abs(rows).max() if form == "nvfp4" else clip)
    parts: dict[str, NDArray[Any]] = {"weight": coded.weight}
    if coded.weight_scale is not None:
        parts["weight_scale"] = coded.weight_scale
    if form == "nvfp4":
        parts["weight_scale_2"] = np.asarray(weight_scale_2(float(np.abs(rows).max())))
    if form in CALIBRATED:
        if input_amax is None:
            raise ValueError(f"{form} wants the range of the activations")
        parts["input_scale"] = input_scale(input_amax, form, pre)
    return parts if pre is None else parts | {"pre_quant_scale": pre}


def smoothing(input_amax: Vector, weight_amax: Vector, alpha: float) -> Vector:
    """`pre`, a bfloat16 number for each of the K inputs.

    `weight_amax` is the largest weight of each input, of all layers that read this tensor.
    """
    strength = weight_amax.astype(np.float64) ** (1 - alpha)
    share = strength / np.maximum(input_amax.astype(np.float64), UNSEEN) ** alpha
    # ModelOpt masks channels without activations only if the smallest `pre` is below its epsilon.
    share = np.where(input_amax <= UNSEEN, 1.0, np.clip(share, *SMOOTHING))
    rounded: Vector = share.astype(np.float32).astype(BF16).astype(np.float32)
    return rounded


def smoothed(rows: Rows, pre: Vector | None) -> Rows:
    return rows if pre is None else rows / pre


def input_scale(input_amax: Vector, form: Format, pre: Vector | None = None) -> Vector:
    """Of the layer's activations after smoothing, []."""
    reached = input_amax if pre is None else input_amax.astype(np.float64) * pre
    return scale(float(reached.max()), INPUT_MAX[form])


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
            return _nvfp4(rows, weight_scale_2(float(amax)))


def dithered(shares: Rows, form: Format, noise: NDArray[np.uint32]) -> NDArray[Any]:
    """Codes of fp8 or int8 that are the shares on average: each is one of the two codes around it,
    the nearer the likelier; a share that is a code stays. `noise` has 20 random bits for each.

    To nearest, whatever is less than half a step away from a code would become that code again:
    most of what a LoRA adds to weights that are codes already.
    """
    if form == "int8":
        bits = (noise >> np.uint32(4)).astype(np.float32) * np.float32(2.0**-16)  # sums are exact
        return _to_int(np.floor(shares + bits), INT8_MAX)
    size = np.abs(shares)
    normal = ((size.view(np.uint32) + noise) >> np.uint32(20)) - _E4M3_BIAS
    steps = np.minimum(size, np.float32(E4M3_NORMAL)) / np.float32(E4M3_MIN)
    small = np.floor(steps + noise.astype(np.float32) * np.float32(2.0**-20)).astype(np.uint32)
    found = np.where(size < E4M3_NORMAL, small, np.minimum(normal, _E4M3_LAST)).astype(np.uint8)
    return (found | np.signbit(shares).astype(np.uint8) << np.uint8(7)).view(E4M3)


_E4M3_BIAS, _E4M3_LAST = np.uint32((127 - 7) << 3), np.uint32(0x7E)
"""Between the exponents of float32 and of e4m3, before three bits of the mantissa; 448's byte."""


def weight_scale_2(amax: float) -> np.float32:
    """The unit of nvfp4's block scales: the largest of them is e4m3's largest number."""
    return np.float32(scale(amax, E4M3_MAX * E2M1_MAX))


def decode(coded: Coded, form: Format, second: float = 1.0) -> Rows:
    """The values of codes. `second` is nvfp4's `weight_scale_2`."""
    if form in {"int4-wo", "nvfp4"}:
        shape = (len(coded.weight), 2 * coded.weight.shape[1])
        codes = np.stack([coded.weight & 0xF, coded.weight >> 4], axis=-1).reshape(shape)
        signed = (codes.view(np.int8) ^ np.int8(8)) - np.int8(8)  # two's complement of four bits
        codes = codes.view(E2M1) if form == "nvfp4" else signed
        values = codes.astype(np.float32).reshape(len(codes), -1, _BLOCK[form])
    else:
        shape = coded.weight.shape
        values = coded.weight.astype(np.float32)
    if coded.weight_scale is not None:
        values = values * (coded.weight_scale.astype(np.float32) * np.float32(second))[..., None]
    return values.reshape(shape)


_BLOCK: dict[Format, int] = {"int4-wo": INT4_BLOCK, "nvfp4": NVFP4_BLOCK}


def _nvfp4(rows: Rows, second: np.float32) -> Coded:
    blocks = rows.reshape(len(rows), -1, NVFP4_BLOCK)
    exact = np.abs(blocks).max(axis=2) / (np.float32(E2M1_MAX) * second)
    exact = np.where(exact == 0, np.float32(1), exact)  # of a block of zeros, as ModelOpt has it
    first = _to_e4m3(np.maximum(exact, np.float32(E4M3_MIN)))
    shares = blocks / (first.astype(np.float32) * second)[..., None]
    codes = np.clip(shares, -E2M1_MAX, E2M1_MAX).astype(E2M1).reshape(rows.shape)
    return Coded(_packed(codes.view(np.uint8) & np.uint8(0xF)), first)


def _to_e4m3(numbers: NDArray[np.float32]) -> NDArray[Any]:
    """Clamped first: beyond 448 the cast gives NaN."""
    return np.clip(numbers, -E4M3_MAX, E4M3_MAX).astype(E4M3)


def _to_int(numbers: NDArray[np.float32], largest: float) -> NDArray[np.int8]:
    return np.clip(np.rint(numbers), -largest, largest).astype(np.int8)


def _packed(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Two codes in a byte, the first one in its lower half."""
    packed: NDArray[np.uint8] = codes[..., ::2] | (codes[..., 1::2] << np.uint8(4))
    return packed
