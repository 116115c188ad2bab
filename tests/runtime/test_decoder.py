"""Tiles of the VAE against the whole clip: with layers that can be counted, and with true ones."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import log10
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from ltx_engines.manifest import ModelFacts, NoiseBlock
from ltx_engines.shapes import VideoShape
from ltx_trt import encoder
from ltx_trt.decoder import Decoding, crop, decode, finished, to_frames
from ltx_trt.noise import Noise
from ltx_trt.resampling import resize
from ltx_trt.session.vae_tiles import TileSession
from ltx_trt.tiles import Grid

pytest.importorskip("torch")
import torch

from ltx_ref.ltx_video.config import VAE_GENERATIONS, Generation, noise_blocks
from ltx_ref.ltx_video.reach import reach
from ltx_ref.ltx_video.vae import VideoVAE
from tests.ref.oracles import randomize

CHANNELS = 8
PLAIN = ModelFacts(
    latent_channels=CHANNELS,
    num_layers=1,
    causal_temporal_positioning=True,
    timestep_conditioning=False,
    stg_mode="attention_values",
)
PEAK = 45.0
"""Decibels that tiles must be from the whole."""

Feeds = dict[str, Any]


class Session:
    """A VAE of a function; `seen` are the feeds of each call."""

    def __init__(self, compute: Callable[[Feeds], Feeds]) -> None:
        self.compute, self.seen = compute, []  # type: ignore[var-annotated]

    def __call__(self, feeds: Any) -> Any:
        self.seen.append({name: feed.copy() for name, feed in feeds.items()})
        return self.compute(feeds)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def summed(feeds: Feeds) -> Feeds:
    """A decoder that reaches one cell in each direction; edge frames repeat, as in the true one."""
    latents = feeds["latents"][:, :3]
    padded = np.pad(np.pad(latents, ((0, 0), (0, 0), (1, 1), (0, 0), (0, 0)), mode="edge"), SIDES)
    _, _, frames, height, width = latents.shape
    total = np.zeros_like(latents)
    for i, j, k in np.ndindex(3, 3, 3):
        total += padded[:, :, i : i + frames, j : j + height, k : k + width]
    return {"pixels": total.repeat(8, 2).repeat(32, 3).repeat(32, 4)[:, :, 7:]}


SIDES = ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1))


def whole(session: Session, latents: Any, decoding: Decoding, tile: Grid | None = None) -> Any:
    chunks = decode(TileSession(session, lambda _: tile), latents, decoding, Noise(3))
    return np.concatenate(list(chunks), axis=2)


def integers(*shape: int) -> Any:
    return np.random.default_rng(0).integers(-9, 10, shape).astype(np.float32)


def test_pixels_whose_reach_lies_in_a_tile_are_exact() -> None:
    latents, session = integers(1, CHANNELS, 8, 5, 8), Session(summed)
    full = whole(session, latents, Decoding(PLAIN))
    tiled = whole(session, latents, Decoding(PLAIN), (6, 6, 6))
    assert len(session.seen) == 1 + 2 * 1 * 2
    assert np.allclose(tiled, full, rtol=0, atol=1e-4), "where two tiles count, rounding"
    assert (tiled == full).mean() > 0.5
    assert np.array_equal(tiled[:, :, :16, :, :96], full[:, :, :16, :, :96])


def test_overlaps_that_are_shorter_than_the_reach_are_not_exact() -> None:
    latents, session = integers(1, CHANNELS, 1, 2, 9), Session(summed)
    full = whole(session, latents, Decoding(PLAIN))
    assert np.abs(whole(session, latents, Decoding(PLAIN), (1, 2, 2)) - full).max() > 1


def test_frames_come_before_later_tiles_are_computed_and_none_is_after_a_close() -> None:
    latents, session = integers(1, CHANNELS, 12, 4, 4), Session(summed)
    tiled = TileSession(session, lambda _: (4, 4, 4))
    chunks = decode(tiled, latents, Decoding(PLAIN), Noise(3))
    first = next(chunks)
    assert len(session.seen) == 1
    assert first.shape == (1, 3, 16, 128, 128)
    chunks.close()
    assert len(session.seen) == 1


def test_a_clip_that_need_not_be_cut_is_given_as_it_is() -> None:
    latents, session = integers(1, CHANNELS, 2, 2, 2), Session(summed)
    (pixels,) = decode(session, latents, Decoding(PLAIN), Noise(3))
    assert np.array_equal(pixels, summed({"latents": latents})["pixels"])


def test_tiles_see_their_parts_of_one_noise() -> None:
    model = PLAIN.model_copy(
        update={
            "timestep_conditioning": True,
            "noise_blocks": (NoiseBlock(name="noise_1", maps=2, scale=2),),
        }
    )
    latents, session = integers(1, CHANNELS, 6, 6, 4), Session(summed)
    decoding = Decoding(model, timestep=0.05, noise_scale=0.5)
    whole(session, latents, decoding)
    whole(session, latents, decoding, (4, 4, 4))
    one, *parts = session.seen
    for part, (frames, rows) in zip(parts, [(0, 0), (0, 2), (2, 0), (2, 2)], strict=True):
        cells = one["latents"][:, :, frames : frames + 4, rows : rows + 4]
        assert np.array_equal(part["latents"], cells)
        assert np.array_equal(part["noise_1"], one["noise_1"][:, 2 * rows : 2 * rows + 8])
        assert part["timestep"].tolist() == pytest.approx([0.05])


def test_frames_of_a_chunk_are_cut_and_sized_as_those_of_a_whole_clip() -> None:
    pixels = np.random.default_rng(0).uniform(-1.2, 1.2, (1, 3, 9, 64, 96)).astype(np.float32)
    made, wished = VideoShape(9, 96, 64), VideoShape(1, 64, 32)
    found = finished(pixels, made, wished, 5)
    sized = resize(np.clip(pixels, -1, 1), 96, 64)
    assert np.array_equal(found, crop(to_frames(sized), 5, 64, 32))
    assert found.shape == (5, 64, 32, 3)


GENERATIONS: tuple[Generation, ...] = get_args(Generation)


def true_vae(generation: Generation) -> tuple[VideoVAE, ModelFacts]:
    """The released blocks with few channels and random weights."""
    sizes = {"latent_channels": CHANNELS, "encoder_base_channels": 4, "decoder_base_channels": 4}
    config = replace(VAE_GENERATIONS[generation], **sizes)  # type: ignore[arg-type]
    with torch.device("meta"):
        vae = VideoVAE(config)
    randomize(vae, 0)
    blocks = tuple(
        NoiseBlock(name=f"noise_{block.block}", maps=block.maps, scale=block.scale)
        for block in noise_blocks(config)
    )
    facts = {"timestep_conditioning": config.timestep_conditioning, "noise_blocks": blocks}
    return vae.eval(), PLAIN.model_copy(update=facts)


def decoder_of(vae: VideoVAE) -> Session:
    def compute(feeds: Feeds) -> Feeds:
        tensors = {name: torch.from_numpy(feed) for name, feed in feeds.items()}
        noises = [tensor for name, tensor in tensors.items() if name.startswith("noise")]
        with torch.no_grad():
            pixels = vae.decode(tensors["latents"], tensors.get("timestep"), noises)
        return {"pixels": pixels.numpy()}

    return Session(compute)


def decibels(tiled: Any, full: Any) -> float:
    """PSNR, if the clip had a deviation of a quarter of its range, as true ones do."""
    return 10 * log10(16 * float(full.var()) / float(((tiled - full) ** 2).mean()))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("axis", ["frames", "columns"])
def test_random_weights_of_each_release_are_45_decibels_from_the_whole(
    generation: Generation, axis: str
) -> None:
    vae, facts = true_vae(generation)
    session, sizes = decoder_of(vae), {"frames": (36, 1, 1), "columns": (1, 2, 36)}
    latents = np.random.default_rng(1).standard_normal((1, CHANNELS, *sizes[axis]), np.float32)
    tile = (24, 1, 1) if axis == "frames" else (1, 2, 24)
    full, tiled = (whole(session, latents, Decoding(facts), t) for t in (None, tile))
    assert len(session.seen) == 1 + 2
    assert decibels(tiled, full) >= PEAK


def test_the_decoders_look_further_than_any_overlap() -> None:
    """So that tiles are not exact, and how far is to be measured."""
    levels = {g: reach(VAE_GENERATIONS[g]) for g in GENERATIONS}
    assert {g: float(sum(cells)) for g, cells in levels.items()} == {
        "0.9": 23.875,
        "0.9.1": 30.125,
        "0.9.5": 21.625,
    }
    assert all(one > other for cells in levels.values() for one, other in pairwise(cells))


def test_the_reach_is_where_a_cell_stops_to_matter() -> None:
    """Of a decoder with one layer at each level: 3 + 3/2 + 3/4 + 3/8 cells and no further."""
    blocks = tuple(
        (name, {**options, "num_layers": 1} if name == "res_x" else options)
        for name, options in VAE_GENERATIONS["0.9.5"].decoder_blocks
    )
    sizes = {"latent_channels": CHANNELS, "encoder_base_channels": 4, "decoder_base_channels": 4}
    config = replace(VAE_GENERATIONS["0.9.5"], decoder_blocks=blocks, **sizes)  # type: ignore[arg-type]
    with torch.device("meta"):
        vae = VideoVAE(config)
    randomize(vae, 0)
    session = decoder_of(vae.eval())
    latents = np.random.default_rng(2).standard_normal((1, CHANNELS, 1, 1, 20), np.float32)
    changed = latents.copy()
    changed[..., 0] += 1
    facts = PLAIN.model_copy(update={"timestep_conditioning": True})
    one, other = (whole(session, z, Decoding(facts, noise_scale=0.0)) for z in (latents, changed))
    last = int(np.flatnonzero((one != other).any(axis=(0, 1, 2, 3))).max())
    far = float(sum(reach(config)))
    assert far == 4 + 1.5 + 0.75 + 0.375
    assert 32 * far <= last + 1 <= 32 * (1 + far)


@pytest.mark.parametrize("axis", ["frames", "rows"])
def test_an_encoder_in_tiles_is_45_decibels_from_the_whole(axis: str) -> None:
    vae, _ = true_vae("0.9.5")

    def compute(feeds: Feeds) -> Feeds:
        pixels, noise = (torch.from_numpy(feeds[name]) for name in ("pixels", "noise"))
        with torch.no_grad():
            return {"latents": vae.encode(pixels, noise).numpy()}

    size, tile = (((1, 3, 121, 32, 32), (12, 1, 1)), ((1, 3, 1, 768, 32), (1, 18, 1)))[
        axis == "rows"
    ]
    pixels = np.random.default_rng(1).uniform(-1, 1, size).astype(np.float32)
    session = Session(compute)
    full = encoder.encode(session, pixels, CHANNELS, Noise(1))
    tiled = encoder.encode(TileSession(session, lambda _: tile), pixels, CHANNELS, Noise(1))
    assert len(session.seen) > 2
    assert decibels(tiled, full) >= PEAK


BUNDLE = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"


@pytest.fixture(scope="module")
def tiny() -> Any:
    pytest.importorskip("onnxruntime")
    from ltx_engines.bundle import open_bundle
    from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession

    bundle = open_bundle(BUNDLE)
    with (
        OnnxRuntimeSession.open(bundle, "vae_decoder", threads=1) as decoder_,
        OnnxRuntimeSession.open(bundle, "vae_encoder", threads=1) as encoder_,
    ):
        yield bundle.manifest.model, decoder_, encoder_


def test_a_clip_of_one_colour_has_no_seam_and_does_not_flicker(tiny: Any) -> None:
    (model, decoder_, encoder_), tile = tiny, (9, 2, 12)
    colour = np.array([0.7, -0.4, 0.1], np.float32)[None, :, None, None, None]
    pixels = np.broadcast_to(colour, (1, 3, 73, 64, 448)).astype(np.float32)
    latents = encoder.encode(encoder_, pixels, model.latent_channels, Noise(1))
    decoding = Decoding(model, noise_scale=0.0)
    full, tiled = (whole(decoder_, latents, decoding, t) for t in (None, tile))
    level = 2 / 255
    assert np.abs(tiled - full).max() <= level, "across seams"
    steps = [np.abs(np.diff(clip, axis=2)).max() for clip in (tiled, full)]
    assert steps[0] <= steps[1] + level / 2, "from frame to frame"
