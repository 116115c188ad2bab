"""LTX-Video's latent upsampler: twice the rows and columns, twice the frames, or both.

B batch, C channels, F H W frames, rows, columns of the latent grid. Convolutions pad with zeros on
all sides and are not causal. The network reads and writes latents as the VAE's encoder leaves them,
not normalised; `UpsamplerStage` puts the checkpoint's statistics around it. Modules carry the names
of the original file.
Source: Lightricks/LTX-Video `ltx_video/models/autoencoders/latent_upsampler.py`.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx_ref.checkpoint import load_weights, read_header
from ltx_ref.ltx_video.upsampler_config import (
    GROUPS,
    UpsamplerConfig,
    check_latent_channels,
    read_upsampler_config,
)
from ltx_ref.ltx_video.vae import PerChannelStatistics, depth_to_space


class LatentUpsampler(nn.Module):
    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        width, dims, blocks = config.mid_channels, config.dims, range(config.num_blocks_per_stage)
        self.initial_conv = _conv(dims, config.in_channels, width)
        self.initial_norm = nn.GroupNorm(GROUPS, width)
        self.res_blocks = nn.ModuleList(ResBlock(width, dims) for _ in blocks)
        p, q, r = config.stride
        self.upsampler = nn.Sequential(_conv(2 + (p > 1), width, p * q * r * width))
        self.post_upsample_res_blocks = nn.ModuleList(ResBlock(width, dims) for _ in blocks)
        self.final_conv = _conv(dims, width, config.in_channels)

    def forward(self, latents: Tensor) -> Tensor:
        """B C F H W -> B C F' H' W': sides double, frames become 2F - 1, as configured."""
        if self.config.dims == 2:
            return framewise(self._run, latents)
        return self._run(latents)

    def _run(self, x: Tensor) -> Tensor:
        x = F.silu(self.initial_norm(self.initial_conv(x)))
        for block in self.res_blocks:
            x = block(x)
        x = self._enlarge(x)
        for block in self.post_upsample_res_blocks:
            x = block(x)
        out: Tensor = self.final_conv(x)
        return out

    def _enlarge(self, x: Tensor) -> Tensor:
        if self.config.temporal_upsample:
            # The first frame stands for one frame of the video: its twin goes.
            return depth_to_space(self.upsampler(x), self.config.stride)[:, :, 1:]
        return self._shuffle(x) if self.config.dims == 2 else framewise(self._shuffle, x)

    def _shuffle(self, images: Tensor) -> Tensor:
        return F.pixel_shuffle(self.upsampler(images), 2)


class ResBlock(nn.Module):
    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        self.conv1 = _conv(dims, width, width)
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv2 = _conv(dims, width, width)
        self.norm2 = nn.GroupNorm(GROUPS, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(h)) + x)


class VAEPart(nn.Module):
    """Only a name: the statistics' keys begin with `vae.`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.per_channel_statistics = PerChannelStatistics(channels)


class UpsamplerStage(LatentUpsampler):
    """The upsampler between normalised latents, as every stage has them at its borders.

    Its weights come from two files, each under its own name there: the upsampler's, and the
    checkpoint's `vae.per_channel_statistics`.
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__(config)
        self.vae = VAEPart(config.in_channels)

    def forward(self, latents: Tensor) -> Tensor:
        statistics = self.vae.per_channel_statistics
        return statistics.normalise(super().forward(statistics.denormalise(latents)))


def load(path: Path, ignore_config_keys: Collection[str] = ()) -> LatentUpsampler:
    """The upsampler with the file's weights, in the file's element types, ready for inference.

    Raises:
        CheckpointError: the file is no latent upsampler or does not fit its configuration.
    """
    header = read_header(path)
    config = read_upsampler_config(header, ignore_config_keys)
    with torch.device("meta"):
        upsampler = LatentUpsampler(config)
    load_weights(upsampler, header)
    return upsampler.eval().requires_grad_(False)


def join(upsampler: LatentUpsampler, statistics: PerChannelStatistics) -> UpsamplerStage:
    """The stage made of both; it shares their tensors.

    Raises:
        CheckpointError: they are of latents with different numbers of channels.
    """
    weights = upsampler.state_dict()
    for name, tensor in statistics.state_dict().items():
        check_latent_channels(upsampler.config, len(tensor))
        weights[f"vae.per_channel_statistics.{name}"] = tensor
    with torch.device("meta"):
        stage = UpsamplerStage(upsampler.config)
    stage.load_state_dict(weights, assign=True)
    return stage.eval().requires_grad_(False)


def framewise(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer for images, applied to each frame of B C F H W."""
    images = layer(x.transpose(1, 2).flatten(0, 1))
    frames: Tensor = images.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    return frames


def _conv(dims: int, width: int, out_width: int) -> nn.Module:
    kind = nn.Conv2d if dims == 2 else nn.Conv3d
    return kind(width, out_width, kernel_size=3, padding=1)
