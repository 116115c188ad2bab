"""Which noise levels a run visits: from a checkpoint's scheduler, a forced one or a list.

A schedule falls from 1 (noise) and ends with 0 (clean). The formulas are computed in double
precision and rounded once to single, where the original keeps its timesteps: the guidance mapping
and the list of allowed steps compare there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from typing import Literal

import numpy as np

from ltx_engines.bundle import SchedulerFacts
from ltx_engines.errors import UserError

Source = Literal["from_checkpoint", "uniform", "linear-quadratic"]

SOURCES: tuple[Source, ...] = ("from_checkpoint", "uniform", "linear-quadratic")

CLOSEST = 1e-6
"""Two timesteps nearer than this are one to the original scheduler."""

THRESHOLD = 0.025
"""How far the linear half of the linear-quadratic schedule comes from pure noise."""

SMALL, LARGE = (1024, 0.95), (4096, 2.05)
"""Tokens and shift: the line through these two gives the resolution-dependent shift."""


@dataclass(frozen=True, slots=True)
class Steps:
    """How a run walks down. `timesteps` names the noise levels outright; the rest is for none."""

    num_inference_steps: int = 40
    timesteps: tuple[float, ...] | None = None
    skip_initial: int = 0
    skip_final: int = 0
    source: Source = "from_checkpoint"

    @property
    def count(self) -> int:
        """Of the steps that are made."""
        if self.timesteps is not None:
            return len(self.timesteps)
        return self.num_inference_steps - self.skip_initial - self.skip_final


def sigmas(steps: Steps, facts: SchedulerFacts, tokens: int) -> tuple[float, ...]:
    """The noise levels of a clip of `tokens` tokens, with the 0 at their end."""
    if steps.timesteps is not None:
        if steps.skip_initial or steps.skip_final:
            raise UserError("timesteps name every step; skip none of them, shorten the list")
        levels = _explicit(steps.timesteps)
    else:
        levels = _computed(steps, _scheduler(steps.source, facts), tokens)
    return (*levels, 0.0)


def check_allowed(sigmas: Sequence[float], allowed: Sequence[float] | None) -> None:
    """A distilled checkpoint knows some noise levels only, written with four decimals."""
    if allowed is None:
        return
    for sigma in sigmas[:-1]:
        if round(sigma, 4) not in allowed:
            known = ", ".join(f"{level:g}" for level in allowed)
            raise UserError(
                f"this distilled checkpoint has not learned timestep {sigma:.4f}, only {known}; "
                "use its own number of steps or choose timesteps among these"
            )


def _scheduler(source: Source, facts: SchedulerFacts) -> SchedulerFacts:
    if source == "from_checkpoint":
        return facts
    sampler: Literal["Uniform", "LinearQuadratic"]
    sampler = "Uniform" if source == "uniform" else "LinearQuadratic"
    return SchedulerFacts(sampler=sampler, num_train_timesteps=facts.num_train_timesteps)


def _explicit(timesteps: Sequence[float]) -> list[float]:
    levels = _single(timesteps)
    if not levels or not all(0 < level <= 1 for level in levels):
        raise UserError(f"timesteps must lie above 0 and not above 1, got {list(timesteps)}")
    for level, lower in pairwise(levels):
        if lower >= level - CLOSEST:
            raise UserError(f"timesteps must fall, but {lower:g} follows {level:g}")
    return levels


def _computed(steps: Steps, facts: SchedulerFacts, tokens: int) -> list[float]:
    count, most = steps.num_inference_steps, facts.num_train_timesteps
    if not 1 <= count <= most:
        raise UserError(f"num_inference_steps must be from 1 to {most}, not {count}")
    if steps.skip_initial < 0 or steps.skip_final < 0:
        raise UserError("skipped inference steps must not be negative")
    if steps.skip_initial + steps.skip_final >= count:
        raise UserError(
            f"{steps.skip_initial} initial and {steps.skip_final} final steps are skipped, "
            f"which leaves none of {count}; skip fewer"
        )
    levels = _single(_shifted(_initial(count, facts), facts, tokens))
    return levels[steps.skip_initial : count - steps.skip_final]


def _initial(count: int, facts: SchedulerFacts) -> list[float]:
    if facts.sampler == "LinearQuadratic":
        return _linear_quadratic(count)
    uniform = [1 - i / count for i in range(count)]
    if facts.sampler == "Uniform":
        return uniform
    if facts.shift is None:
        raise UserError("the checkpoint's scheduler is Constant but names no shift")
    return [_time_shift(facts.shift, level) for level in uniform]


def _linear_quadratic(count: int) -> list[float]:
    """Half of the steps creep linearly to 1 - THRESHOLD, the others go down a parabola.

    The parabola continues value and slope of the line and would reach 0 at step `count`.
    """
    if count == 1:
        return [1.0]
    linear = count // 2
    rest = count - linear
    slope = THRESHOLD / linear
    curve = (1 - THRESHOLD - slope * rest) / rest**2

    def level(i: int) -> float:
        past = max(0, i - linear)
        return 1 - slope * i - curve * past**2

    return [level(i) for i in range(count)]


def _shifted(levels: list[float], facts: SchedulerFacts, tokens: int) -> list[float]:
    if facts.shifting == "SD3":
        (few, low), (many, high) = SMALL, LARGE
        shift = low + (high - low) / (many - few) * (tokens - few)
        moved = [_time_shift(shift, level) for level in levels]
        return _stretched(moved, facts.target_shift_terminal)
    if facts.shifting == "SimpleDiffusion":
        # The square root of the signal-to-noise ratio is divided by tokens / base_resolution.
        if facts.base_resolution is None:
            raise UserError("the checkpoint's scheduler shifts but names no base_resolution")
        ratio = facts.base_resolution / tokens
        return [level / (level + (1 - level) * ratio) for level in levels]
    return levels


def _time_shift(shift: float, level: float) -> float:
    return exp(shift) / (exp(shift) + 1 / level - 1)


def _stretched(levels: list[float], terminal: float | None) -> list[float]:
    """Scale the distances from 1 so that the last level is `terminal`."""
    if terminal is None or levels[-1] == 1:  # a single step has no distance to scale
        return levels
    if not 0 < terminal < 1:
        raise UserError(f"target_shift_terminal must lie between 0 and 1, not {terminal}")
    scale = (1 - terminal) / (1 - levels[-1])
    return [1 - (1 - level) * scale for level in levels]


def _single(levels: Sequence[float]) -> list[float]:
    return [float(np.float32(level)) for level in levels]
