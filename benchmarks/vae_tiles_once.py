"""One decode of random latents into an MP4, as `ltx-trt run` does it; the tile as JSON.

python benchmarks/vae_tiles_once.py BUNDLE HxWxF TILE OUT.mp4

TILE is as --vae-tile has it, "stream N" for so many latent frames at a time, or a number: the bytes
that the VAE may take.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.shapes import VideoShape
from ltx_trt import media
from ltx_trt.backend import Choice
from ltx_trt.decoder import Decoding, decode, finished
from ltx_trt.delivery import Delivery, Destination
from ltx_trt.noise import Noise
from ltx_trt.options import tile_size
from ltx_trt.session import Session
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from ltx_trt.session.vae_streams import DecoderSession
from ltx_trt.session.vae_tiles import Choose, HostTiles
from ltx_trt.tiles import Streamed

STAGE, PIECES = "vae_decoder", "stream "


def main() -> None:
    folder, size, tile, out = sys.argv[1:]
    bundle, clip = open_bundle(Path(folder)), tile_size(size)
    if not isinstance(clip, VideoShape):
        raise SystemExit(f"{size} is no size")
    tiles = _choice(tile, bundle)

    def open_stage(stage: str) -> Session:
        return OnnxRuntimeSession.open(bundle, stage, provider="cpu", threads=1)

    model = bundle.manifest.model
    shape = (1, model.latent_channels, *clip.latent)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    output = media.check(Path(out), count=clip.frames, height=clip.height, width=clip.width)
    with (
        DecoderSession(STAGE, open_stage, tiles) as session,
        Delivery(Destination(output, 24.0, clip.frames)) as delivery,
    ):
        for pixels in decode(session, latents, Decoding(model), Noise(0)):
            delivery.add(finished(pixels, clip, clip, clip.frames))
            del pixels
    cut = tiles(clip.latent)
    said = f"{PIECES}{cut.frames}" if isinstance(cut, Streamed) else cut
    print(json.dumps({"tile": said, "sha256": delivery.sha256}))


def _choice(tile: str, bundle: Bundle) -> Choose:
    if tile.startswith(PIECES):
        return lambda _: Streamed(int(tile.removeprefix(PIECES)))
    if tile.isdecimal():
        return replace(HostTiles.of(STAGE, bundle, Choice()), budget=int(tile))
    return HostTiles.of(STAGE, bundle, Choice(vae_tile=tile_size(tile)))


if __name__ == "__main__":
    main()
