"""Where each token lies in time and space, and how latents and tokens turn into one another.

f h w  frames, rows and columns of the latent grid; C latent channels; tokens = f h w, in this order
"""

import numpy as np
from numpy.typing import NDArray

from ltx_engines.shapes import SPACE, TIME, VideoShape

Floats = NDArray[np.float32]


def token_coordinates(
    shape: VideoShape, frame_rate: float, *, causal: bool, first: int = 0
) -> Floats:
    """[1, 3, tokens]: seconds, pixel rows and pixel columns of each token's first corner.

    The first latent frame stands for one frame, the others for eight; a `causal` model is told
    so (frames 0, 1, 9, 17, ...), an older one is not (0, 8, 16, ...). `first` is added to them.
    """
    frames, rows, columns = (np.arange(size) for size in shape.latent)
    frames = np.maximum(frames * TIME + 1 - TIME, 0) if causal else frames * TIME
    grid = np.meshgrid(frames + first, rows * SPACE, columns * SPACE, indexing="ij")
    coordinates = np.stack(grid).reshape(1, 3, -1).astype(np.float32)
    coordinates[:, 0] *= np.float32(1.0 / frame_rate)
    return coordinates


def patchify(latents: Floats) -> Floats:
    """[1, C, f, h, w] -> [1, tokens, C]."""
    batch, channels = latents.shape[:2]
    return np.ascontiguousarray(latents.reshape(batch, channels, -1).transpose(0, 2, 1))


def unpatchify(tokens: Floats, grid: tuple[int, int, int]) -> Floats:
    """[1, tokens, C] -> [1, C, f, h, w]."""
    batch, _, channels = tokens.shape
    return np.ascontiguousarray(tokens.transpose(0, 2, 1)).reshape(batch, channels, *grid)
