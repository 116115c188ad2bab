"""PyTorch's CPU normals without PyTorch: one seed gives one video, whichever side samples it.

ATen draws 24-bit uniforms from mt19937 and turns each block of 16 into normals with Box-Muller,
eight radii against eight angles. Its logarithm, sine and cosine are the single-precision
polynomials of Cephes, compiled with fused multiply-adds; they are followed here operation by
operation, so the bits agree with PyTorch on x86 with AVX2. (NumPy's own functions would differ in
every tenth value by one to four units in the last place.) Fewer than 16 values take another way:
double precision, one pair at a time, the second of a pair kept for the next call.
"""

from math import cos, log1p, pi, prod, sin, sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

BLOCK = 16

# Cephes single precision: logf, sinf and cosf.
LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LOG_2_HIGH, LOG_2_LOW = 0.693359375, -2.12194440e-4
SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
QUARTER_PI = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)


class Noise:
    """A stream of standard normals, equal to `torch.Generator("cpu").manual_seed(seed)`."""

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)  # mt19937 reads 32 bits of it
        self._kept: float | None = None

    def normal(self, shape: tuple[int, ...]) -> Floats:
        """The next values of the stream, as `torch.randn(shape, generator=g)` draws them."""
        count = prod(shape)
        if count < BLOCK:
            return np.array([self._one() for _ in range(count)], np.float32).reshape(shape)
        uniforms = self._uniforms(count)
        whole = count - count % BLOCK
        normals = np.concatenate([_box_muller(uniforms[:whole]), uniforms[whole:]])
        if whole < count:  # the last 16 values are drawn anew, over the end of the last block
            normals[-BLOCK:] = _box_muller(self._uniforms(BLOCK))
        return normals.reshape(shape)

    def _uniforms(self, count: int) -> Floats:
        words = self._words.randint(0, 1 << 32, size=count, dtype=np.uint32)
        uniforms: Floats = (words & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)
        return uniforms

    def _one(self) -> float:
        if self._kept is not None:
            value, self._kept = self._kept, None
            return value
        angle, radius = self._double(), self._double()
        radius, angle = sqrt(-2.0 * log1p(-radius)), 2.0 * pi * angle
        self._kept = radius * sin(angle)
        return radius * cos(angle)

    def _double(self) -> float:
        high, low = self._words.randint(0, 1 << 32, size=2, dtype=np.uint32).tolist()
        word: int = (high << 32 | low) & ((1 << 53) - 1)
        return word * 2.0**-53


def _box_muller(uniforms: Floats) -> Floats:
    pairs = uniforms.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - pairs[:, 0]))
    sine, cosine = _sine_cosine(np.float32(2 * pi) * pairs[:, 1])
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def _fused(a: Floats, b: Floats, c: Floats | np.float32) -> Floats:
    """a * b + c rounded once: the product of two singles is exact in double precision."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _polynomial(coefficients: tuple[float, ...], x: Floats) -> Floats:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fused(value, x, np.float32(coefficient))
    return value


def _log(x: Floats) -> Floats:
    mantissa, exponent = np.frexp(x)
    low = mantissa < np.float32(sqrt(0.5))
    power = (exponent - low).astype(np.float32)
    x = np.where(low, mantissa + mantissa, mantissa) - np.float32(1)
    square = x * x
    tail = _fused(_polynomial(LOG, x) * x, square, power * np.float32(LOG_2_LOW))
    tail -= square * np.float32(0.5)
    return _fused(power, np.full_like(x, LOG_2_HIGH), x + tail)


def _sine_cosine(x: Floats) -> tuple[Floats, Floats]:
    """Of angles from 0 to 2 pi; `octant` is even, so that |x| <= pi / 4 afterwards."""
    octant = ((x * np.float32(4 / pi)).astype(np.int32) + 1) & ~1
    turns = octant.astype(np.float32)
    for part in QUARTER_PI:  # pi / 4 in three parts, so that the difference stays exact
        x = _fused(turns, np.full_like(x, -part), x)
    square = x * x
    cosine = _fused(_polynomial(COSINE, square) * square, square, square * np.float32(-0.5))
    cosine += np.float32(1)
    sine = _fused(_polynomial(SINE, square) * square, x, x)
    swap = (octant & 2) != 0
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    return (
        np.where(octant & 4, -sine, sine),
        np.where(octant + 2 & 4, -cosine, cosine),
    )
