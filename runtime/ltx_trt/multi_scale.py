"""Between and after the passes of a multi-scale run: what happens to the latents there.

A first pass makes the clip at a part of its size; its latents are upsampled to twice that, given
back their own statistics (AdaIN), noised and denoised again by a second pass. Latents are the
normalised ones throughout.

C latent channels; f h w the latent grid
"""

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_engines.shapes import ENLARGES as ENLARGES
from ltx_engines.shapes import first_size as first_size

Floats = NDArray[np.float32]

SHARE, DEPTH, SLOPE = 0.75, 0.8, 4.0
"""Of the tone curve: how much of the ratio counts, the most that is taken away, its steepness."""


def adain(latents: Floats, reference: Floats, factor: float = 1.0) -> Floats:
    """Give each channel of `latents` [1, C, f, h, w] the mean and deviation that it has in
    `reference`, whose grid may be another; `factor` 0 gives none of that."""
    mean, deviation = _statistics(latents)
    wished_mean, wished_deviation = _statistics(reference)
    deviation[deviation == 0] = 1  # of a constant channel, where the original makes NaN
    matched = (latents - mean) / deviation * wished_deviation + wished_mean
    return matched if factor == 1 else latents + np.float32(factor) * (matched - latents)


def tone_map(latents: Floats, ratio: float) -> Floats:
    """Draw in large values smoothly: not at all at ratio 0, the most at 1.

    Raises:
        UserError: the ratio is not from 0 to 1.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"tone_map_compression_ratio must be from 0 to 1, not {ratio:g}")
    share = np.float32(SHARE * ratio)
    rise = np.float32(SLOPE) * share * (np.abs(latents) - np.float32(1))
    sigmoid = np.float32(1) / (np.float32(1) + np.exp(-rise))
    toned: Floats = latents * (np.float32(1) - np.float32(DEPTH) * share * sigmoid)
    return toned


def _statistics(latents: Floats) -> tuple[Floats, Floats]:
    """[1, C, 1, 1, 1]: mean and deviation, summed in double precision.

    Raises:
        UserError: a channel says nothing of its deviation.
    """
    if latents[0, 0].size < 2:
        raise UserError("a first pass of a single latent has no deviation; make the clip larger")
    axes = (2, 3, 4)
    mean = latents.mean(axis=axes, keepdims=True, dtype=np.float64)
    deviation = latents.std(axis=axes, keepdims=True, dtype=np.float64, ddof=1)
    return mean.astype(np.float32), deviation.astype(np.float32)
