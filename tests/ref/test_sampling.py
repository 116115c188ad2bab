"""Schedules against the original's scheduler; samplers against the laws of a straight path."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ltx_ref.ltx_video.config import SchedulerConfig
from ltx_ref.ltx_video.sampling import (
    Denoiser,
    check_allowed,
    ddim,
    dpmpp_2m,
    euler,
    explicit,
    linear_quadratic,
    schedule,
    skip,
    stochastic,
)
from tests.ref.oracles import ORIGINAL_MISSING, normals

DISTILLED = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219)
"""allowed_inference_steps of the distilled checkpoints, LinearQuadratic(8) to four decimals."""

CONFIGS = {
    "uniform": SchedulerConfig(),
    "linear-quadratic": SchedulerConfig(sampler="LinearQuadratic"),
    "constant": SchedulerConfig(sampler="Constant", shift=1.3),
    "sd3": SchedulerConfig(shifting="SD3"),
    "sd3 to a terminal": SchedulerConfig(shifting="SD3", target_shift_terminal=0.1),
    "simple diffusion": SchedulerConfig(shifting="SimpleDiffusion", base_resolution=512),
    "shifted linear-quadratic": SchedulerConfig(sampler="LinearQuadratic", shifting="SD3"),
}

Walk = Callable[[Denoiser, Tensor, Sequence[float]], Iterator[Tensor]]


def with_noise_of_its_own(
    model: Denoiser, latents: Tensor, sigmas: Sequence[float]
) -> Iterator[Tensor]:
    return stochastic(model, latents, sigmas, lambda: torch.randn_like(latents))


WALKS: dict[str, Walk] = {
    "euler": euler,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "stochastic": with_noise_of_its_own,
}


def scheduler(config: SchedulerConfig) -> Any:
    rf = pytest.importorskip("ltx_video.schedulers.rf", reason=ORIGINAL_MISSING)
    return rf.RectifiedFlowScheduler(
        num_train_timesteps=config.num_train_timesteps,
        shifting=config.shifting,
        base_resolution=config.base_resolution,
        target_shift_terminal=config.target_shift_terminal,
        sampler=config.sampler,
        shift=config.shift,
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 20, 30, 40, 1200])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_schedule_is_the_originals_to_the_last_bit(name: str, steps: int) -> None:
    config = CONFIGS[name]
    if config.target_shift_terminal is not None and steps == 1:
        with pytest.raises(ValueError, match="at least two"):  # the original gives 0 / 0
            schedule(config, steps, tokens=1000)
        return
    for shape in ((1, 128, 4, 6, 8), (2, 128, 16, 22, 38)):
        oracle = scheduler(config)
        oracle.set_timesteps(steps, samples_shape=shape)
        tokens = shape[2] * shape[3] * shape[4]
        assert schedule(config, steps, tokens) == tuple(oracle.timesteps.tolist())


def test_eight_linear_quadratic_steps_are_the_distilled_list() -> None:
    sigmas = schedule(CONFIGS["linear-quadratic"], 8, tokens=1)
    assert tuple(round(sigma, 4) for sigma in sigmas) == DISTILLED
    check_allowed(sigmas, DISTILLED)
    with pytest.raises(ValueError, match=r"0\.9967"):
        check_allowed((1.0, 0.99833, 0.99667), (1.0, 0.9983))


def test_thirty_linear_quadratic_steps() -> None:
    """Values of the original, from the repository's notes on its schedule."""
    sigmas = [round(sigma, 4) for sigma in linear_quadratic(30).tolist()]
    assert sigmas[:3] == [1.0, 0.9983, 0.9967]
    assert sigmas[15:] == [
        *(0.975, 0.9691, 0.9548, 0.932, 0.9008, 0.8611, 0.813, 0.7564),
        *(0.6914, 0.618, 0.5361, 0.4458, 0.347, 0.2398, 0.1241),
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_schedule_falls_from_one_to_above_zero(name: str) -> None:
    sigmas = schedule(CONFIGS[name], 40, tokens=2000)
    assert 1 - 1e-7 < sigmas[0] <= 1
    assert all(lower < sigma for sigma, lower in pairwise((*sigmas, 0.0)))


def test_the_shifted_schedule_ends_at_its_terminal() -> None:
    assert schedule(CONFIGS["sd3 to a terminal"], 40, 4000)[-1] == pytest.approx(0.1, abs=1e-6)


def test_skipping_is_the_originals() -> None:
    pipeline = pytest.importorskip(
        "ltx_video.pipelines.pipeline_ltx_video", reason=ORIGINAL_MISSING
    )
    oracle = scheduler(CONFIGS["linear-quadratic"])
    wanted, count = pipeline.retrieve_timesteps(
        oracle, 30, skip_initial_inference_steps=17, skip_final_inference_steps=3
    )
    sigmas = skip(schedule(CONFIGS["linear-quadratic"], 30, tokens=1), initial=17, final=3)
    assert sigmas == tuple(wanted.tolist())
    assert count == len(sigmas) == 10


@pytest.mark.parametrize(("initial", "final"), [(-1, 0), (0, -1), (2, 2), (4, 0), (0, 5)])
def test_skipping_everything_is_refused(initial: int, final: int) -> None:
    with pytest.raises(ValueError, match="cannot skip"):
        skip((1.0, 0.7, 0.5, 0.2), initial=initial, final=final)


@pytest.mark.parametrize(
    "sigmas", [(), (1.1, 0.5), (1.0, 0.0), (1.0, 0.5, 0.5), (0.5, 0.7), (1.0, -0.1)]
)
def test_levels_that_do_not_fall_within_zero_and_one_are_refused(
    sigmas: tuple[float, ...],
) -> None:
    with pytest.raises(ValueError, match="must fall"):
        explicit(sigmas)


@pytest.mark.parametrize(
    "config",
    [
        SchedulerConfig(sampler="Cosine"),
        SchedulerConfig(sampler="Constant"),
        SchedulerConfig(shifting="Flux"),
        SchedulerConfig(shifting="SimpleDiffusion", base_resolution=None),
        SchedulerConfig(shifting="SD3", target_shift_terminal=1.5),
    ],
)
def test_a_schedule_that_is_not_known_is_refused(config: SchedulerConfig) -> None:
    with pytest.raises(ValueError, match=r"unknown|needs|between"):
        schedule(config, 4, tokens=10)


def test_a_schedule_has_at_least_one_step() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        schedule(SchedulerConfig(), 0, tokens=10)


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("sigmas", [(1.0, 0.0), (1.0, 0.7, 0.2, 0.0), (1.0, 0.999, 0.998, 0.0)])
def test_a_straight_path_lands_on_the_clean_latents_in_any_number_of_steps(
    name: str, sigmas: tuple[float, ...]
) -> None:
    """Whatever the latents are, the model knows the clean ones: v = (latents - clean) / sigma."""
    clean, noise = torch.full((1, 2, 3), 5.0), normals(1, 2, 3, seed=1)
    *_, last = WALKS[name](lambda latents, sigma: (latents - clean) / sigma, noise, sigmas)
    torch.testing.assert_close(last, clean)


@pytest.mark.parametrize("name", WALKS)
def test_a_sampler_yields_every_step_and_asks_at_every_level_but_zero(name: str) -> None:
    asked: list[float] = []

    def model(latents: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return torch.zeros_like(latents)

    sigmas = (1.0, 0.6, 0.3, 0.0)
    assert len(list(WALKS[name](model, torch.ones(1, 1, 1), sigmas))) == 3
    assert tuple(asked) == sigmas[:-1]


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m"])
def test_noise_free_samplers_stay_on_a_straight_path(name: str) -> None:
    clean, noise = normals(1, 4, 3, seed=2), normals(1, 4, 3, seed=3)
    sigmas = (1.0, 0.8, 0.55, 0.1, 0.0)

    def straight(latents: Tensor, sigma: float) -> Tensor:
        torch.testing.assert_close(latents, (1 - sigma) * clean + sigma * noise)
        return noise - clean

    path = WALKS[name](straight, noise, sigmas)
    for lower, latents in zip(sigmas[1:], path, strict=True):
        torch.testing.assert_close(latents, (1 - lower) * clean + lower * noise)


def curved(latents: Tensor, sigma: float) -> Tensor:
    """Velocity of data that are normal with deviation 0.5: the path is known in closed form."""
    return latents * (sigma - 0.25 * (1 - sigma)) / (sigma**2 + 0.25 * (1 - sigma) ** 2)


def end_of_curve(noise: Tensor, sigma: float) -> Tensor:
    """Scale follows the marginal deviation: sqrt(sigma^2 + 0.25 (1 - sigma)^2)."""
    return noise * math.sqrt(sigma**2 + 0.25 * (1 - sigma) ** 2)


def error(walk: Walk, steps: int, last: float = 0.02) -> float:
    noise = torch.ones(1, 1, 1, dtype=torch.float64)
    sigmas = torch.linspace(1, last, steps + 1, dtype=torch.float64).tolist()
    *_, end = walk(curved, noise, sigmas)
    return float((end - end_of_curve(noise, last)).abs())


def test_ddim_is_euler() -> None:
    noise = normals(1, 4, 3, seed=4)
    sigmas = (1.0, 0.9, 0.4, 0.0)
    for a, b in zip(euler(curved, noise, sigmas), ddim(curved, noise, sigmas), strict=True):
        torch.testing.assert_close(a, b)


def test_halving_the_step_halves_eulers_error_and_quarters_dpmpp_2ms() -> None:
    """Orders of convergence, where the path is curved."""
    assert 1.8 < error(euler, 40) / error(euler, 80) < 2.2
    assert 3.5 < error(dpmpp_2m, 40) / error(dpmpp_2m, 80) < 4.6
    assert error(dpmpp_2m, 20) < error(euler, 20)


def test_the_stochastic_sampler_mixes_the_estimate_with_fresh_noise() -> None:
    clean, fresh = normals(1, 4, 3, seed=5), normals(1, 4, 3, seed=6)
    start = normals(1, 4, 3, seed=7)

    def model(latents: Tensor, sigma: float) -> Tensor:
        return (latents - clean) / sigma

    first, last = stochastic(model, start, (1.0, 0.4, 0.0), lambda: fresh)
    torch.testing.assert_close(first, 0.6 * clean + 0.4 * fresh)
    torch.testing.assert_close(last, clean)


@pytest.mark.parametrize("noisy", [False, True])
def test_a_step_is_the_originals(noisy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = scheduler(CONFIGS["linear-quadratic"])
    oracle.set_timesteps(12, samples_shape=(1, 4, 1, 2, 2))
    fresh = normals(1, 4, 3, seed=8)
    monkeypatch.setattr(torch, "randn_like", lambda _: fresh)
    start = wanted = normals(1, 4, 3, seed=9)
    sigmas = (*oracle.timesteps.tolist(), 0.0)
    walk = (
        stochastic(curved, start, sigmas, lambda: fresh) if noisy else euler(curved, start, sigmas)
    )
    for time, latents in zip(oracle.timesteps, walk, strict=True):
        velocity = curved(wanted, float(time))
        step = oracle.step(velocity, time[None, None], wanted, stochastic_sampling=noisy)
        wanted = step.prev_sample
        torch.testing.assert_close(latents, wanted, rtol=0, atol=1e-6)
