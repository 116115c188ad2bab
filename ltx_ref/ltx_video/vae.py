"""LTX-Video's video VAE, all three generations: pixels to normalised latents and back.

B batch, C channels, F H W frames, rows, columns of the current grid. One latent cell stands for
8 x 32 x 32 pixels; the first latent frame stands for one frame. The encoder is causal in time; the
decoder is not, in every release. Modules carry the original checkpoint's names.
Source: Lightricks/LTX-Video `ltx_video/models/autoencoders/causal_video_autoencoder.py`.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx_ref.checkpoint import CheckpointError
from ltx_ref.ltx_video.config import (
    STRIDES,
    Block,
    PaddingMode,
    Stride,
    VAEConfig,
    multiplier,
    noise_blocks,
)
from ltx_ref.ltx_video.transformer import TimestepEmbedding
from ltx_ref.ltx_video.vae_stream import Frames, Past, Stream, WholeClip


class VideoVAE(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior, normalised; zero noise gives its mean.

        Args:
            pixels: B 3 8k+1 32h 32w, from -1 to 1.
            noise: B latent_channels k+1 h w, standard normal.
        """
        mean, log_variance = self.encoder(pixels)
        latents = mean + torch.exp(0.5 * log_variance) * noise
        return self.per_channel_statistics.normalise(latents)

    def decode(
        self, latents: Tensor, timestep: Tensor | None = None, noises: Sequence[Tensor] = ()
    ) -> Tensor:
        """Pixels from about -1 to 1, B 3 8(F-1)+1 32H 32W.

        Args:
            latents: B latent_channels F H W, normalised.
            timestep: float32 B, the noise level left in the latents; only and always for a decoder
                with timestep conditioning.
            noises: one tensor for each of `noise_blocks(config)`: maps, rows, columns.
        """
        return self._decode(latents, timestep, noises, WholeClip(self.config.causal_decoder))

    def decode_next(
        self,
        latents: Tensor,
        past: Past,
        timestep: Tensor | None = None,
        noises: Sequence[Tensor] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same pixels, of as many frames at once as `latents` has, 8 F of them: those from
        8 first - `delay(config)` on. Those before the clip and after its end mean nothing.

        Args:
            latents: B latent_channels F H W, those that follow; after the clip's end any.
            past: where they are, and the last two frames that each convolution saw.
            timestep, noises: as for `decode`, the same for every call of a clip.

        Returns:
            B 3 8F 32H 32W, and what the next call is given as `past.frames`.
        """
        time = Stream(self.config.causal_decoder, past)
        pixels = self._decode(latents, timestep, noises, time)
        return pixels, time.left()

    def _decode(
        self, latents: Tensor, timestep: Tensor | None, noises: Sequence[Tensor], time: Frames
    ) -> Tensor:
        if (timestep is not None) != self.config.timestep_conditioning:
            raise ValueError("timestep is for decoders with timestep conditioning, and required")
        if len(noises) != len(self.decoder.noise_blocks):
            raise ValueError(f"{len(noises)} noises, wanted {len(self.decoder.noise_blocks)}")
        pixels: Tensor = self.decoder(
            self.per_channel_statistics.denormalise(latents), timestep, noises, time
        )
        return pixels


class PerChannelStatistics(nn.Module):
    """Means and deviations of the latents over the training set, one for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean-of-means", torch.zeros(channels))
        self.register_buffer("std-of-means", torch.ones(channels))

    def normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return latents * std + mean

    def _statistics(self) -> Iterator[Tensor]:
        names = ("mean-of-means", "std-of-means")
        return (self.get_buffer(name)[None, :, None, None, None] for name in names)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        mode = config.spatial_padding_mode
        width = config.encoder_base_channels
        self.conv_in = CausalConv3d(config.in_channels * config.patch_size**2, width, mode)
        self.down_blocks = nn.ModuleList()
        for block in config.encoder_blocks:
            module, width = _down_block(block, width, mode)
            self.down_blocks.append(module)
        self.conv_out = CausalConv3d(width, config.latent_channels + 1, mode)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean B C F H W and log-variance B 1 F H W; all channels share one variance."""
        time = WholeClip(causal=True)
        x = self.conv_in(patchify(pixels, self.config.patch_size), time)
        for block in self.down_blocks:
            x = block(x, time)
        moments = self.conv_out(F.silu(pixel_norm(x)), time)
        mean, log_variance = moments.split([self.config.latent_channels, 1], dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)


def _down_block(block: Block, width: int, mode: PaddingMode) -> tuple[nn.Module, int]:
    """The encoder's block, and the channels that leave it."""
    name, options = block
    multiplier = options.get("multiplier", 2)
    kind = name.removesuffix("_res").removesuffix("_x_y")
    if name == "res_x":
        return ResBlocks(width, options["num_layers"], mode), width
    if name == "res_x_y":
        return ResnetBlock3D(width, multiplier * width, mode), multiplier * width
    if kind in STRIDES and name == f"{kind}_res":
        down = SpaceToDepthDownsample(width, multiplier * width, STRIDES[kind], mode)
        return down, multiplier * width
    if name in STRIDES or name == "compress_all_x_y":
        out = multiplier * width if name.endswith("_x_y") else width
        return CausalConv3d(width, out, mode, STRIDES[kind]), out
    raise CheckpointError(f"config: vae encoder block {name!r} is not known")


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.noise_blocks = noise_blocks(config)
        mode = config.spatial_padding_mode
        blocks = tuple(reversed(config.decoder_blocks))
        width = config.decoder_base_channels * prod(multiplier(block) for block in blocks)
        self.conv_in = CausalConv3d(config.latent_channels, width, mode)
        self.up_blocks = nn.ModuleList()
        for block in blocks:
            self.up_blocks.append(_up_block(block, width, config))
            width //= multiplier(block)
        if config.timestep_conditioning:
            self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0))
            self.last_time_embedder = TimestepEmbedding(2 * width)
            self.last_scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.conv_out = CausalConv3d(width, config.out_channels * config.patch_size**2, mode)

    def forward(
        self, latents: Tensor, timestep: Tensor | None, noises: Sequence[Tensor], time: Frames
    ) -> Tensor:
        noise_of = {n.block: noise for n, noise in zip(self.noise_blocks, noises, strict=True)}
        scaled = None if timestep is None else timestep * self.timestep_scale_multiplier.float()

        x = self.conv_in(time.joined(latents), time)
        for index, block in enumerate(self.up_blocks):
            if isinstance(block, ResBlocks):
                x = block(x, time, timestep=scaled, noise=noise_of.get(index))
            else:
                x = block(x, time)

        x = pixel_norm(x)
        if scaled is not None:
            embedded = self.last_time_embedder(scaled, x.dtype).chunk(2, dim=-1)
            rows = zip(self.last_scale_shift_table, embedded, strict=True)
            shift, scale = ((row + part)[:, :, None, None, None] for row, part in rows)
            x = x * (1 + scale) + shift
        x = self.conv_out(time.joined(F.silu(x)), time)
        return unpatchify(x, self.config.patch_size)


def _up_block(block: Block, width: int, config: VAEConfig) -> nn.Module:
    name, options = block
    mode = config.spatial_padding_mode
    if name == "res_x":
        return ResBlocks(
            width,
            options["num_layers"],
            mode,
            timestep_conditioning=config.timestep_conditioning,
            inject_noise=options.get("inject_noise", False),
        )
    if name == "res_x_y" and not options.get("inject_noise"):
        return ResnetBlock3D(width, width // multiplier(block), mode)
    # Of the decoder's compressions only compress_all may narrow or carry a residual.
    if name in STRIDES and (name == "compress_all" or not options):
        return DepthToSpaceUpsample(
            width,
            STRIDES[name],
            mode,
            multiplier=multiplier(block),
            residual=options.get("residual", False),
        )
    raise CheckpointError(f"config: vae decoder block {name!r} with {dict(options)} is not known")


class ResBlocks(nn.Module):
    """Residual blocks of one width (`res_x`), modulated by the timestep when conditioned on it."""

    def __init__(
        self,
        width: int,
        layers: int,
        padding_mode: PaddingMode,
        *,
        timestep_conditioning: bool = False,
        inject_noise: bool = False,
    ) -> None:
        super().__init__()
        if timestep_conditioning:
            self.time_embedder = TimestepEmbedding(4 * width)
        self.res_blocks = nn.ModuleList(
            ResnetBlock3D(
                width,
                width,
                padding_mode,
                timestep_conditioning=timestep_conditioning,
                inject_noise=inject_noise,
            )
            for _ in range(layers)
        )

    def forward(
        self,
        x: Tensor,
        time: Frames,
        *,
        timestep: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """`timestep` (B) is scaled to 0..1000; `noise` has two maps for each residual block."""
        modulation = None
        if timestep is not None:
            modulation = self.time_embedder(timestep, x.dtype).chunk(4, dim=-1)
        for index, block in enumerate(self.res_blocks):
            maps = None if noise is None else noise[2 * index : 2 * index + 2].unbind(0)
            x = block(x, time, modulation=modulation, noise=maps)
        return x


class ResnetBlock3D(nn.Module):
    def __init__(
        self,
        width: int,
        out_width: int,
        padding_mode: PaddingMode,
        *,
        timestep_conditioning: bool = False,
        inject_noise: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(width, out_width, padding_mode)
        self.conv2 = CausalConv3d(out_width, out_width, padding_mode)
        if timestep_conditioning:
            self.scale_shift_table = nn.Parameter(torch.zeros(4, width))
        if inject_noise:
            self.per_channel_scale1 = nn.Parameter(torch.zeros(width, 1, 1))
            self.per_channel_scale2 = nn.Parameter(torch.zeros(width, 1, 1))
        self.reshapes = width != out_width
        if self.reshapes:
            self.norm3 = ChannelLayerNorm(width)
            self.conv_shortcut = nn.Conv3d(width, out_width, kernel_size=1)

    def forward(
        self,
        x: Tensor,
        time: Frames,
        *,
        modulation: Sequence[Tensor] | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """`modulation`: four of B C; `noise`: two of H W, shared by frames, channels and batch."""
        x = time.joined(x)
        h = pixel_norm(x)
        if modulation is not None:
            rows = zip(self.scale_shift_table, modulation, strict=True)
            shift1, scale1, shift2, scale2 = (
                (row + part)[..., None, None, None] for row, part in rows
            )
            h = h * (1 + scale1) + shift1
        h = self.conv1(F.silu(h), time)
        if noise is not None:
            h = h + (noise[0] * self.per_channel_scale1)[:, None]

        h = pixel_norm(h)
        if modulation is not None:
            h = h * (1 + scale2) + shift2
        h = self.conv2(time.joined(F.silu(h)), time)
        if noise is not None:
            h = h + (noise[1] * self.per_channel_scale2)[:, None]

        x = time.beside(x, 2)
        if self.reshapes:
            x = self.conv_shortcut(self.norm3(x))
        out: Tensor = x + h
        return out


class ChannelLayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        return normed


class SpaceToDepthDownsample(nn.Module):
    """Neighbouring cells become channels; a convolution and a grouped mean both do it, and add."""

    def __init__(
        self, width: int, out_width: int, stride: Stride, padding_mode: PaddingMode
    ) -> None:
        super().__init__()
        self.stride = stride
        self.group_size = width * prod(stride) // out_width
        self.conv = CausalConv3d(width, out_width // prod(stride), padding_mode)

    def forward(self, x: Tensor, time: Frames) -> Tensor:
        if self.stride[0] == 2:  # the first frame stands alone: it gets a twin
            x = torch.cat([x[:, :, :1], x], dim=2)
        mean = space_to_depth(x, self.stride).unflatten(1, (-1, self.group_size)).mean(2)
        out: Tensor = space_to_depth(self.conv(x, time), self.stride) + mean
        return out


class DepthToSpaceUpsample(nn.Module):
    """Channels become neighbouring cells; with `residual`, the input does so too and is added."""

    def __init__(
        self,
        width: int,
        stride: Stride,
        padding_mode: PaddingMode,
        *,
        multiplier: int,
        residual: bool,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.repeats = prod(stride) // multiplier
        self.residual = residual
        self.conv = CausalConv3d(width, width * prod(stride) // multiplier, padding_mode)

    def forward(self, x: Tensor, time: Frames) -> Tensor:
        x = time.joined(x)
        h = self._unfold(self.conv(x, time), time)
        if self.residual:
            x = self._unfold(time.beside(x, 1), time)
            h = h + torch.cat([x] * self.repeats, dim=1)
        if self.stride[0] == 2:
            time.doubled()
        return h

    def _unfold(self, x: Tensor, time: Frames) -> Tensor:
        x = depth_to_space(x, self.stride)
        return time.untwinned(x) if self.stride[0] == 2 else x


class CausalConv3d(nn.Module):
    """A 3x3x3 convolution; in time the edge frames repeat: both in front, or one on each side."""

    def __init__(
        self, width: int, out_width: int, padding_mode: PaddingMode, stride: Stride = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            width, out_width, 3, stride=stride, padding=(0, 1, 1), padding_mode=padding_mode
        )

    def forward(self, x: Tensor, time: Frames) -> Tensor:
        """`x` is `time.joined`."""
        out: Tensor = self.conv(time.padded(x))
        return out


def pixel_norm(x: Tensor) -> Tensor:
    """Root mean square over channels is one. The root is computed in float32: float16 has no 1e-8
    and ends where squares begin. Only the root: a float32 x would fill a third more of the GPU."""
    root = torch.sqrt(x.float().square().mean(1, keepdim=True) + 1e-8)
    return x / root.to(x.dtype)


def patchify(pixels: Tensor, size: int) -> Tensor:
    """B C F H*s W*s -> B C*s*s F H W; within a patch the column counts slower than the row."""
    x = pixels.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # B C F H q W r
    packed: Tensor = x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)
    return packed


def unpatchify(x: Tensor, size: int) -> Tensor:
    """The inverse of `patchify`."""
    x = x.unflatten(1, (-1, size, size))  # B C r q F H W
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def space_to_depth(x: Tensor, stride: Stride) -> Tensor:
    """B C F*p H*q W*r -> B C*p*q*r F H W. Rank 8 inside, TensorRT's limit."""
    p, q, r = stride
    x = x.unflatten(4, (-1, r)).unflatten(3, (-1, q)).unflatten(2, (-1, p))  # B C F p H q W r
    packed: Tensor = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return packed


def depth_to_space(x: Tensor, stride: Stride) -> Tensor:
    """The inverse of `space_to_depth`."""
    x = x.unflatten(1, (-1, *stride))  # B C p q r F H W
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
