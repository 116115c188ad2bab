"""From noise to clean latents: which noise levels are visited, and how to step between them.

A sigma is the share of noise, from 1 to 0: latents = (1 - sigma) clean + sigma noise, and the
velocity is noise - clean. Schedules: Lightricks/LTX-Video `schedulers/rf.py`, computed in float32
as there, so that each sigma has the value the model was trained and distilled with.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from ltx_ref.ltx_video.config import SchedulerConfig

Sampler = Literal["euler", "stochastic", "dpmpp_2m", "ddim"]

THRESHOLD = 0.025
"""Noise removed by the linear half of the linear-quadratic schedule."""

STEP_EPS = 1e-6
"""Levels nearer than this are one level: the original never steps between them."""


class Denoiser(Protocol):
    """Anything that predicts velocity: the guided model, an engine, a test's formula."""

    def __call__(self, latents: Tensor, sigma: float) -> Tensor: ...


def schedule(config: SchedulerConfig, steps: int, tokens: int) -> tuple[float, ...]:
    """The falling sigmas at which the model is asked, without the 0 at the end.

    `tokens`: of the latent grid; longer clips spend more steps on high noise where the
    checkpoint's schedule is shifted.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    steps = min(steps, config.num_train_timesteps)
    uniform = torch.linspace(1, 1 / steps, steps)
    match config.sampler:
        case "Uniform":
            sigmas = uniform
        case "LinearQuadratic":
            sigmas = linear_quadratic(steps)
        case "Constant":
            if config.shift is None:
                raise ValueError("the Constant schedule needs a shift")
            sigmas = shift_towards_noise(uniform, config.shift)
        case unknown:
            raise ValueError(f"unknown schedule {unknown!r}")
    return tuple(_shift(sigmas, config, tokens).tolist())


def linear_quadratic(steps: int) -> Tensor:
    """Half of the steps fall evenly by THRESHOLD in all, the others ever faster, without a kink."""
    if steps == 1:
        return torch.ones(1)
    linear = steps // 2
    rest = steps - linear
    slope = THRESHOLD / linear
    square = (linear - THRESHOLD * steps) / (linear * rest**2)
    fallen = [slope * i for i in range(linear)]
    # b = slope - 2 L a and c = a L^2: value and slope agree with the line at i = L.
    tilt = slope - 2 * (linear - THRESHOLD * steps) / rest**2
    fallen += [square * i**2 + tilt * i + square * linear**2 for i in range(linear, steps)]
    return torch.tensor([1.0 - value for value in fallen])


def _shift(sigmas: Tensor, config: SchedulerConfig, tokens: int) -> Tensor:
    match config.shifting:
        case None:
            return sigmas
        case "SD3":
            shifted = shift_towards_noise(sigmas, normal_shift(tokens))
            terminal = config.target_shift_terminal
            return shifted if terminal is None else stretch(shifted, terminal)
        case "SimpleDiffusion":
            if config.base_resolution is None:
                raise ValueError("the SimpleDiffusion shift needs a base_resolution")
            snr = (sigmas / (1 - sigmas)) ** 2
            return torch.sigmoid(
                0.5 * (torch.log(snr) + 2 * math.log(tokens / config.base_resolution))
            )
        case unknown:
            raise ValueError(f"unknown shift {unknown!r}")


def normal_shift(tokens: int) -> float:
    """The line through (1024 tokens, 0.95) and (4096 tokens, 2.05), not clamped."""
    slope = (2.05 - 0.95) / (4096 - 1024)
    return slope * tokens + (0.95 - slope * 1024)


def shift_towards_noise(sigmas: Tensor, mu: float) -> Tensor:
    return math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))


def stretch(sigmas: Tensor, terminal: float) -> Tensor:
    """Scale the distances from 1 so that the last sigma is `terminal`."""
    if not 0 < terminal < 1:
        raise ValueError(f"target_shift_terminal must be between 0 and 1, not {terminal}")
    fallen = 1 - sigmas
    if fallen[-1] == 0:
        raise ValueError("one step from 1 cannot end at a terminal; take at least two")
    return 1 - fallen / (fallen[-1] / (1 - terminal))


def explicit(sigmas: Sequence[float]) -> tuple[float, ...]:
    """A schedule given by hand, as the distilled checkpoints have it."""
    rounded = tuple(single(sigma) for sigma in sigmas)
    falls = all(lower < sigma - STEP_EPS for sigma, lower in pairwise((*rounded, 0.0)))
    if not rounded or rounded[0] > 1 or not falls:
        raise ValueError(f"timesteps must fall from at most 1 to above 0, not {list(sigmas)}")
    return rounded


def skip(sigmas: Sequence[float], *, initial: int = 0, final: int = 0) -> tuple[float, ...]:
    """Leave out levels at either end; what was the last step then jumps to 0."""
    if initial < 0 or final < 0 or initial + final >= len(sigmas):
        raise ValueError(f"cannot skip {initial} initial and {final} final of {len(sigmas)} steps")
    return tuple(sigmas[initial : len(sigmas) - final])


def check_allowed(sigmas: Sequence[float], allowed: Sequence[float] | None) -> None:
    """Distilled checkpoints know a few levels only; four decimals count."""
    if allowed is None:
        return
    for sigma in (round(value, 4) for value in sigmas):
        if sigma not in allowed:
            raise ValueError(f"timestep {sigma} is not one this checkpoint knows: {list(allowed)}")


def single(value: float) -> float:
    """The nearest float32."""
    return float(torch.tensor(value, dtype=torch.float32))


def euler(model: Denoiser, latents: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Yield the latents after each step. Sigmas fall to the 0 of clean latents, which is given."""
    for sigma, lower in pairwise(sigmas):
        latents = latents + (lower - sigma) * model(latents, sigma)
        yield latents


def stochastic(
    model: Denoiser, latents: Tensor, sigmas: Sequence[float], draw: Callable[[], Tensor]
) -> Iterator[Tensor]:
    """Jump to the clean estimate, then add fresh noise for the next level; few-step models.

    Noise is drawn on the last step too, where its share is 0, as the original does.
    """
    for sigma, lower in pairwise(sigmas):
        clean = latents - sigma * model(latents, sigma)
        latents = (1 - lower) * clean + lower * draw()
        yield latents


def ddim(model: Denoiser, latents: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Estimate clean latents and noise, mix them anew (eta 0). In exact arithmetic this is euler:
    on a straight path the two estimates span the line that euler walks along."""
    for sigma, lower in pairwise(sigmas):
        velocity = model(latents, sigma)
        clean, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
        latents = (1 - lower) * clean + lower * noise
        yield latents


def dpmpp_2m(model: Denoiser, latents: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """DPM-Solver++(2M), arXiv 2211.01095 algorithm 2, with alpha = 1 - sigma.

    The clean estimate is extrapolated in lambda = log(alpha / sigma) from this and the previous
    one. Next to sigma 1 or 0 lambda is infinite, and the step is of first order.
    """
    before: tuple[Tensor, float] | None = None  # the last clean estimate, and its lambda
    for sigma, lower in pairwise(sigmas):
        clean = latents - sigma * model(latents, sigma)
        here, there = log_snr(sigma), log_snr(lower)
        target = clean
        if before is not None and math.isfinite(before[1]) and math.isfinite(there):
            ratio = (here - before[1]) / (there - here)
            target = clean + (clean - before[0]) / (2 * ratio)
        # exp(-h) = alpha_here sigma_there / (sigma_here alpha_there), so alpha_there cancels.
        latents = lower / sigma * latents + (1 - lower - (1 - sigma) * lower / sigma) * target
        before = clean, here
        yield latents


def log_snr(sigma: float) -> float:
    """lambda of a level: -inf for noise, +inf for clean latents."""
    if sigma >= 1:
        return -math.inf
    return math.inf if sigma <= 0 else math.log((1 - sigma) / sigma)
