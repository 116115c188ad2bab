"""Our video VAE, all three generations, against the original's and diffusers'."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ltx_ref.ltx_video.config import (
    VAE_GENERATIONS,
    Block,
    Generation,
    VAEConfig,
    noise_blocks,
)
from ltx_ref.ltx_video.vae import VideoVAE, pixel_norm
from tests.ref.oracles import ORIGINAL_MISSING, TOLERANCE, difference, normals, randomize

GENERATIONS: tuple[Generation, ...] = get_args(Generation)
PREFIX = "per_channel_statistics."


def small(generation: Generation, **changes: Any) -> VAEConfig:
    """The released blocks with few channels."""
    sizes = {"latent_channels": 8, "encoder_base_channels": 8, "decoder_base_channels": 8}
    return replace(VAE_GENERATIONS[generation], **{**sizes, **changes})


def vae_of(config: VAEConfig, seed: int) -> VideoVAE:
    with torch.device("meta"):
        vae = VideoVAE(config)
    randomize(vae, seed)
    return vae.eval()


def original(ours: VideoVAE) -> Any:
    module = pytest.importorskip(
        "ltx_video.models.autoencoders.causal_video_autoencoder", reason=ORIGINAL_MISSING
    )
    config = asdict(ours.config)
    for side in ("encoder_blocks", "decoder_blocks"):
        config[side] = [[name, dict(options)] for name, options in getattr(ours.config, side)]
    fixed = {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "latent_log_var": "uniform",
        "norm_layer": "pixel_norm",
        "use_quant_conv": False,
    }
    oracle = module.CausalVideoAutoencoder.from_config({**config, **fixed})
    oracle.load_state_dict(ours.state_dict())
    return oracle.eval()


@contextmanager
def fed(monkeypatch: pytest.MonkeyPatch, noises: Sequence[Tensor]) -> Iterator[None]:
    """Each torch.randn that the oracle calls takes the next of `noises`, and all are taken."""
    rest = list(noises)

    def randn(shape: Sequence[int], **_: object) -> Tensor:
        noise = rest.pop(0)
        assert tuple(shape) == tuple(noise.shape)
        return noise

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        yield
    assert not rest


def original_encode(oracle: Any, pixels: Tensor, noise: Tensor) -> Tensor:
    from ltx_video.models.autoencoders.vae_encode import normalize_latents

    posterior = oracle.encode(pixels).latent_dist
    latents: Tensor = normalize_latents(posterior.mean + posterior.std * noise, oracle, True)
    return latents


def original_decode(oracle: Any, latents: Tensor, timestep: Tensor | None) -> Tensor:
    from ltx_video.models.autoencoders.vae_encode import vae_decode

    decoded: Tensor = vae_decode(
        latents, oracle, True, vae_per_channel_normalize=True, timestep=timestep
    )
    return decoded


# diffusers' name of each block of the original, in order, and of some tensors
# (diffusers scripts/convert_ltx_to_diffusers.py).
DOWN_09 = (
    *("down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.0.conv_out"),
    *("down_blocks.1", "down_blocks.1.downsamplers.0", "down_blocks.1.conv_out"),
    *("down_blocks.2", "down_blocks.2.downsamplers.0", "down_blocks.3", "mid_block"),
)
DOWN_095 = (
    *("down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.1"),
    *("down_blocks.1.downsamplers.0", "down_blocks.2", "down_blocks.2.downsamplers.0"),
    *("down_blocks.3", "down_blocks.3.downsamplers.0", "mid_block"),
)
UP_09 = (
    *("mid_block", "up_blocks.0", "up_blocks.1.upsamplers.0", "up_blocks.1"),
    *("up_blocks.2.conv_in", "up_blocks.2.upsamplers.0", "up_blocks.2"),
    *("up_blocks.3.conv_in", "up_blocks.3.upsamplers.0", "up_blocks.3"),
)
UP_095 = (
    *("mid_block", "up_blocks.0.upsamplers.0", "up_blocks.0", "up_blocks.1.upsamplers.0"),
    *("up_blocks.1", "up_blocks.2.upsamplers.0", "up_blocks.2"),
)
BLOCKS: dict[Generation, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "0.9": (DOWN_09, UP_09),
    "0.9.1": (DOWN_09, UP_095),
    "0.9.5": (DOWN_095, UP_095),
}
RENAMES = {
    "res_blocks": "resnets",
    "norm3.norm": "norm3",
    "conv_shortcut": "conv_shortcut.conv",
    "last_time_embedder": "time_embedder",
    "last_scale_shift_table": "scale_shift_table",
    PREFIX + "mean-of-means": "latents_mean",
    PREFIX + "std-of-means": "latents_std",
}


def diffusers_name(key: str, generation: Generation) -> str:
    down, up = BLOCKS[generation]
    part, _, rest = key.partition("_blocks.")
    if rest:
        index, _, rest = rest.partition(".")
        side, names = ("encoder", down) if part == "encoder.down" else ("decoder", up)
        key = f"{side}.{names[int(index)]}.{rest}"
    for theirs, name in RENAMES.items():
        key = key.replace(theirs, name)
    return key


def diffusers(ours: VideoVAE, generation: Generation) -> Any:
    module = pytest.importorskip("diffusers", reason="an oracle of the tests")
    encoder, decoder = ours.config.encoder_base_channels, ours.config.decoder_base_channels
    config: dict[str, Any] = {
        "latent_channels": ours.config.latent_channels,
        "block_out_channels": tuple(encoder * n for n in (1, 2, 4, 4)),
        "decoder_block_out_channels": tuple(decoder * n for n in (1, 2, 4, 4)),
        "timestep_conditioning": ours.config.timestep_conditioning,
    }
    if generation != "0.9":
        config |= {
            "decoder_block_out_channels": tuple(decoder * n for n in (2, 4, 8)),
            "decoder_layers_per_block": (5, 6, 7, 8) if generation == "0.9.1" else (5,) * 4,
            "decoder_spatio_temporal_scaling": (True,) * 3,
            "decoder_inject_noise": (*(generation == "0.9.1",) * 3, False),
            "upsample_residual": (True,) * 3,
            "upsample_factor": (2,) * 3,
        }
    if generation == "0.9.5":
        config |= {
            "block_out_channels": tuple(encoder * n for n in (1, 2, 4, 8, 16)),
            "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
            "layers_per_block": (4, 6, 6, 2, 2),
            "spatio_temporal_scaling": (True,) * 4,
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        }
    oracle = module.AutoencoderKLLTXVideo(**config)
    weights = ours.state_dict()
    oracle.load_state_dict({diffusers_name(k, generation): v for k, v in weights.items()})
    return oracle.eval()


def diffusers_encode(oracle: Any, pixels: Tensor, noise: Tensor) -> Tensor:
    posterior = oracle.encode(pixels).latent_dist
    mean, std = (t[:, None, None, None] for t in (oracle.latents_mean, oracle.latents_std))
    latents: Tensor = (posterior.mean + posterior.std * noise - mean) / std
    return latents


def diffusers_decode(oracle: Any, latents: Tensor, timestep: Tensor | None) -> Tensor:
    mean, std = (t[:, None, None, None] for t in (oracle.latents_mean, oracle.latents_std))
    decoded: Tensor = oracle.decode(latents * std + mean, timestep, return_dict=False)[0]
    return decoded


def some_pixels(frames: int, seed: int, batch: int = 2) -> Tensor:
    return normals(batch, 3, frames, 32, 64, seed=seed).tanh()


def some_noises(config: VAEConfig, rows: int, columns: int) -> list[Tensor]:
    return [
        normals(block.maps, rows * block.scale, columns * block.scale, seed=block.block)
        for block in noise_blocks(config)
    ]


def times(config: VAEConfig, *values: float) -> Tensor | None:
    return torch.tensor(values) if config.timestep_conditioning else None


@pytest.mark.parametrize("frames", [1, 9, 17])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_both_oracles_encode_as_ours(generation: Generation, frames: int) -> None:
    config = small(generation)
    ours, pixels = vae_of(config, seed=frames), some_pixels(frames, seed=1)
    noise = normals(2, 8, (frames - 1) // 8 + 1, 1, 2, seed=2)
    latents = ours.encode(pixels, noise)
    assert difference(latents, original_encode(original(ours), pixels, noise)) <= TOLERANCE
    wanted = diffusers_encode(diffusers(ours, generation), pixels, noise)
    assert difference(latents, wanted) <= TOLERANCE


@pytest.mark.parametrize("latent_frames", [1, 2, 3])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_both_oracles_decode_as_ours(
    generation: Generation, latent_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(generation)
    ours = vae_of(config, seed=latent_frames)
    latents = normals(2, 8, latent_frames, 1, 2, seed=3)
    timestep, noises = times(config, 0.05, 0.7), some_noises(config, 1, 2)
    pixels = ours.decode(latents, timestep, noises)
    assert pixels.shape == (2, 3, 8 * latent_frames - 7, 32, 64)
    oracles: tuple[tuple[Any, Callable[..., Tensor]], ...] = (
        (original(ours), original_decode),
        (diffusers(ours, generation), diffusers_decode),
    )
    for oracle, decode in oracles:
        with fed(monkeypatch, [noise for maps in noises for noise in maps]):
            wanted = decode(oracle, latents, timestep)
        assert difference(pixels, wanted) <= TOLERANCE


def test_wider_blocks_agree_too() -> None:
    """Channel counts that differ between encoder and decoder, as no release has them."""
    config = small("0.9.5", encoder_base_channels=16, decoder_base_channels=24, latent_channels=12)
    ours = vae_of(config, seed=5)
    pixels, noise = some_pixels(9, seed=6, batch=1), torch.zeros(1, 12, 2, 1, 2)
    latents = ours.encode(pixels, noise)
    assert difference(latents, original_encode(original(ours), pixels, noise)) <= TOLERANCE
    timestep = times(config, 0.05)
    wanted = original_decode(original(ours), latents, timestep)
    assert difference(ours.decode(latents, timestep), wanted) <= TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        {"spatial_padding_mode": "reflect"},
        {"spatial_padding_mode": "replicate"},
        {"causal_decoder": True},
        {"patch_size": 2},
        {"timestep_conditioning": False},
    ],
    ids=lambda change: "-".join(change),
)
def test_options_of_the_metadata_act_as_in_the_original(change: dict[str, Any]) -> None:
    config = small("0.9.5", **change)
    ours, oracle = vae_of(config, seed=7), None
    pixels = normals(1, 3, 9, 64, 64, seed=8).tanh()
    oracle = original(ours)
    rows = 64 // (8 * config.patch_size)
    noise = normals(1, 8, 2, rows, rows, seed=9)
    latents = ours.encode(pixels, noise)
    assert difference(latents, original_encode(oracle, pixels, noise)) <= TOLERANCE
    timestep = times(config, 0.3)
    wanted = original_decode(oracle, latents, timestep)
    assert difference(ours.decode(latents, timestep), wanted) <= TOLERANCE


def test_blocks_no_release_has_act_as_in_the_original() -> None:
    encoder: tuple[Block, ...] = (
        ("compress_space", {}),
        ("res_x", {"num_layers": 1}),
        ("compress_time", {}),
        ("compress_all_x_y", {"multiplier": 3}),
        ("res_x_y", {"multiplier": 2}),
        ("compress_all_res", {"multiplier": 2}),
    )
    decoder: tuple[Block, ...] = (
        ("res_x", {"num_layers": 1}),
        ("compress_space", {}),
        ("res_x_y", {"multiplier": 3}),
        ("compress_time", {}),
        ("compress_all", {"residual": True, "multiplier": 4}),
        ("compress_all", {"multiplier": 2}),
    )
    config = VAEConfig(encoder, decoder, 3, 3, 8, 4, 8, 8)
    ours = vae_of(config, seed=10)
    oracle, pixels, noise = original(ours), some_pixels(9, seed=11), torch.zeros(2, 8, 2, 1, 2)
    latents = ours.encode(pixels, noise)
    assert difference(latents, original_encode(oracle, pixels, noise)) <= TOLERANCE
    wanted = original_decode(oracle, latents, None)
    assert difference(ours.decode(latents), wanted) <= TOLERANCE


@pytest.mark.parametrize(
    ("generation", "counts", "tensors"),
    [
        ("0.9", (180_404_353, 238_789_296), 188),
        ("0.9.1", (180_404_353, 754_572_081), 292),
        ("0.9.5", (694_098_881, 552_814_641), 224),
    ],
)
def test_the_released_sizes_have_the_released_numbers_of_parameters(
    generation: Generation, counts: tuple[int, int], tensors: int
) -> None:
    with torch.device("meta"):
        vae = VideoVAE(VAE_GENERATIONS[generation])
    found = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
    assert tuple(found) == counts
    assert len(list(vae.parameters())) == tensors


@pytest.mark.parametrize("value", [0.0, 1e-5, 300.0])
def test_the_norm_in_float16_neither_divides_by_zero_nor_overflows(value: float) -> None:
    x = torch.full((1, 8, 1, 2, 2), value)
    found = pixel_norm(x.half()).float()
    assert (found - pixel_norm(x.half().float())).abs().max() < 2e-3
