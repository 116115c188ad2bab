"""A decoder that goes on gives what it gives of the whole clip, however it is cut."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ltx_ref.ltx_video.config import VAE_GENERATIONS, Block, VAEConfig
from ltx_ref.ltx_video.reach import reach
from ltx_ref.ltx_video.vae import VideoVAE
from ltx_ref.ltx_video.vae_stream import Past
from ltx_ref.ltx_video.vae_stream_config import delay, states
from tests.ref.oracles import TOLERANCE, difference, normals
from tests.ref.test_vae_oracle import (
    GENERATIONS,
    original,
    original_decode,
    small,
    some_noises,
    times,
    vae_of,
)

BLOCKS: tuple[Block, ...] = (
    ("res_x", {"num_layers": 1}),
    ("compress_space", {}),
    ("res_x_y", {"multiplier": 3}),
    ("compress_time", {}),
    ("compress_all", {"residual": True, "multiplier": 4}),
    ("compress_all", {"multiplier": 2}),
)
"""A decoder that no release has."""


def unreleased() -> VAEConfig:
    encoder: tuple[Block, ...] = (("compress_all", {}),) * 3
    return VAEConfig(encoder, BLOCKS, 3, 3, 8, 4, 8, 8)


def streamed(vae: VideoVAE, latents: Tensor, cuts: list[int], *constants: Any) -> Tensor:
    return torch.cat(list(pieces(vae, latents, cuts, *constants)), dim=2)


def pieces(
    vae: VideoVAE, latents: Tensor, cuts: list[int], timestep: Any = None, noises: Any = ()
) -> Iterator[Tensor]:
    """Of pieces that begin at `cuts`, the frames that are of the clip; behind it, there is noise
    that nobody may read."""
    batch, channels, total, rows, columns = latents.shape
    behind = 1e3 * normals(batch, channels, cuts[-1], rows, columns, seed=99)
    given, late, frames = torch.cat([latents, behind], dim=2), delay(vae.config), 8 * total - 7
    past: tuple[Tensor, ...] = tuple(
        torch.full((batch, kept.channels, 2, kept.scale * rows, kept.scale * columns), 1e3)
        for kept in states(vae.config)
    )
    for first, after in pairwise(cuts):
        told = Past(torch.tensor(first), torch.tensor(total), past)
        pixels, past = vae.decode_next(given[:, :, first:after], told, timestep, noises)
        assert pixels.shape[2] == 8 * (after - first)
        begin = 8 * first - late
        yield pixels[:, :, max(0, -begin) : max(0, frames - begin)]


def cut(config: VAEConfig, total: int, piece: int) -> list[int]:
    """As far behind the clip as its end is late."""
    return list(range(0, total + delay(config) // 8 + piece + 1, piece))


@pytest.mark.parametrize(("total", "piece"), [(1, 1), (2, 4), (5, 2), (7, 3)])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_stream_is_the_whole_clip(generation: Any, total: int, piece: int) -> None:
    config = small(generation)
    vae, latents = vae_of(config, seed=total), normals(2, 8, total, 1, 2, seed=3)
    constants = times(config, 0.05, 0.7), some_noises(config, 1, 2)
    found = streamed(vae, latents, cut(config, total, piece), *constants)
    assert difference(found, vae.decode(latents, *constants)) <= TOLERANCE


def test_pieces_may_have_any_lengths() -> None:
    config = small("0.9")
    vae, latents = vae_of(config, seed=1), normals(1, 8, 6, 2, 1, seed=3)
    cuts = [0, 1, 5, 7, 8, 20, 21, 22, 40]
    assert difference(streamed(vae, latents, cuts), vae.decode(latents)) <= TOLERANCE


@pytest.mark.parametrize("config", [unreleased(), replace(unreleased(), causal_decoder=True)])
def test_other_blocks_and_causal_decoders_go_on_too(config: VAEConfig) -> None:
    vae, latents = vae_of(config, seed=10), normals(1, 8, 4, 1, 2, seed=3)
    found = streamed(vae, latents, cut(config, 4, 1))
    assert difference(found, vae.decode(latents)) <= TOLERANCE
    assert difference(found, original_decode(original(vae), latents, None)) <= TOLERANCE


@pytest.mark.parametrize("generation", GENERATIONS)
def test_it_is_as_late_as_it_looks_ahead(generation: Any) -> None:
    """Of the twin of each first frame, half a frame of a level comes to that."""
    config = VAE_GENERATIONS[generation]
    levels = reach(config)
    ahead = 8 * sum(levels, Fraction(0))
    assert ahead <= delay(config) < ahead + 8
    causal = replace(config, causal_decoder=True)
    assert delay(causal) == 7, "the frames before the clip's first, which has no twins"
    assert len(states(config)) == len(states(causal))


def test_what_is_kept_has_the_channels_of_the_weights() -> None:
    config = small("0.9.1")
    vae = vae_of(config, seed=1)
    convolutions = [m for m in vae.decoder.modules() if isinstance(m, torch.nn.Conv3d)]
    read = sorted(m.in_channels for m in convolutions if m.kernel_size == (3, 3, 3))
    assert read == sorted(kept.channels for kept in states(config))
