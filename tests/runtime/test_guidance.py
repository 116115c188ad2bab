"""Guidance: the laws of the branches, the 13B table, and the arithmetic in double precision."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ltx_engines.bundle import SchedulerFacts
from ltx_engines.errors import UserError
from ltx_trt.guidance import Guidance, StepGuidance, plan
from ltx_trt.noise import Noise
from ltx_trt.schedule import Steps, sigmas

DEV_13B = Guidance(
    guidance_scale=(1, 1, 6, 8, 6, 1, 1),
    stg_scale=(0, 0, 4, 4, 4, 2, 1),
    rescaling_scale=(1, 1, 0.5, 0.5, 1, 1, 1),
    guidance_timesteps=(1.0, 0.996, 0.9933, 0.9850, 0.9767, 0.9008, 0.6180),
    skip_block_list=((), (11, 25, 35, 39), (22, 35, 39), (28,), (28,), (28,), (28,)),
    cfg_star_rescale=True,
)


def velocities(count: int) -> Any:
    return Noise(count).normal((count, 50, 8)) + np.float32(0.3)


def test_the_first_pass_of_13b_dev_resolves_as_in_the_original() -> None:
    """The configuration is the original's; the table was read off a run of it."""
    levels = sigmas(Steps(30, skip_final=3), SchedulerFacts(sampler="LinearQuadratic"), 5600)
    steps = plan(DEV_13B, levels, num_layers=48)
    expected = {
        range(3): (1, 0, 1, None),
        range(3, 5): (6, 4, 0.5, (22, 35, 39)),
        range(5, 10): (8, 4, 0.5, (28,)),
        range(10, 14): (6, 4, 1, (28,)),
        range(14, 19): (1, 2, 1, (28,)),
        range(19, 27): (1, 1, 1, (28,)),
    }
    assert len(steps) == 27
    for indices, (scale, stg, rescale, blocks) in expected.items():
        for index in indices:
            step = steps[index]
            assert (step.guidance_scale, step.stg_scale, step.rescaling_scale) == (
                scale,
                stg,
                rescale,
            )
            assert blocks is None or step.skip_blocks == blocks
    assert [len(step.branches) for step in steps] == [1] * 3 + [3] * 11 + [2] * 13


def test_a_level_below_all_guidance_timesteps_takes_the_last_entry() -> None:
    guidance = Guidance((3.0,), (0.0,), (1.0,), (27,), (1.0,))
    assert [s.guidance_scale for s in plan(guidance, (0.9, 0.5, 0.0), 28)] == [3, 3]


def test_guidance_of_a_larger_model_is_refused_with_what_to_do() -> None:
    larger = Guidance(3.0, 1.0, 0.7, (19,))
    with pytest.raises(UserError, match=r"^skip_block_list names block 19, .* 0 to 5; choose .*"):
        plan(larger, (1.0, 0.0), 6)
    assert plan(replace(larger, stg_scale=0.0), (1.0, 0.0), 6)[0].branches  # what it advises


def test_the_mapping_is_the_originals() -> None:
    torch = pytest.importorskip("torch")
    levels = sigmas(Steps(30), SchedulerFacts(sampler="LinearQuadratic"), 1)
    times = DEV_13B.guidance_timesteps
    assert times is not None
    scales = tuple(float(i + 2) for i in range(len(times)))
    steps = plan(Guidance(scales, 0.0, 1.0, None, times), levels, 48)
    for level, step in zip(torch.tensor(levels[:-1]), steps, strict=True):
        below = [i for i, value in enumerate(times) if value <= level]
        assert step.guidance_scale == scales[below[0] if below else -1]


@pytest.mark.parametrize(
    ("scale", "stg", "blocks", "branches"),
    [
        (1.0, 0.0, (1,), ("text",)),
        (0.5, 0.0, (), ("text",)),
        (3.0, 0.0, (1,), ("uncond", "text")),
        (1.0, 1.0, (1,), ("text", "perturbed")),
        (3.0, 1.0, (1,), ("uncond", "text", "perturbed")),
        (3.0, 1.0, (), ("uncond", "text")),
    ],
)
def test_only_needed_branches_run(
    scale: float, stg: float, blocks: tuple[int, ...], branches: tuple[str, ...]
) -> None:
    assert StepGuidance(scale, stg, 1.0, blocks).branches == branches


def test_without_guidance_the_text_branch_passes_unchanged() -> None:
    v = velocities(1)
    assert np.array_equal(StepGuidance(1.0, 0.0, 0.7).combine(v), v)


def test_scale_one_would_be_the_text_branch_and_more_leads_away_from_uncond() -> None:
    v = velocities(2)
    found = StepGuidance(3.0, 0.0, 0.7).combine(v)
    assert np.allclose(found, v[:1] + 3 * (v[1:] - v[:1]), atol=1e-6)


def test_an_equal_perturbed_branch_changes_nothing_but_the_rescaling() -> None:
    v = velocities(1)
    both = np.concatenate([v, v])
    assert np.allclose(StepGuidance(1.0, 4.0, 0.5, (1,)).combine(both), v, atol=1e-6)


@pytest.mark.parametrize("star", [False, True])
@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("stg", [0.0, 4.0])
@pytest.mark.parametrize("rescaling", [1.0, 0.5])
def test_the_arithmetic_is_the_originals(
    star: bool, scale: float, stg: float, rescaling: float
) -> None:
    step = StepGuidance(scale, stg, rescaling, (1,), star)
    v = velocities(len(step.branches))
    exact = dict(zip(step.branches, v.astype(np.float64), strict=True))
    text = exact["text"]
    expected = text
    if scale > 1:
        uncond = exact["uncond"]
        if star:
            uncond = (text * uncond).sum() / ((uncond**2).sum() + 1e-8) * uncond
        expected = uncond + scale * (text - uncond)
    if stg > 0:
        expected = expected + stg * (text - exact["perturbed"])
        factor = text.std(ddof=1) / expected.std(ddof=1)
        expected = expected * (rescaling * factor + (1 - rescaling) if rescaling != 1 else 1)
    found = step.combine(v)
    assert found.dtype == np.float32
    assert found.shape == (1, 50, 8)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def test_full_rescaling_gives_the_guided_velocity_the_texts_deviation() -> None:
    v = velocities(3)
    strong = StepGuidance(8.0, 4.0, 0.99999, (1,)).combine(v)
    assert strong.std() == pytest.approx(v[1].std(), rel=1e-3)


def test_cfg_star_on_parallel_branches_is_no_guidance() -> None:
    v = velocities(1)
    both = np.concatenate([v * np.float32(0.25), v])
    assert np.allclose(StepGuidance(7.0, 0.0, 1.0, (), True).combine(both), v, atol=1e-5)


def test_the_mask_skips_blocks_of_the_last_branch_only() -> None:
    mask = StepGuidance(3.0, 1.0, 1.0, (0, 2)).skip_layer_mask(4)
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert StepGuidance(3.0, 0.0, 1.0, (0, 2)).skip_layer_mask(4).tolist() == [[1, 1]] * 4


def test_the_mask_is_the_originals() -> None:
    module = pytest.importorskip("ltx_video.models.transformers.transformer3d")
    torch = pytest.importorskip("torch")

    class Blocks:
        transformer_blocks = range(5)
        device, dtype = torch.device("cpu"), torch.float32

    expected = module.Transformer3DModel.create_skip_layer_mask(Blocks(), 1, 3, 2, [1, 4])
    found = StepGuidance(3.0, 1.0, 1.0, (1, 4)).skip_layer_mask(5)
    assert np.array_equal(found, expected.numpy())


def test_blocks_that_do_not_exist_matter_only_where_they_would_be_skipped() -> None:
    plan(Guidance(1.0, 0.0, 1.0, (42,)), (1.0, 0.0), 28)
    for block in (42, -1):
        with pytest.raises(UserError, match=f"block {block}.* 0 to 27"):
            plan(Guidance(1.0, 1.0, 1.0, (block,)), (1.0, 0.0), 28)


def test_lists_need_guidance_timesteps_of_their_length() -> None:
    with pytest.raises(UserError, match="stg_scale is a list"):
        plan(Guidance(3.0, (1.0, 0.0)), (1.0, 0.0), 28)
    with pytest.raises(UserError, match="guidance_scale has 2 entries"):
        plan(Guidance((3.0, 1.0), guidance_timesteps=(1.0,)), (1.0, 0.0), 28)
    with pytest.raises(UserError, match="skip_block_list has 2 entries"):
        plan(Guidance(skip_block_list=((1,), ()), guidance_timesteps=(1.0,)), (1.0, 0.0), 28)
