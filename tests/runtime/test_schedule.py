"""Schedules against formulas written another way and against the original's scheduler."""

from itertools import pairwise
from math import exp, log
from typing import Any

import numpy as np
import pytest

from ltx_engines.bundle import SchedulerFacts
from ltx_engines.errors import UserError
from ltx_trt.schedule import Steps, check_allowed, sigmas

UNIFORM = SchedulerFacts()
QUADRATIC = SchedulerFacts(sampler="LinearQuadratic")
SD3 = SchedulerFacts(shifting="SD3", target_shift_terminal=0.1)

STEEP = SchedulerFacts(sampler="LinearQuadratic", shifting="SD3", target_shift_terminal=0.2)
"""Of no checkpoint; in single precision 1 - t cancels, so the original itself is off by 1e-5."""

ALL = [
    UNIFORM,
    QUADRATIC,
    SD3,
    SchedulerFacts(shifting="SD3"),
    STEEP,
    SchedulerFacts(sampler="Constant", shift=1.5),
    SchedulerFacts(shifting="SimpleDiffusion"),
]


def original(facts: SchedulerFacts, **arguments: Any) -> Any:
    rf = pytest.importorskip("ltx_video.schedulers.rf")
    scheduler = rf.RectifiedFlowScheduler(**facts.model_dump())
    scheduler.set_timesteps(**arguments)
    return scheduler.timesteps.numpy()


@pytest.mark.parametrize("facts", ALL)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 27, 40])
def test_every_schedule_falls_from_noise_to_clean(facts: SchedulerFacts, count: int) -> None:
    levels = sigmas(Steps(count), facts, tokens=5600)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert len(levels) == count + 1
    assert all(level > lower for level, lower in pairwise(levels))


@pytest.mark.parametrize("facts", [facts for facts in ALL if facts is not STEEP])
@pytest.mark.parametrize("grid", [(3, 10, 12), (16, 22, 38)])
@pytest.mark.parametrize("count", [8, 30, 40])
def test_levels_are_those_of_the_original_scheduler(
    facts: SchedulerFacts, grid: tuple[int, int, int], count: int
) -> None:
    expected = original(facts, num_inference_steps=count, samples_shape=(1, 128, *grid))
    found = sigmas(Steps(count), facts, tokens=int(np.prod(grid)))
    # The original computes in single precision, where 1 - t cancels near t = 1.
    np.testing.assert_allclose(found[:-1], expected, rtol=0, atol=3e-6)


def test_linear_quadratic_levels_are_the_originals_to_the_last_bit() -> None:
    for count in (4, 8, 20, 30, 40):
        expected = original(QUADRATIC, num_inference_steps=count)
        assert np.array_equal(sigmas(Steps(count), QUADRATIC, 1)[:-1], expected)


def test_eight_linear_quadratic_steps_are_the_distilled_list() -> None:
    found = [round(level, 4) for level in sigmas(Steps(8), QUADRATIC, 1)]
    assert found == [1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219, 0]


def test_the_parabola_continues_the_lines_slope_and_would_end_at_zero() -> None:
    count = 40
    levels = sigmas(Steps(count), QUADRATIC, 1)
    falls = [level - lower for level, lower in pairwise(levels)]
    assert falls[:20] == pytest.approx([0.025 / 20] * 20, abs=1e-6)
    bends = [after - before for before, after in pairwise(falls[20:])]
    assert bends == pytest.approx([bends[0]] * len(bends), abs=1e-6)


def test_the_sd3_shift_grows_with_the_clip_and_ends_at_the_terminal() -> None:
    for tokens, mu in ((1024, 0.95), (4096, 2.05), (2560, 1.5), (13376, 5.37291666)):
        plain = SchedulerFacts(shifting="SD3")
        half = sigmas(Steps(2), plain, tokens)[1]
        assert log(half / (1 - half)) == pytest.approx(mu, abs=1e-4)
        assert sigmas(Steps(20), SD3, tokens)[-2] == pytest.approx(0.1, abs=1e-6)


def test_the_constant_shift_moves_the_log_ratio() -> None:
    facts = SchedulerFacts(sampler="Constant", shift=0.7)
    levels = sigmas(Steps(4), facts, 1)
    for level, plain in zip(levels[1:-1], (0.75, 0.5, 0.25), strict=True):
        assert level == pytest.approx(exp(0.7) / (exp(0.7) + 1 / plain - 1), abs=1e-7)


def test_simple_diffusion_multiplies_the_noise_ratio_by_the_clips_size() -> None:
    level = sigmas(Steps(2), SchedulerFacts(shifting="SimpleDiffusion"), tokens=2048)[1]
    assert level / (1 - level) == pytest.approx(2)


def test_skipped_steps_leave_a_jump_to_clean() -> None:
    whole = sigmas(Steps(30), QUADRATIC, 1)
    assert sigmas(Steps(30, skip_final=3), QUADRATIC, 1) == (*whole[:27], 0)
    assert sigmas(Steps(30, skip_initial=17), QUADRATIC, 1) == whole[17:]


def test_explicit_timesteps_are_used_as_they_are() -> None:
    listed = (1.0, 0.9937, 0.725)
    found = sigmas(Steps(timesteps=listed), QUADRATIC, 1)
    assert found == (*(float(np.float32(level)) for level in listed), 0)


def test_a_forced_schedule_forgets_the_checkpoints_shift() -> None:
    for source, plain in (("uniform", UNIFORM), ("linear-quadratic", QUADRATIC)):
        steps = Steps(6, source=source)  # type: ignore[arg-type]
        assert sigmas(steps, SD3, 5600) == sigmas(Steps(6), plain, 1)


@pytest.mark.parametrize(
    ("steps", "facts", "words"),
    [
        (Steps(0), UNIFORM, "from 1 to 1000, not 0"),
        (Steps(1001), UNIFORM, "not 1001"),
        (Steps(5, skip_initial=2, skip_final=3), UNIFORM, "leaves none of 5"),
        (Steps(5, skip_initial=-1), UNIFORM, "negative"),
        (Steps(timesteps=()), UNIFORM, "above 0"),
        (Steps(timesteps=(1.0, 0.0)), UNIFORM, "above 0"),
        (Steps(timesteps=(1.2, 0.5)), UNIFORM, "above 0"),
        (Steps(timesteps=(0.5, float("nan"))), UNIFORM, "above 0"),
        (Steps(timesteps=(0.5, 0.7)), UNIFORM, "0.7 follows 0.5"),
        (Steps(timesteps=(0.5, 0.5)), UNIFORM, "must fall"),
        (Steps(timesteps=(0.5,), skip_final=1), UNIFORM, "shorten the list"),
        (Steps(4), SchedulerFacts(sampler="Constant"), "names no shift"),
        (Steps(4), SchedulerFacts(shifting="SD3", target_shift_terminal=1.5), "terminal"),
    ],
)
def test_impossible_schedules_are_refused(steps: Steps, facts: SchedulerFacts, words: str) -> None:
    with pytest.raises(UserError, match=words):
        sigmas(steps, facts, 100)


def test_a_distilled_checkpoint_refuses_steps_that_it_has_not_learned() -> None:
    allowed = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219)
    check_allowed(sigmas(Steps(timesteps=(1.0, 0.9094, 0.4219)), UNIFORM, 1), allowed)
    check_allowed(sigmas(Steps(40), UNIFORM, 1), None)
    with pytest.raises(UserError, match=r"0\.9750, only|0\.9500, only"):
        check_allowed(sigmas(Steps(20), UNIFORM, 1), allowed)
