"""LTX-Video's denoiser: latent tokens, text and a noise level in, velocity out.

B batch, N tokens (frame-major, then row, then column), L text tokens, T 1 or N, D inner width,
H heads. Modules carry the original checkpoint's names. Source: Lightricks/LTX-Video
`ltx_video/models/transformers/{transformer3d,attention}.py`; Hacohen et al., arXiv 2501.00103.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx_ref.ltx_video.config import TransformerConfig

StgMode = Literal["attention_values", "attention_skip", "transformer_block"]
"""What a masked block does for the perturbed branch of spatio-temporal guidance (STG).

`attention_values`: self-attention returns its values. `attention_skip`: it returns its input.
`transformer_block`: the whole block returns its input.
"""


@dataclass(frozen=True, slots=True)
class Skip:
    """Where `keep` (layers B 1 1) is 0 that block is perturbed; where it is 1 it is not."""

    keep: Tensor
    perturb: Tensor
    """1 - keep."""
    layer: int
    mode: StgMode

    def __call__(self, straight: Tensor, perturbed: Tensor) -> Tensor:
        return self.keep[self.layer] * straight + self.perturb[self.layer] * perturbed


class Transformer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        d = config.inner_dim
        self.patchify_proj = nn.Linear(config.in_channels, d)
        self.adaln_single = AdaLayerNormSingle(d)
        self.caption_projection = CaptionProjection(config.caption_channels, d)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, d))
        self.proj_out = nn.Linear(d, config.out_channels)

    def forward(
        self,
        latents: Tensor,
        coords: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        skip_layer_mask: Tensor,
        *,
        stg_mode: StgMode = "attention_values",
    ) -> Tensor:
        """Predict the velocity, noise minus clean latents.

        Args:
            latents: B N in_channels.
            coords: float32 B 3 N; seconds, pixel rows, pixel columns of each token's first corner.
            timestep: float32 B T; sigma from 1 (noise) to 0 (clean), one for all tokens or each.
            prompt_embeds: B L caption_channels.
            prompt_mask: B L; 1 for text, 0 for padding.
            skip_layer_mask: num_layers B; 1, or 0 where STG perturbs that block.

        Returns:
            B N out_channels, in the element type of the weights.
        """
        x = self.patchify_proj(latents)
        rope = rotary_table(coords, self.config)
        scaled = timestep * self.config.timestep_scale_multiplier
        embedded, modulation = self.adaln_single(scaled, x.dtype)
        text = self.caption_projection(prompt_embeds)
        text_bias = ((1 - prompt_mask) * -10000.0)[:, None, None, :]

        keep = skip_layer_mask[..., None, None]
        perturb = 1 - keep
        for index, block in enumerate(self.transformer_blocks):
            skip = Skip(keep, perturb, index, stg_mode)
            x = block(x, text, text_bias, rope, modulation, skip)

        shift, scale = (row + embedded for row in self.scale_shift_table)
        x = F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift
        velocity: Tensor = self.proj_out(x)
        return velocity


class Block(nn.Module):
    """Self-attention, attention to the text, and an MLP; the noise level steers first and last."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.inner_dim
        self.eps = config.norm_eps
        self.attn1 = Attention(config, d)
        self.attn2 = Attention(config, config.cross_attention_dim)
        self.ff = FeedForward(d)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, d))

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        text_bias: Tensor,
        rope: tuple[Tensor, Tensor],
        modulation: Tensor,
        skip: Skip,
    ) -> Tensor:
        start = x
        steered = modulation + self.scale_shift_table.flatten()
        shift1, scale1, gate1, shift2, scale2, gate2 = steered.chunk(6, dim=-1)

        h = rms_norm(x, self.eps) * (1 + scale1) + shift1
        x = x + gate1 * self.attn1(h, h, rope=rope, skip=skip)

        # The text branch has no norm, no modulation, no gate: the checkpoint has none for it.
        x = x + self.attn2(x, text, bias=text_bias)

        h = rms_norm(x, self.eps) * (1 + scale2) + shift2
        x = x + gate2 * self.ff(h)
        if skip.mode == "transformer_block":
            x = skip(x, start)
        return x


class Attention(nn.Module):
    """Queries from x, keys and values from source; norms run across all heads at once."""

    def __init__(self, config: TransformerConfig, source_dim: int) -> None:
        super().__init__()
        d = config.inner_dim
        self.heads = config.num_attention_heads
        self.head_dim = config.attention_head_dim
        self.to_q = nn.Linear(d, d)
        self.to_k = nn.Linear(source_dim, d)
        self.to_v = nn.Linear(source_dim, d)
        self.q_norm = RMSNorm(d, eps=1e-5)
        self.k_norm = RMSNorm(d, eps=1e-5)
        self.to_out = nn.ModuleList([nn.Linear(d, d)])

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        *,
        bias: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        skip: Skip | None = None,
    ) -> Tensor:
        q, k, values = self.q_norm(self.to_q(x)), self.k_norm(self.to_k(source)), self.to_v(source)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (
            t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for t in (q, k, values)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        if skip is not None and skip.mode == "attention_values":
            mixed = skip(mixed, values)
        elif skip is not None and skip.mode == "attention_skip":
            mixed = skip(mixed, x)
        out: Tensor = self.to_out[0](mixed)
        return out


class FeedForward(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        # net.1 was dropout: it has no weights, but net.2 keeps its number.
        self.net = nn.ModuleList([GELU(d, 4 * d), nn.Identity(), nn.Linear(4 * d, d)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class GELU(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class CaptionProjection(nn.Module):
    def __init__(self, caption_channels: int, d: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(caption_channels, d)
        self.linear_2 = nn.Linear(d, d)

    def forward(self, text: Tensor) -> Tensor:
        projected: Tensor = self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))
        return projected


class AdaLayerNormSingle(nn.Module):
    """One embedding of the noise level for the head, six modulations for every block."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.emb = TimestepEmbedding(d)
        self.linear = nn.Linear(d, 6 * d)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """B T -> B T D, and B T 6D: shift, scale, gate for attention, then for the MLP."""
        embedded = self.emb(timestep, dtype)
        return embedded, self.linear(F.silu(embedded))


class TimestepEmbedding(nn.Module):
    """Sinusoids of 256 channels, cosines first, through a small MLP."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepMLP(d)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """`timestep` in 0..1000, any shape; adds an axis of D at the end."""
        half = 128
        exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep[..., None] * torch.exp(exponent * -math.log(10000.0))
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded: Tensor = self.timestep_embedder(waves.to(dtype))
        return embedded


class TimestepMLP(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(256, d)
        self.linear_2 = nn.Linear(d, d)

    def forward(self, waves: Tensor) -> Tensor:
        embedded: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return embedded


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Root mean square over the last axis is one. Computed in float32, returned in x's type."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary_table(coords: Tensor, config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 B N D, each value twice; frequency-major, coordinate-minor.

    The rest of D modulo 6 stands in front and does not rotate. Source: `precompute_freqs_cis`.
    """
    d = config.inner_dim
    count = d // 6
    exponent = torch.linspace(0.0, 1.0, count, dtype=torch.float32, device=coords.device)
    frequencies = config.positional_embedding_theta**exponent * (math.pi / 2)
    limits = torch.tensor(
        config.positional_embedding_max_pos, dtype=torch.float32, device=coords.device
    )
    centred = coords.transpose(1, 2) / limits * 2 - 1  # B N 3
    angles = (frequencies[:, None] * centred[:, :, None, :]).flatten(2)  # B N 3*count
    padding = d - 6 * count
    cos, sin = (t.repeat_interleave(2, dim=-1) for t in (angles.cos(), angles.sin()))
    return F.pad(cos, (padding, 0), value=1.0), F.pad(sin, (padding, 0), value=0.0)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring pairs: (a, b) -> (a cos - b sin, b cos + a sin), in float32."""
    cos, sin = rope
    wide = x.float()
    first, second = wide.unflatten(-1, (-1, 2)).split(1, dim=-1)
    turned = torch.cat([-second, first], dim=-1).flatten(-2)
    return (wide * cos + turned * sin).to(x.dtype)
