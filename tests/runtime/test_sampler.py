"""What every sampler owes: laws of the straight path, and the original's step where it has one."""

from collections.abc import Callable
from math import exp, sqrt
from typing import Any

import numpy as np
import pytest

from ltx_trt.noise import Noise
from ltx_trt.sampler import SAMPLERS, Step, Table, ddim, dpmpp_2m, euler, stochastic, table

SCHEDULES = [(1.0, 0.0), (1.0, 0.7, 0.2, 0.0), (1.0, 0.99, 0.95, 0.5, 0.49, 0.0), (0.9, 0.3, 0.0)]

Array = Any
Velocity = Callable[[Array, float], Array]


def walk(steps: Table, start: Array, velocity: Velocity, seed: int = 0) -> Array:
    latents, previous, noise = start, None, Noise(seed)
    for step in steps:
        v = velocity(latents, step.sigma)
        fresh = None if step.noise is None else noise.normal(latents.shape)
        latents, previous = (
            step.apply(latents, v, previous=previous, noise=fresh),
            step.clean(latents, v),
        )
    return latents


def normal(seed: int, shape: tuple[int, ...] = (1, 6, 4)) -> Array:
    return Noise(seed).normal(shape)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", SCHEDULES)
def test_a_straight_path_lands_on_the_clean_latents_in_any_number_of_steps(
    name: str, sigmas: tuple[float, ...]
) -> None:
    clean, noise = normal(1), normal(2)
    start = (1 - np.float32(sigmas[0])) * clean + np.float32(sigmas[0]) * noise

    def toward(latents: Array, sigma: float) -> Array:  # holds wherever fresh noise leads
        return (latents - clean) / np.float32(sigma)

    assert np.allclose(walk(table(name, sigmas, eta=0.5), start, toward), clean, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_is_the_clean_estimate(name: str) -> None:
    step = table(name, (1.0, 0.6, 0.3, 0.0))[-1]
    latents, velocity = normal(1), normal(2)
    found = step.apply(latents, velocity, previous=normal(3), noise=normal(4))
    assert np.allclose(found, step.clean(latents, velocity), atol=1e-6)


def test_ddim_without_fresh_noise_is_euler() -> None:
    for sigmas in SCHEDULES:
        for one, other in zip(ddim(sigmas), euler(sigmas), strict=True):
            assert one.latents == pytest.approx(other.latents, abs=1e-15)
            assert one.velocity == pytest.approx(other.velocity, abs=1e-15)
            assert one.noise is None


def test_the_first_multistep_is_eulers() -> None:
    for sigmas in SCHEDULES:
        one, other = dpmpp_2m(sigmas)[0], euler(sigmas)[0]
        assert (one.latents, one.velocity) == pytest.approx((other.latents, other.velocity))
        assert one.previous == 0


def test_a_multistep_with_a_constant_clean_estimate_is_eulers() -> None:
    for one, other in zip(dpmpp_2m(SCHEDULES[2]), euler(SCHEDULES[2]), strict=True):
        latents, velocity = normal(1), normal(2)
        clean = one.clean(latents, velocity)
        expected = other.apply(latents, velocity)
        assert np.allclose(one.apply(latents, velocity, previous=clean), expected, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_noise_level_for_every_share_of_fresh_noise(eta: float) -> None:
    """With the true velocity, x = (1 - s) clean + s noise becomes the same at the lower level."""
    for step in ddim((1.0, 0.8, 0.35, 0.1, 0.0), eta):
        s, n = step.sigma, step.sigma_next
        on_clean = step.latents * (1 - s) - step.velocity
        on_noise = step.latents * s + step.velocity
        fresh = step.noise or 0.0
        assert on_clean == pytest.approx(1 - n)
        assert sqrt(on_noise**2 + fresh**2) == pytest.approx(n)


def test_full_ddim_is_the_ancestral_step_of_the_noise_ratio() -> None:
    step = ddim((0.8, 0.4, 0.0), 1.0)[0]
    ratio, lower = 0.8 / 0.2, 0.4 / 0.6
    fresh = lower * sqrt(ratio**2 - lower**2) / ratio
    assert step.noise == pytest.approx((1 - 0.4) * fresh)


def test_the_stochastic_step_keeps_the_noise_level_with_fresh_noise_only() -> None:
    for step in stochastic((1.0, 0.8, 0.35, 0.0)):
        assert step.latents * (1 - step.sigma) - step.velocity == pytest.approx(1 - step.sigma_next)
        assert step.latents * step.sigma + step.velocity == pytest.approx(0)
        assert step.noise == step.sigma_next


def curved(sigma: float) -> float:
    """A trajectory that starts at 0.3 for noise level 0.95; its model is exact below."""
    return exp(-2 * sigma) * (1 + sigma)


def error(make: Callable[[tuple[float, ...]], Table], count: int) -> float:
    """Between noise levels 0.95 and 0.05, in equal steps of log signal-to-noise.

    The clean estimate is x - s v with v = dx/ds along the curve.
    """
    logs = np.linspace(np.log(0.05 / 0.95), np.log(0.95 / 0.05), count + 1)
    sigmas = tuple(float(1 / (1 + np.exp(lam))) for lam in logs)

    def velocity(latents: Array, sigma: float) -> Array:
        slope = exp(-2 * sigma) - 2 * curved(sigma)
        return slope + 0.5 * (latents - curved(sigma))

    state, previous = curved(sigmas[0]), 0.0
    for step in make(sigmas):
        v = velocity(state, step.sigma)
        moved = step.latents * state + step.velocity * v + step.previous * previous
        state, previous = moved, state - step.sigma * v
    return float(abs(state - curved(sigmas[-1])))


def test_the_multistep_sampler_is_of_second_order_and_beats_euler() -> None:
    assert error(dpmpp_2m, 40) < error(euler, 40) / 5
    assert error(euler, 80) == pytest.approx(error(euler, 160) * 2, rel=0.15)
    assert error(dpmpp_2m, 80) == pytest.approx(error(dpmpp_2m, 160) * 4, rel=0.25)


@pytest.mark.parametrize("name", ["euler", "stochastic"])
def test_steps_are_those_of_the_original_scheduler(name: str) -> None:
    rf = pytest.importorskip("ltx_video.schedulers.rf")
    torch = pytest.importorskip("torch")
    levels = [1.0, 0.9937, 0.975, 0.725, 0.4219]
    scheduler = rf.RectifiedFlowScheduler()
    scheduler.set_timesteps(timesteps=levels)
    latents, noise = normal(5), Noise(11)
    for index, step in enumerate(table(name, [*levels, 0.0])):
        velocity = normal(20 + index)
        torch.manual_seed(11)
        for _ in range(index if step.noise is not None else 0):
            torch.randn(latents.shape)
        expected = scheduler.step(
            torch.from_numpy(velocity),
            torch.tensor([[levels[index]]]),
            torch.from_numpy(latents),
            return_dict=False,
            stochastic_sampling=name == "stochastic",
        )[0].numpy()
        fresh = None if step.noise is None else noise.normal(latents.shape)
        latents = step.apply(latents, velocity, noise=fresh)
        np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-6)


def test_a_step_that_needs_a_tensor_says_so() -> None:
    with pytest.raises(ValueError, match="not given"):
        Step(0.5, 0.2, 1.0, -0.3, noise=0.1).apply(normal(1), normal(2))


def test_ddim_refuses_more_than_all_the_noise() -> None:
    with pytest.raises(ValueError, match="eta"):
        ddim((1.0, 0.0), 1.5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", SCHEDULES)
def test_samplers_walk_as_the_reference_does(name: str, sigmas: tuple[float, ...]) -> None:
    torch = pytest.importorskip("torch")
    from ltx_ref.ltx_video import sampling

    def bent(latents: Array, sigma: float) -> Array:
        return latents * sigma - latents * latents / 4 + 0.2

    start, noise = normal(8), Noise(0)
    draw = (lambda: torch.from_numpy(noise.normal(start.shape)),) if name == "stochastic" else ()
    reference = getattr(sampling, name.replace("-", "_"))
    *_, expected = reference(bent, torch.from_numpy(start), sigmas, *draw)
    np.testing.assert_allclose(walk(table(name, sigmas), start, bent), expected, atol=2e-5)
