"""Text to video as a generator: noise, guided steps, pixels. The yardstick of every other way.

Every random number comes out of one `Draw`, in this order: the noise [B, tokens, channels]; one
like it for each stochastic step; for decoders with timestep conditioning the noise that is added to
the finished latents [B, channels, frames, rows, columns]; the maps of each VAE block that injects
noise [maps, rows, columns]. The original draws the same things, but the later ones from torch's
global generator. Source: Lightricks/LTX-Video `pipelines/pipeline_ltx_video.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ltx_ref.ltx_video.conditioning import LatentGrid, coordinates, unpatchify
from ltx_ref.ltx_video.config import ModelConfig, noise_blocks
from ltx_ref.ltx_video.guidance import Guidance, GuidedDenoiser, Prompts
from ltx_ref.ltx_video.model import LTXVideo
from ltx_ref.ltx_video.sampling import (
    Denoiser,
    Sampler,
    check_allowed,
    ddim,
    dpmpp_2m,
    euler,
    explicit,
    schedule,
    skip,
    stochastic,
)
from ltx_ref.ltx_video.transformer import StgMode

Draw = Callable[[tuple[int, ...]], Tensor]
"""The next standard normals, float32 of the wished shape."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to make of the prompts. The defaults are the original's for the first 2B models."""

    num_frames: int = 121
    height: int = 704
    width: int = 1216
    frame_rate: float = 30.0
    num_inference_steps: int = 40
    skip_final_inference_steps: int = 0
    timesteps: tuple[float, ...] | None = None
    """The sigmas by hand; num_inference_steps and the checkpoint's schedule then do not count."""
    sampler: Sampler = "euler"
    guidance: Guidance = field(default_factory=Guidance)
    stg_mode: StgMode = "attention_values"
    decode_timestep: float = 0.05
    decode_noise_scale: float | None = 0.025
    """Share of noise in the latents to decode; None: as decode_timestep."""

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid.of_video(self.num_frames, self.height, self.width)


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was made. `latents`: B channels frames rows columns, at level `lower`."""

    index: int
    sigma: float
    lower: float
    latents: Tensor


@dataclass(frozen=True, slots=True)
class Video:
    """B 3 frames height width, from 0 to 1."""

    pixels: Tensor


def seeded(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def text_to_video(
    model: LTXVideo, prompts: Prompts, request: Request, draw: Draw
) -> Iterator[Step | Video]:
    """Yield each step, then the video."""
    for step in denoise(model, prompts, request, draw):
        yield step
    yield Video(decode(model, step.latents, request, draw))


def levels(config: ModelConfig, request: Request) -> tuple[float, ...]:
    """All noise levels of a run, from the first to 0."""
    if request.timesteps is not None:
        sigmas = explicit(request.timesteps)
    else:
        full = schedule(config.scheduler, request.num_inference_steps, request.grid.tokens)
        sigmas = skip(full, final=request.skip_final_inference_steps)
    check_allowed(sigmas, config.allowed_inference_steps)
    return (*sigmas, 0.0)


@torch.no_grad()
def denoise(model: LTXVideo, prompts: Prompts, request: Request, draw: Draw) -> Iterator[Step]:
    """Yield each step. Latents are float32 whatever the model's type is."""
    config, grid = model.config.transformer, request.grid
    denoiser = GuidedDenoiser(
        model=model.transformer,
        coords=coordinates(grid, request.frame_rate, causal=config.causal_temporal_positioning),
        prompts=prompts,
        guidance=request.guidance,
        num_layers=config.num_layers,
        dtype=model.transformer.proj_out.weight.dtype,
        stg_mode=request.stg_mode,
    )
    sigmas = levels(model.config, request)
    shape = (prompts.positive.shape[0], grid.tokens, config.in_channels)
    walk = _walk(request.sampler, denoiser, draw(shape), sigmas, partial(draw, shape))
    for index, ((sigma, lower), tokens) in enumerate(zip(pairwise(sigmas), walk, strict=True)):
        yield Step(index, sigma, lower, unpatchify(tokens, grid))


def _walk(
    sampler: Sampler,
    denoiser: Denoiser,
    noise: Tensor,
    sigmas: tuple[float, ...],
    draw: Callable[[], Tensor],
) -> Iterator[Tensor]:
    match sampler:
        case "euler":
            return euler(denoiser, noise, sigmas)
        case "stochastic":
            return stochastic(denoiser, noise, sigmas, draw)
        case "dpmpp_2m":
            return dpmpp_2m(denoiser, noise, sigmas)
        case "ddim":
            return ddim(denoiser, noise, sigmas)


@torch.no_grad()
def decode(model: LTXVideo, latents: Tensor, request: Request, draw: Draw) -> Tensor:
    """Pixels from 0 to 1 of finished latents, which are normalised."""
    batch, _, _, rows, columns = latents.shape
    timestep = None
    if model.config.vae.timestep_conditioning:
        timestep = torch.full((batch,), request.decode_timestep)
        scale = request.decode_noise_scale
        share = request.decode_timestep if scale is None else scale
        latents = latents * (1 - share) + draw(tuple(latents.shape)) * share
    noises = [
        draw((block.maps, rows * block.scale, columns * block.scale))
        for block in noise_blocks(model.config.vae)
    ]
    dtype = model.vae.decoder.conv_in.conv.weight.dtype
    pixels = model.vae.decode(latents.to(dtype), timestep, [noise.to(dtype) for noise in noises])
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
