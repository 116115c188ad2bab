"""Guidance: which branches the transformer runs at each step, and how they become one velocity.

    uncond     the negative prompt          text + uncond: classifier-free guidance
    text       the prompt                   text + perturbed: spatio-temporal guidance, away from
    perturbed  the prompt, blocks skipped   what the model says with some of its blocks disturbed

Scales may change along the way: a list has one entry for each of the guidance timesteps, and the
first of these that is not above the noise level counts (else the last).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError

Floats = NDArray[np.float32]
PerStep = float | tuple[float, ...]
Blocks = tuple[int, ...]
Branch = Literal["uncond", "text", "perturbed"]


@dataclass(frozen=True, slots=True)
class Guidance:
    """The wishes, as the original's configuration spells them."""

    guidance_scale: PerStep = 3.0
    stg_scale: PerStep = 1.0
    rescaling_scale: PerStep = 0.7
    skip_block_list: Blocks | tuple[Blocks, ...] | None = None
    guidance_timesteps: tuple[float, ...] | None = None
    cfg_star_rescale: bool = False

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "stg_scale", "rescaling_scale"):
            scales = getattr(self, name)
            for scale in scales if isinstance(scales, tuple) else (scales,):
                if not 0 <= scale < inf:
                    raise UserError(f"{name} must be a number from 0, not {scale:g}")

    @property
    def perturbs(self) -> bool:
        """Whether any step has spatio-temporal guidance."""
        scales = self.stg_scale if isinstance(self.stg_scale, tuple) else (self.stg_scale,)
        return any(scale > 0 for scale in scales)


@dataclass(frozen=True, slots=True)
class StepGuidance:
    """One step's share of it."""

    guidance_scale: float
    stg_scale: float
    rescaling_scale: float
    skip_blocks: Blocks = ()
    cfg_star_rescale: bool = False

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The transformer's batch. Without a skipped block, perturbed would be text again."""
        first: tuple[Branch, ...] = ("uncond",) if self.guidance_scale > 1 else ()
        last: tuple[Branch, ...] = ("perturbed",) if self._perturbs and self.skip_blocks else ()
        return (*first, "text", *last)

    @property
    def rescales(self) -> bool:
        """Whether the guided velocity gets back some of the text's deviation."""
        return self._perturbs and self.rescaling_scale != 1

    @property
    def _perturbs(self) -> bool:
        return self.stg_scale > 0

    def combine(self, velocities: Floats) -> Floats:
        """[branches, tokens, channels] -> [1, tokens, channels]."""
        by_branch = dict(zip(self.branches, velocities, strict=True))
        text = by_branch["text"]
        guided: Floats = text
        if "uncond" in by_branch:
            uncond = by_branch["uncond"]
            if self.cfg_star_rescale:
                uncond = np.float32(_projection(text, uncond)) * uncond
            guided = uncond + np.float32(self.guidance_scale) * (text - uncond)
        if self._perturbs:
            away = text - by_branch.get("perturbed", text)
            guided = guided + np.float32(self.stg_scale) * away
        if self.rescales:
            factor = _deviation(text) / _deviation(guided)
            share = self.rescaling_scale * factor + 1 - self.rescaling_scale
            guided = guided * np.float32(share)
        return guided[np.newaxis]

    def skip_layer_mask(self, num_layers: int) -> Floats:
        """[num_layers, branches]: 0 where the perturbed branch leaves a block's attention out."""
        mask = np.ones((num_layers, len(self.branches)), np.float32)
        if "perturbed" in self.branches:
            mask[list(self.skip_blocks), -1] = 0
        return mask


def plan(guidance: Guidance, sigmas: Sequence[float], num_layers: int) -> tuple[StepGuidance, ...]:
    """The guidance of each step; `sigmas` ends with 0, where no step begins."""
    _check_lengths(guidance)
    steps = tuple(_resolve(guidance, sigma) for sigma in sigmas[:-1])
    for step in steps:
        for block in step.skip_blocks if step.stg_scale > 0 else ():
            if not 0 <= block < num_layers:
                raise UserError(
                    f"skip_block_list names block {block}, the transformer has 0 to "
                    f"{num_layers - 1}; choose a preset or config of a model of this size, or "
                    "leave nothing out with --stg-scale 0"
                )
    return steps


def _resolve(guidance: Guidance, sigma: float) -> StepGuidance:
    index = _index(guidance.guidance_timesteps, sigma)

    def at(scale: PerStep) -> float:
        return scale[index] if isinstance(scale, tuple) else scale

    return StepGuidance(
        guidance_scale=at(guidance.guidance_scale),
        stg_scale=at(guidance.stg_scale),
        rescaling_scale=at(guidance.rescaling_scale),
        skip_blocks=_blocks(guidance.skip_block_list, index),
        cfg_star_rescale=guidance.cfg_star_rescale,
    )


def _index(timesteps: Sequence[float] | None, sigma: float) -> int:
    """Compared in single precision, so that the list's 0.985 meets the schedule's own 0.985."""
    here = np.float32(sigma)
    below = (i for i, t in enumerate(timesteps or ()) if np.float32(t) <= here)
    return next(below, -1)


def _blocks(skip: Blocks | tuple[Blocks, ...] | None, index: int) -> Blocks:
    nested = _nested(skip)
    return nested[index] if nested else tuple(b for b in skip or () if isinstance(b, int))


def _nested(skip: Blocks | tuple[Blocks, ...] | None) -> tuple[Blocks, ...]:
    return tuple(entry for entry in skip or () if isinstance(entry, tuple))


def _check_lengths(guidance: Guidance) -> None:
    """Every list is as long as the guidance timesteps, and there are some if there is a list."""
    lists: dict[str, int] = {
        name: len(value)
        for name, value in (
            ("guidance_scale", guidance.guidance_scale),
            ("stg_scale", guidance.stg_scale),
            ("rescaling_scale", guidance.rescaling_scale),
        )
        if isinstance(value, tuple)
    }
    if nested := _nested(guidance.skip_block_list):
        lists["skip_block_list"] = len(nested)
    for name, length in lists.items():
        if not guidance.guidance_timesteps:
            raise UserError(f"{name} is a list; say with guidance_timesteps where its entries hold")
        if length != len(guidance.guidance_timesteps):
            raise UserError(
                f"{name} has {length} entries, guidance_timesteps has "
                f"{len(guidance.guidance_timesteps)}; make them equal"
            )


def _projection(text: Floats, uncond: Floats) -> float:
    """How much of `uncond` there is in `text` (CFG-star)."""
    flat, other = text.astype(np.float64).ravel(), uncond.astype(np.float64).ravel()
    return float(flat @ other / (other @ other + 1e-8))


def _deviation(velocity: Floats) -> float:
    return float(np.std(velocity, dtype=np.float64, ddof=1))
