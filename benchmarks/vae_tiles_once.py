"""One decode of random latents into an MP4, as `ltx-trt run` does it; the tile as JSON.

python benchmarks/vae_tiles_once.py BUNDLE HxWxF TILE OUT.mp4

TILE is as --vae-tile has it, or a number: the bytes that the VAE may take.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from ltx_engines.bundle import open_bundle
from ltx_engines.shapes import VideoShape
from ltx_trt import media
from ltx_trt.backend import Choice, VaeTile
from ltx_trt.decoder import Decoding, decode, finished
from ltx_trt.delivery import Delivery, Destination
from ltx_trt.noise import Noise
from ltx_trt.options import tile_size
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from ltx_trt.session.vae_tiles import HostTiles, TileSession

STAGE = "vae_decoder"


def main() -> None:
    folder, size, tile, out = sys.argv[1:]
    bundle, clip = open_bundle(Path(folder)), tile_size(size)
    if not isinstance(clip, VideoShape):
        raise SystemExit(f"{size} is no size")
    budget = int(tile) if tile.isdecimal() else None
    wish = VaeTile.auto if budget is not None else tile_size(tile)
    tiles = HostTiles.of(STAGE, bundle, Choice(vae_tile=wish))
    if budget is not None:
        tiles = HostTiles(STAGE, tiles.per_pixel, budget, wish)
    model = bundle.manifest.model
    shape = (1, model.latent_channels, *clip.latent)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    output = media.check(Path(out), count=clip.frames, height=clip.height, width=clip.width)
    with (
        OnnxRuntimeSession.open(bundle, STAGE, provider="cpu", threads=1) as session,
        Delivery(Destination(output, 24.0, clip.frames)) as delivery,
    ):
        for pixels in decode(TileSession(session, tiles), latents, Decoding(model), Noise(0)):
            delivery.add(finished(pixels, clip, clip, clip.frames))
            del pixels
    print(json.dumps({"tile": tiles(clip.latent), "sha256": delivery.sha256}))


if __name__ == "__main__":
    main()
