"""Steering: how the predictions for several texts become the one velocity of a step.

CFG moves away from the negative prompt, CFG-star first scales the negative prediction onto the
positive one, STG moves away from a prediction with some blocks perturbed, and rescaling gives the
result back some of the spread of the unguided one. Source: Lightricks/LTX-Video
`pipelines/pipeline_ltx_video.py` (__call__). All arithmetic is in float32.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ltx_ref.ltx_video.sampling import single
from ltx_ref.ltx_video.transformer import StgMode

PerStep = float | tuple[float, ...]
Blocks = tuple[int, ...]


class VelocityModel(Protocol):
    """The transformer's call; its tensors are described there."""

    def __call__(
        self,
        latents: Tensor,
        coords: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        skip_layer_mask: Tensor,
        *,
        stg_mode: StgMode,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class StepGuidance:
    """Guidance of one step, all lists resolved."""

    guidance_scale: float
    stg_scale: float
    rescaling_scale: float
    skip_blocks: Blocks

    @property
    def uses_cfg(self) -> bool:
        return self.guidance_scale > 1

    @property
    def uses_stg(self) -> bool:
        return self.stg_scale > 0

    @property
    def uses_rescaling(self) -> bool:
        """Only STG is rescaled: plain CFG stays as it is."""
        return self.uses_stg and self.rescaling_scale != 1


@dataclass(frozen=True, slots=True)
class Guidance:
    """Guidance of a whole run, as the original's configuration files state it.

    A scale is one number, or one for each of `guidance_timesteps`, which fall: step i uses the
    first entry whose guidance timestep is at most the step's sigma, or else the last entry.
    """

    guidance_scale: PerStep = 3.0
    stg_scale: PerStep = 1.0
    rescaling_scale: PerStep = 0.7
    skip_block_list: Blocks | tuple[Blocks, ...] = ()
    guidance_timesteps: tuple[float, ...] | None = None
    cfg_star_rescale: bool = False

    def __post_init__(self) -> None:
        count = None if self.guidance_timesteps is None else len(self.guidance_timesteps)
        if count == 0:
            raise ValueError("guidance_timesteps is empty; leave it out for the same at all steps")
        if len({isinstance(entry, tuple) for entry in self.skip_block_list}) > 1:
            raise ValueError(f"skip_block_list mixes blocks and lists: {self.skip_block_list}")
        for name in ("guidance_scale", "stg_scale", "rescaling_scale", "skip_block_list"):
            value = getattr(self, name)
            listed = isinstance(value, tuple) and (
                name != "skip_block_list" or any(isinstance(entry, tuple) for entry in value)
            )
            if listed and count is None:
                raise ValueError(f"{name} is a list, which needs guidance_timesteps")
            if listed and len(value) != count:
                raise ValueError(
                    f"{name} has {len(value)} entries, guidance_timesteps {count}; make them equal"
                )

    def at(self, sigma: float) -> StepGuidance:
        index = self._index(sigma)
        return StepGuidance(
            _pick(self.guidance_scale, index),
            _pick(self.stg_scale, index),
            _pick(self.rescaling_scale, index),
            _pick_blocks(self.skip_block_list, index),
        )

    def _index(self, sigma: float) -> int:
        """Compared in float32: 0.985 of the list must be the 0.985 of the schedule."""
        times = self.guidance_timesteps or (0.0,)
        reached = (i for i, time in enumerate(times) if single(time) <= single(sigma))
        return next(reached, len(times) - 1)


def _pick(value: PerStep, index: int) -> float:
    return value[index] if isinstance(value, tuple) else value


def _pick_blocks(value: Blocks | tuple[Blocks, ...], index: int) -> Blocks:
    listed = tuple(entry for entry in value if isinstance(entry, tuple))
    return listed[index] if listed else tuple(entry for entry in value if isinstance(entry, int))


@dataclass(frozen=True, slots=True)
class Prompts:
    """Encoded texts. Embeddings B L width, masks B L (1 text, 0 padding)."""

    positive: Tensor
    positive_mask: Tensor
    negative: Tensor
    negative_mask: Tensor


@dataclass(frozen=True, slots=True)
class GuidedDenoiser:
    """A Denoiser of the transformer: one batch of all predictions a step needs, then guidance."""

    model: VelocityModel
    coords: Tensor
    prompts: Prompts
    guidance: Guidance
    num_layers: int
    dtype: torch.dtype
    stg_mode: StgMode = "attention_values"

    def __call__(self, latents: Tensor, sigma: float) -> Tensor:
        step, batch = self.guidance.at(sigma), latents.shape[0]
        prompts = self.prompts
        texts = [(prompts.positive, prompts.positive_mask)]
        if step.uses_cfg:
            texts.insert(0, (prompts.negative, prompts.negative_mask))
        if step.uses_stg:
            texts.append((prompts.positive, prompts.positive_mask))
        embeds, masks = (torch.cat(parts).to(self.dtype) for parts in zip(*texts, strict=True))

        rows = batch * len(texts)
        skip_layer_mask = torch.ones(self.num_layers, rows, dtype=self.dtype)
        if step.uses_stg:
            skip_layer_mask[self._checked(step.skip_blocks), -batch:] = 0
        velocity = self.model(
            torch.cat([latents.to(self.dtype)] * len(texts)),
            self.coords.expand(rows, -1, -1),
            torch.full((rows, 1), sigma),
            embeds,
            masks,
            skip_layer_mask,
            stg_mode=self.stg_mode,
        )
        parts = list(velocity.float().chunk(len(texts)))
        negative = parts.pop(0) if step.uses_cfg else None
        perturbed = parts.pop() if step.uses_stg else None
        star = self.guidance.cfg_star_rescale
        return combine(parts[0], negative, perturbed, step, cfg_star_rescale=star)

    def _checked(self, blocks: Blocks) -> list[int]:
        for block in blocks:
            if not 0 <= block < self.num_layers:
                raise ValueError(f"skip_block_list names block {block} of {self.num_layers}")
        return list(blocks)


def combine(
    positive: Tensor,
    negative: Tensor | None,
    perturbed: Tensor | None,
    step: StepGuidance,
    *,
    cfg_star_rescale: bool = False,
) -> Tensor:
    """The guided velocity; B N C each. `negative` with CFG, `perturbed` with STG."""
    velocity = positive
    if negative is not None:
        if cfg_star_rescale:
            negative = negative * projection(positive, negative)
        velocity = negative + step.guidance_scale * (positive - negative)
    if perturbed is not None:
        velocity = velocity + step.stg_scale * (positive - perturbed)
        if step.uses_rescaling:
            share = step.rescaling_scale
            velocity = velocity * (share * (spread(positive) / spread(velocity)) + (1 - share))
    return velocity


def projection(positive: Tensor, negative: Tensor) -> Tensor:
    """Length of the positive prediction along the negative one, in units of the latter; B 1 1."""
    product = (positive * negative).sum(dim=(1, 2), keepdim=True)
    return product / (negative.square().sum(dim=(1, 2), keepdim=True) + 1e-8)


def spread(velocity: Tensor) -> Tensor:
    """Standard deviation over all tokens and channels, unbiased; B 1 1."""
    return velocity.std(dim=(1, 2), keepdim=True)
