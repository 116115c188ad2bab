"""Tiles of a VAE decoder against the whole clip: decibels and levels of 255, a line of JSON each.

python benchmarks/vae_tiles_quality.py clip|colours|random BUNDLE

`clip` is one that the bundle makes of a prompt, `colours` are clips of one colour that its encoder
has read, `random` are standard normal latents in long thin clips, for random weights. `stream N`
is no tiles, but so many latent frames at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.stages import DECODER
from ltx_trt import encoder, tiles
from ltx_trt.decoder import Decoding, decode, to_frames
from ltx_trt.noise import Noise
from ltx_trt.pipeline import generate
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import Feeds, Session
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from ltx_trt.session.vae_streams import DecoderSession
from ltx_trt.session.vae_tiles import word
from ltx_trt.tiles import Cut, Grid, Streamed

Floats = NDArray[np.float32]
Row = dict[str, Any]

PROMPT = "a red circle moves right on a blue background"
CLIP = Wishes(PROMPT, height=256, width=512, num_frames=65, num_inference_steps=8)
STREAMS = (Streamed(1), Streamed(4))
CLIP_TILES: tuple[Cut, ...] = (
    *STREAMS,
    (9, 8, 12),
    (9, 8, 8),
    (9, 8, 6),
    (5, 8, 16),
    (5, 6, 8),
    (2, 8, 16),
)
COLOURS = ((0.73, -0.69, -0.69), (-0.69, -0.37, 0.73), (0.92, 0.65, -0.69), (-0.84, -0.84, -0.84))
COLOUR_TILES: tuple[Cut, ...] = (*STREAMS, (9, 4, 12), (12, 4, 12), (5, 4, 12), (9, 4, 8))
RANDOM: tuple[tuple[Grid, Cut], ...] = (
    *(((9, 3, 3), stream) for stream in STREAMS),
    ((1, 2, 36), (1, 2, 24)),
    ((1, 36, 2), (1, 24, 2)),
    ((36, 1, 1), (24, 1, 1)),
    ((1, 2, 24), (1, 2, 16)),
    ((1, 2, 12), (1, 2, 8)),
)
"""Clips, and tiles of which two share what each of them shares at least."""


class Decoder:
    """Whole, in tiles or as a stream."""

    def __init__(self, bundle: Bundle, decoding: Decoding) -> None:
        self._session = DecoderSession(DECODER, partial(opened, bundle), lambda _: self._cut)
        self._decoding, self._cut = decoding, cast(Cut, None)

    def __call__(self, latents: Floats, cut: Cut) -> Floats:
        self._cut = cut
        chunks = decode(self._session, latents, self._decoding, Noise(3))
        return np.concatenate(list(chunks), axis=2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._session.__exit__(*error)


class Listening:
    """A decoder's session that keeps what it is given."""

    def __init__(self, session: Session, heard: dict[str, Any]) -> None:
        self._session, self._heard = session, heard

    def __call__(self, feeds: Feeds) -> dict[str, Any]:
        self._heard.update(feeds)
        return self._session(feeds)

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *error: Any) -> None:
        self._session.__exit__(*error)


def opened(bundle: Bundle, stage: str) -> OnnxRuntimeSession:
    return OnnxRuntimeSession.open(bundle, stage, provider="cpu", threads=1)


def clip(bundle: Bundle) -> Iterator[Row]:
    heard: dict[str, Any] = {}

    def open_session(stage: str) -> Session:
        session = opened(bundle, stage)
        return Listening(session, heard) if stage == DECODER else session

    request, _ = resolve(CLIP, bundle)
    for _ in generate(request, bundle, open_session):
        pass
    with Decoder(bundle, Decoding(bundle.manifest.model, noise_scale=0.0)) as decoder:
        full = decoder(heard["latents"], None)
        for tile in CLIP_TILES:
            yield {"tile": name(tile), **compared(decoder(heard["latents"], tile), full)}


def colours(bundle: Bundle) -> Iterator[Row]:
    """`step` is the largest change from a frame to the next."""
    model = bundle.manifest.model
    wished = Decoding(model, noise_scale=0.0)
    with opened(bundle, "vae_encoder") as session, Decoder(bundle, wished) as decoder:
        for colour in COLOURS:
            one = np.array(colour, np.float32)[None, :, None, None, None]
            pixels = np.broadcast_to(one, (1, 3, 129, 128, 512)).astype(np.float32)
            latents = encoder.encode(session, pixels, model.latent_channels, Noise(1))
            full = decoder(latents, None)
            for tile in COLOUR_TILES:
                tiled = decoder(latents, tile)
                steps = {"step": step(tiled), "untiled_step": step(full)}
                yield {"colour": colour, "tile": name(tile), **compared(tiled, full), **steps}


def random(bundle: Bundle) -> Iterator[Row]:
    model = bundle.manifest.model
    with Decoder(bundle, Decoding(model)) as decoder:
        known = dict[Grid, Floats]()
        for grid, tile in RANDOM:
            shape = (1, model.latent_channels, *grid)
            latents = np.random.default_rng(1).standard_normal(shape, np.float32)
            if grid not in known:
                known[grid] = decoder(latents, None)
            full, tiled = known[grid], decoder(latents, tile)
            error = float(np.mean((tiled - full) ** 2))
            decibels = round(10 * float(np.log10(16 * float(full.var()) / error)), 1)
            row = {"clip": word(grid), "tile": name(tile), "psnr": decibels}
            if isinstance(tile, tuple):
                axes = zip(grid, tile, strict=True)
                row["overlap"] = min(tiles.overlap(t) for n, t in axes if t < n)
            yield row


def name(cut: Cut) -> str:
    if cut is None:
        return "whole"
    return f"stream {cut.frames}" if isinstance(cut, Streamed) else word(cut)


def compared(tiled: Floats, full: Floats) -> Row:
    """Of pixels from -1 to 1, and of their frames' levels."""
    error = float(np.mean((tiled - full) ** 2))
    levels = [to_frames(pixels).astype(np.int16) for pixels in (tiled, full)]
    return {
        "psnr": round(10 * float(np.log10(4 / max(error, 1e-14))), 1),
        "deviation": round(127.5 * float(np.abs(tiled - full).max()), 3),
        "levels": int(np.abs(levels[0] - levels[1]).max()),
    }


def step(pixels: Floats) -> float:
    return round(127.5 * float(np.abs(np.diff(pixels, axis=2)).max()), 3)


KINDS = {"clip": clip, "colours": colours, "random": random}


if __name__ == "__main__":
    for row in KINDS[sys.argv[1]](open_bundle(Path(sys.argv[2]))):
        print(json.dumps(row), flush=True)
