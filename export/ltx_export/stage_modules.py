"""Each stage as a module with plain tensors in and out, its weights named as in the checkpoint.

Modules are built on the meta device: they have shapes, names and a forward, and no bytes.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ltx_engines.stages import STREAM
from ltx_export.graphs import Model
from ltx_ref.ltx_video.model import LTXVideo
from ltx_ref.ltx_video.transformer import StgMode
from ltx_ref.ltx_video.upsampler import UpsamplerStage
from ltx_ref.ltx_video.vae_stream import Past
from ltx_ref.ltx_video.vae_stream_config import states

if TYPE_CHECKING:
    from transformers import T5EncoderModel


class TextEncoder(nn.Module):
    def __init__(self, model: "T5EncoderModel") -> None:
        super().__init__()
        self.shared = model.shared
        self.encoder = model.encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeds = self.shared(input_ids)
        # As T5 does it: padding gets the lowest number of the type. A mask of four axes is taken
        # as it is; from one of two axes transformers builds a gather over the batch.
        padding = (1 - attention_mask)[:, None, None, :].to(embeds.dtype)
        bias = padding * torch.finfo(embeds.dtype).min
        states: Tensor = self.encoder(inputs_embeds=embeds, attention_mask=bias).last_hidden_state
        return states


class Transformer(nn.Module):
    def __init__(self, model: LTXVideo, stg_mode: StgMode) -> None:
        super().__init__()
        self.model = model.model
        self.stg_mode = stg_mode

    def forward(
        self,
        latents: Tensor,
        coords: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        skip_layer_mask: Tensor,
    ) -> Tensor:
        velocity: Tensor = self.model.diffusion_model(
            latents,
            coords,
            timestep,
            prompt_embeds,
            prompt_mask,
            skip_layer_mask,
            stg_mode=self.stg_mode,
        )
        return velocity


class VAEEncoder(nn.Module):
    def __init__(self, model: LTXVideo) -> None:
        super().__init__()
        self.vae = model.vae
        del self.vae.decoder

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        # What the tracer knows from the start keeps its algebra short: 7 s here, without it 21.
        torch._check(pixels.shape[2] == 8 * noise.shape[2] - 7)
        torch._check(pixels.shape[3] == 32 * noise.shape[3])
        torch._check(pixels.shape[4] == 32 * noise.shape[4])
        return self.vae.encode(pixels, noise)


class VAEDecoder(nn.Module):
    def __init__(self, model: LTXVideo) -> None:
        super().__init__()
        self.vae = model.vae
        del self.vae.encoder

    def forward(self, latents: Tensor, *rest: Tensor) -> Tensor:
        """`rest`: the timestep if the decoder is conditioned on it, then the blocks' noises."""
        conditioned = self.vae.config.timestep_conditioning
        timestep, noises = (rest[0], rest[1:]) if conditioned else (None, rest)
        for block, noise in zip(self.vae.decoder.noise_blocks, noises, strict=True):
            torch._check(noise.shape[1] == block.scale * latents.shape[3])
            torch._check(noise.shape[2] == block.scale * latents.shape[4])
        return self.vae.decode(latents, timestep, noises)


class VAEDecoderStream(nn.Module):
    def __init__(self, model: LTXVideo) -> None:
        super().__init__()
        self.vae = model.vae
        del self.vae.encoder

    def forward(self, latents: Tensor, place: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """`rest`: the timestep if the decoder is conditioned on it, the blocks' noises, and what
        was kept."""
        config, noise_blocks = self.vae.config, self.vae.decoder.noise_blocks
        conditioned = config.timestep_conditioning
        timestep, rest = (rest[0], rest[1:]) if conditioned else (None, rest)
        noises, kept = rest[: len(noise_blocks)], rest[len(noise_blocks) :]
        finer = (
            *((noise, block.scale) for noise, block in zip(noises, noise_blocks, strict=True)),
            *((past, state.scale) for past, state in zip(kept, states(config), strict=True)),
        )
        for tensor, scale in finer:
            torch._check(tensor.shape[-2] == scale * latents.shape[3])
            torch._check(tensor.shape[-1] == scale * latents.shape[4])
        past = Past(place[0], place[1], kept)
        pixels, left = self.vae.decode_next(latents, past, timestep, noises)
        return pixels, *left


def build(stage: str, model: Model) -> nn.Module:
    """The stage's module on the meta device, ready to be traced."""
    with torch.device("meta"):
        module = _build(stage, model)
    return module.eval().requires_grad_(False)


def _build(stage: str, model: Model) -> nn.Module:
    if stage == "latent_upsampler" and model.upsampler is not None:
        return UpsamplerStage(model.upsampler)
    if stage == "text_encoder":
        from transformers import T5EncoderModel

        return TextEncoder(T5EncoderModel(model.text.for_transformers()))
    whole = LTXVideo(model.config)
    if stage == "transformer":
        return Transformer(whole, model.stg_mode)
    if stage == "vae_encoder":
        return VAEEncoder(whole)
    if stage == "vae_decoder":
        return VAEDecoder(whole)
    if stage == STREAM:
        return VAEDecoderStream(whole)
    raise ValueError(f"no stage {stage!r}")
