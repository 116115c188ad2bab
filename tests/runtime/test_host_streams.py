"""The shipped decoder a few latent frames at a time on ONNX Runtime: the clip that it makes whole,
and when it is done so."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from math import ceil

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnxruntime")

from ltx_engines.bundle import Bundle, StageEntry, open_bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.stages import DECODER, NEXT, PAST, STREAM
from ltx_trt import encoder, tiles
from ltx_trt.backend import Backend, Choice, VaeTile
from ltx_trt.cli import SHIPPED
from ltx_trt.decoder import Decoding, decode, to_frames
from ltx_trt.noise import Noise
from ltx_trt.pipeline import Decoded, generate, plan
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import vae_tiles
from ltx_trt.session.choice import open_stages
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from ltx_trt.session.vae_streams import DecoderSession
from ltx_trt.session.vae_tiles import PIECES, HostTiles
from ltx_trt.tiles import Cut, Grid, Streamed

Floats = NDArray[np.float32]
CLOSE = 2e-5
"""Of pixels from -1 to 1. AMD EPYC, onnxruntime 1.31: 2e-6."""


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle(SHIPPED)


class Decoder:
    """`cut` is how the next clip is decoded."""

    def __init__(self, bundle: Bundle) -> None:
        self.decoding, self.cut = Decoding(bundle.manifest.model, noise_scale=0.0), Streamed(1)
        opened = partial(OnnxRuntimeSession.open, bundle, provider="cpu", threads=1)
        self.session = DecoderSession(DECODER, opened, lambda _: self.chosen())

    def chosen(self) -> Cut:
        return self.cut if self.cut.frames else None

    def __call__(self, latents: Floats, piece: int) -> Floats:
        """All of it at once for 0."""
        self.cut = Streamed(piece)
        chunks = decode(self.session, latents, self.decoding, Noise(3))
        return np.concatenate(list(chunks), axis=2)


@pytest.fixture
def decoder(bundle: Bundle) -> Iterator[Decoder]:
    made = Decoder(bundle)
    with made.session:
        yield made


def some_latents(bundle: Bundle, grid: Grid, seed: int = 0) -> Floats:
    shape = (1, bundle.manifest.model.latent_channels, *grid)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize(("frames", "piece"), [(1, 1), (3, 2), (9, 4), (6, 5)])
def test_a_stream_is_the_clip(decoder: Decoder, bundle: Bundle, frames: int, piece: int) -> None:
    latents = some_latents(bundle, (frames, 2, 3))
    whole = decoder(latents, 0)
    found = decoder(latents, piece)
    assert found.shape == whole.shape == (1, 3, 8 * frames - 7, 64, 96)
    assert np.abs(found - whole).max() < CLOSE


def test_frames_come_while_later_ones_are_not_yet_computed(
    decoder: Decoder, bundle: Bundle
) -> None:
    decoder.cut = Streamed(2)
    latents = some_latents(bundle, (12, 1, 1))
    sizes = [
        chunk.shape[2] for chunk in decode(decoder.session, latents, decoder.decoding, Noise(3))
    ]
    assert sum(sizes) == 89
    assert max(sizes) == 16
    assert len(sizes) >= ceil(89 / 16)


def test_clips_at_once_do_not_mix(decoder: Decoder, bundle: Bundle) -> None:
    clips = [some_latents(bundle, (4, 1, 2), seed) for seed in range(3)]
    alone = [decoder(latents, 1) for latents in clips]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda latents: decoder(latents, 1), clips))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


def test_a_clip_of_one_colour_is_what_it_is_untiled(decoder: Decoder, bundle: Bundle) -> None:
    """No level of 255 differs by one: there is no seam in time, and no flicker."""
    colour = np.array([0.73, -0.69, -0.69], np.float32)[None, :, None, None, None]
    pixels = np.broadcast_to(colour, (1, 3, 65, 64, 64)).astype(np.float32)
    with OnnxRuntimeSession.open(bundle, "vae_encoder", provider="cpu", threads=1) as session:
        channels = bundle.manifest.model.latent_channels
        latents = encoder.encode(session, pixels, channels, Noise(1))
    whole = decoder(latents, 0)
    for piece in (1, 4):
        assert 127.5 * np.abs(decoder(latents, piece) - whole).max() < 0.01


def test_the_run_of_a_user_differs_by_a_rounded_level_at_most(bundle: Bundle) -> None:
    wishes = Wishes("a red circle", width=64, height=64, num_frames=49, num_inference_steps=2)

    def made(wish: VaeTile) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
        choice = Choice(Backend.onnxruntime, threads=1, vae_tile=wish)
        with open_stages(SHIPPED, choice) as stages:
            request, _ = resolve(wishes, bundle)
            notes = stages.prepare(plan(request, bundle.manifest))
            events = generate(request, bundle, stages)
            chunks = [event.frames for event in events if isinstance(event, Decoded)]
        return np.concatenate(chunks), notes

    whole, _ = made(VaeTile.off)
    found, notes = made(VaeTile.stream)
    assert "vae_decoder: 32 frames at a time, as with --vae-tile stream" in notes
    assert found.shape == whole.shape == (49, 64, 64, 3)
    assert np.abs(found.astype(int) - whole).max() <= 1


@pytest.fixture(scope="module")
def stream(bundle: Bundle) -> StageEntry:
    return bundle.stage(STREAM)


def host(stream: StageEntry | None, budget: int | None, wish: VaeTile = VaeTile.auto) -> HostTiles:
    return HostTiles(DECODER, 300.0, budget, wish, stream, delay=180)


LONG: Grid = (40, 22, 38)


def test_auto_goes_on_in_the_largest_pieces_that_fit(stream: StageEntry) -> None:
    needs = {piece: host(stream, 1).piece_need(piece, LONG) for piece in PIECES}
    assert sorted(needs.values(), reverse=True) == list(needs.values())
    for piece, need in needs.items():
        assert host(stream, need)(LONG) == Streamed(piece)
        assert host(stream, need).piece_need(piece, (400, *LONG[1:])) == need, "of any length"
    tiny = host(stream, min(needs.values()) - 1)(LONG)
    assert isinstance(tiny, tuple), "where not even one latent frame fits, in tiles"


def test_a_clip_that_fits_is_whole_all_the_same(stream: StageEntry) -> None:
    grid = (5, 22, 38)
    need = host(stream, None).need(grid, grid)
    assert host(stream, need)(grid) is None
    assert host(stream, need - 1)(grid) is not None
    assert isinstance(host(stream, need, VaeTile.stream)(grid), Streamed)


def test_tiles_that_share_the_most_are_taken_for_short_clips_where_they_are_less_work(
    stream: StageEntry,
) -> None:
    grid = (4, 22, 76)
    choice = host(stream, host(stream, None).need(grid, grid) - 1)
    cut = choice(grid)
    assert isinstance(cut, tuple)
    assert tiles.shares(grid, cut, tiles.NEAR)
    assert choice.need(cut, grid) <= (choice.budget or 0)
    longer = (200, 22, 76)
    assert isinstance(choice(longer), Streamed)


def test_a_bundle_without_it_says_how_it_gets_one(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="this bundle has no stage vae_decoder_stream; export") as e:
        host(None, None, VaeTile.stream)(LONG)
    assert "\n" not in str(e.value)
    assert isinstance(host(None, None)(LONG), tuple)
    encoder = replace(host(None, None, VaeTile.stream), stage="vae_encoder")
    assert encoder((5, 4, 4)) is None, "an encoder is as with auto"


def test_tiles_that_share_little_are_said_to_show() -> None:
    (note,) = vae_tiles.notes([(DECODER, (9, 8, 16))], {DECODER: lambda _: (5, 8, 8)})
    assert note.endswith("as with --vae-tile 256x256x33, which share so little that seams may show")
    (note,) = vae_tiles.notes([(DECODER, (9, 8, 16))], {DECODER: lambda _: (9, 8, 12)})
    assert note.endswith("as with --vae-tile 256x384x65")


def test_what_goes_in_comes_out_under_the_next_name(stream: StageEntry) -> None:
    went = [t for t in stream.inputs if t.name.startswith(PAST)]
    came = [t for t in stream.outputs if t.name.startswith(NEXT)]
    assert [t.name.removeprefix(PAST) for t in went] == [t.name.removeprefix(NEXT) for t in came]
    assert [(t.dtype, t.axes) for t in went] == [(t.dtype, t.axes) for t in came]


def test_rounded_levels_are_what_the_eye_sees(decoder: Decoder, bundle: Bundle) -> None:
    latents = some_latents(bundle, (5, 2, 2))
    whole, found = (to_frames(decoder(latents, piece)).astype(int) for piece in (0, 2))
    assert np.abs(whole - found).max() <= 1
    assert (whole != found).mean() < 1e-3


def test_vae_tile_shapes_are_not_streamed(stream: StageEntry) -> None:
    wished = replace(host(stream, 1), wish=VideoShape(65, 512, 768))
    assert wished((3, 20, 30)) == (3, 16, 24)
