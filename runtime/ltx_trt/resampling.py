"""Frames of another size, as the original resizes them: bilinear, without antialiasing.

Pixel i of the new row lies at (i + 1/2) * old / new - 1/2 of the old one, between two pixels of it
or at its edge (torch's `interpolate(mode="bilinear", align_corners=False)`).
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

WIDTH, HEIGHT = -1, -2


def resize(pixels: Floats, height: int, width: int) -> Floats:
    """[..., h, w] -> [..., height, width]; the same array if that is its size."""
    if pixels.shape[HEIGHT:] == (height, width):
        return pixels
    return _resample(_resample(pixels, width, WIDTH), height, HEIGHT)


def _resample(pixels: Floats, size: int, axis: int) -> Floats:
    old = pixels.shape[axis]
    if old == size:
        return pixels
    # one rounding, as the fused multiply-add that torch's kernel is compiled to
    places = (np.arange(size) + 0.5) * np.float64(np.float32(old / size)) - 0.5
    places = np.maximum(places, 0).astype(np.float32)
    first = places.astype(np.intp)
    second = np.minimum(first + 1, old - 1)
    share = (places - first).astype(np.float32)
    share = share if axis == WIDTH else share[:, None]
    before, after = (np.take(pixels, index, axis=axis) for index in (first, second))
    return np.ascontiguousarray(before * (1 - share) + after * share, dtype=np.float32)
