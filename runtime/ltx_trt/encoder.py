"""Frames become latents, in tiles if need be: what a clip is conditioned on, or begins from."""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from ltx_engines.shapes import VideoShape
from ltx_trt import tiles
from ltx_trt.denoising import check_finite
from ltx_trt.noise import Noise
from ltx_trt.session import Session
from ltx_trt.tiles import Streamed, Tiling

Floats = NDArray[np.float32]


def encode(session: Session, pixels: Floats, channels: int, noise: Noise) -> Floats:
    """Normalised latents [1, channels, f, h, w] of pixels [1, 3, 8 (f - 1) + 1, 32 h, 32 w] in
    -1..1: a sample of the posterior, as in the original. `noise` is drawn from once."""
    grid = VideoShape(*pixels.shape[2:]).latent
    fresh = noise.normal((1, channels, *grid))
    tile = session.tile(grid) if isinstance(session, Tiling) else None
    if tile is None:
        return _encoded(session, pixels, fresh)
    if isinstance(tile, Streamed):
        raise ValueError("an encoder is not streamed")
    latents = np.zeros_like(fresh)
    axes = tiles.encoding(grid, tile)
    for parts in product(axes.frames, axes.rows, axes.columns):
        cells = (slice(None), slice(None), *(part.cells for part in parts))
        points = (slice(None), slice(None), *(part.pixels for part in parts))
        frames, rows, columns = (part.weights for part in parts)
        weights = frames[:, None, None] * rows[:, None] * columns
        latents[cells] += _encoded(session, pixels[points], fresh[cells]) * weights
    return latents


def _encoded(session: Session, pixels: Floats, noise: Floats) -> Floats:
    feeds = {"pixels": np.ascontiguousarray(pixels), "noise": np.ascontiguousarray(noise)}
    latents: Floats = session(feeds)["latents"]
    check_finite(latents, "the encoder's latents")
    return latents
