"""How far one clip is from another, in the measures that people know.

Clips are uint8 [F, H, W, 3]; all arithmetic is in float64.

F frames; H W rows and columns
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
Maps = NDArray[np.float64]
"""[H, W, 3]: one frame's channels, or a measure at each of its pixels."""

PEAK = 255.0

PSNR_CAP = 60.0
"""Of equal clips, and so that one of them does not make the mean of many infinite: libvmaf's cap
for eight bits."""

WINDOW, DEVIATION = 11, 1.5
"""Wang et al. 2004: a Gaussian of 11 x 11 pixels, only where it lies wholly in the picture."""

C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Wang et al. 2003, from the finest scale to the coarsest."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """SSIM and MS-SSIM, each the mean over frames and over the channels R, G and B."""

    ssim: float
    ms_ssim: float


@dataclass(frozen=True, slots=True)
class Measures:
    """`flicker` is in levels of 255. `lpips` is None where it could not be measured."""

    psnr: float
    ssim: float
    ms_ssim: float
    flicker: float
    lpips: float | None = None


@dataclass(frozen=True, slots=True)
class FrameMeasures:
    """Of one frame of two clips. `error` is the mean squared one; the first frame has no
    `flicker`, for nothing changed before it."""

    error: float
    ssim: float
    ms_ssim: float
    flicker: float | None

    @property
    def psnr(self) -> float:
        return decibels(self.error)


def measure(clip: Frames, reference: Frames) -> Measures:
    """All but LPIPS, which is not a formula."""
    _check(clip, reference)
    meter = Meter()
    return overall([meter(x, y) for x, y in zip(clip, reference, strict=True)])


class Meter:
    """Frames [H, W, 3] of two clips go in as they come; of the last two, their difference stays."""

    def __init__(self) -> None:
        self._previous: Maps | None = None

    def __call__(self, one: Frames, other: Frames) -> FrameMeasures:
        x, y = one.astype(np.float64), other.astype(np.float64)
        error, before = x - y, self._previous
        self._previous = error
        ssim, ms_ssim = _similar(x, y)
        change = None if before is None else float(np.abs(error - before).mean())
        return FrameMeasures(float(np.square(error).mean()), ssim, ms_ssim, change)


def overall(rows: Sequence[FrameMeasures]) -> Measures:
    """Of a whole clip; without LPIPS."""
    changes = [row.flicker for row in rows if row.flicker is not None]
    return Measures(
        decibels(float(np.mean([row.error for row in rows]))),
        float(np.mean([row.ssim for row in rows])),
        float(np.mean([row.ms_ssim for row in rows])),
        float(np.mean(changes)) if changes else 0.0,
    )


def decibels(error: float) -> float:
    """PSNR of a mean squared error, at most PSNR_CAP."""
    return PSNR_CAP if error == 0 else min(PSNR_CAP, float(10 * np.log10(PEAK**2 / error)))


def psnr(clip: Frames, reference: Frames) -> float:
    """In dB, of the mean squared error of the whole clip, at most PSNR_CAP."""
    _check(clip, reference)
    return decibels(float(np.mean([np.square(x - y).mean() for x, y in _pairs(clip, reference)])))


def similarity(clip: Frames, reference: Frames) -> Similarity:
    """Both in one pass: SSIM is the finest scale of the other.

    A frame too small for five scales has fewer (see `scales`), whose weights are made larger until
    they have the sum of all five.
    """
    _check(clip, reference)
    found = [_similar(x, y) for x, y in _pairs(clip, reference)]
    fine, product = zip(*found, strict=True)
    return Similarity(float(np.mean(fine)), float(np.mean(product)))


def scales(height: int, width: int) -> int:
    """How many of MS-SSIM's five scales a frame has room for, each half the size of the last."""
    side, count = min(height, width), 0
    while count < len(SCALE_WEIGHTS) and side >= WINDOW:
        side, count = side // 2, count + 1
    return count


def flicker(clip: Frames, reference: Frames) -> float:
    """How differently the two change from frame to frame: the mean absolute difference of the
    changes, in levels. A constant difference of the pictures is none; one frame has none."""
    _check(clip, reference)
    if len(clip) == 1:
        return 0.0
    errors = (x - y for x, y in _pairs(clip, reference))
    previous, means = next(errors), []
    for error in errors:
        means.append(np.abs(error - previous).mean())
        previous = error
    return float(np.mean(means))


def _check(clip: Frames, reference: Frames) -> None:
    if clip.shape != reference.shape or clip.ndim != 4 or clip.shape[-1] != 3 or not len(clip):
        raise ValueError(f"clips of {clip.shape} and {reference.shape}, wanted two [F, H, W, 3]")
    if clip.dtype != np.uint8 or reference.dtype != np.uint8:
        raise TypeError(f"clips of {clip.dtype} and {reference.dtype}, wanted uint8")
    if min(clip.shape[1:3]) < WINDOW:
        raise ValueError(f"frames of {clip.shape[1:3]} are smaller than the window of {WINDOW}")


def _pairs(clip: Frames, reference: Frames) -> Iterator[tuple[Maps, Maps]]:
    for x, y in zip(clip, reference, strict=True):
        yield x.astype(np.float64), y.astype(np.float64)


def _similar(x: Maps, y: Maps) -> tuple[float, float]:
    """SSIM and MS-SSIM of two frames."""
    levels = scales(*x.shape[:2])
    weights = np.array(SCALE_WEIGHTS[:levels])
    weights *= sum(SCALE_WEIGHTS) / weights.sum()
    whole, structure = _by_scale(x, y, levels)
    # The mean structure of two frames can be negative, which has no power: it counts as 0.
    factors = np.maximum(np.stack([*structure[:-1], whole[-1]]), 0)
    product = np.prod(factors ** weights[:, None], axis=0)
    return float(whole[0].mean()), float(product.mean())


def _by_scale(x: Maps, y: Maps, levels: int) -> tuple[list[Maps], list[Maps]]:
    """For each scale the means [3] of SSIM and of its part without luminance."""
    whole, structure = [], []
    for level in range(levels):
        if level:
            x, y = _halved(x), _halved(y)
        luminance, contrast = _ssim_maps(x, y)
        whole.append((luminance * contrast).mean(axis=(0, 1)))
        structure.append(contrast.mean(axis=(0, 1)))
    return whole, structure


def _ssim_maps(x: Maps, y: Maps) -> tuple[Maps, Maps]:
    """Luminance, and contrast times structure: the two factors of equation 13 of the paper."""
    mean_x, mean_y = _blurred(x), _blurred(y)
    squares, product = mean_x**2 + mean_y**2, mean_x * mean_y
    variances = _blurred(x * x + y * y) - squares
    covariance = _blurred(x * y) - product
    return (2 * product + C1) / (squares + C1), (2 * covariance + C2) / (variances + C2)


def _blurred(maps: Maps) -> Maps:
    """Rows first, then columns; WINDOW - 1 fewer of each."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    taps = np.exp(-(offsets**2) / (2 * DEVIATION**2))
    taps /= taps.sum()
    rows, columns = (size - WINDOW + 1 for size in maps.shape[:2])
    down = sum(tap * maps[index : index + rows] for index, tap in enumerate(taps))
    return np.asarray(sum(tap * down[:, index : index + columns] for index, tap in enumerate(taps)))


def _halved(maps: Maps) -> Maps:
    """The mean of each 2 x 2 pixels; an odd last row or column is left out."""
    rows, columns = (size // 2 for size in maps.shape[:2])
    even = maps[: 2 * rows, : 2 * columns]
    return np.asarray(even.reshape(rows, 2, columns, 2, -1).mean(axis=(1, 3)))
