"""Laws of guidance, and the per-step lists of the original's configuration files."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ltx_ref.ltx_video.config import SchedulerConfig
from ltx_ref.ltx_video.guidance import (
    Guidance,
    GuidedDenoiser,
    Prompts,
    StepGuidance,
    combine,
    projection,
    spread,
)
from ltx_ref.ltx_video.sampling import schedule, skip
from ltx_ref.ltx_video.transformer import StgMode
from tests.ref.oracles import normals

POSITIVE, NEGATIVE, PERTURBED = (normals(2, 5, 4, seed=seed) for seed in (1, 2, 3))

# First pass of the original's configs/ltxv-13b-0.9.8-dev.yaml.
DEV = Guidance(
    guidance_scale=(1, 1, 6, 8, 6, 1, 1),
    stg_scale=(0, 0, 4, 4, 4, 2, 1),
    rescaling_scale=(1, 1, 0.5, 0.5, 1, 1, 1),
    skip_block_list=((), (11, 25, 35, 39), (22, 35, 39), (28,), (28,), (28,), (28,)),
    guidance_timesteps=(1.0, 0.996, 0.9933, 0.9850, 0.9767, 0.9008, 0.6180),
    cfg_star_rescale=True,
)


def test_the_dev_models_table_resolves_as_in_the_original() -> None:
    """27 steps; (guidance, STG, rescaling, blocks) as the original prints them."""
    full = schedule(SchedulerConfig(sampler="LinearQuadratic"), 30, tokens=1)
    found = [
        (step.guidance_scale, step.stg_scale, step.rescaling_scale, step.skip_blocks)
        for step in map(DEV.at, skip(full, final=3))
    ]
    assert found == [
        (1, 0, 1, ()),
        *[(1, 0, 1, (11, 25, 35, 39))] * 2,
        *[(6, 4, 0.5, (22, 35, 39))] * 2,
        *[(8, 4, 0.5, (28,))] * 5,
        *[(6, 4, 1, (28,))] * 4,
        *[(1, 2, 1, (28,))] * 5,
        *[(1, 1, 1, (28,))] * 8,
    ]


def test_a_level_below_all_guidance_timesteps_takes_the_last_entry() -> None:
    guidance = Guidance((5.0,), (1.0,), (1.0,), (27,), guidance_timesteps=(1.0,))
    assert guidance.at(0.5) == StepGuidance(5.0, 1.0, 1.0, (27,))


def test_scalars_hold_for_all_steps() -> None:
    guidance = Guidance(skip_block_list=(19,))
    assert guidance.at(1.0) == guidance.at(0.01) == StepGuidance(3.0, 1.0, 0.7, (19,))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"guidance_scale": (1.0, 2.0)}, "needs guidance_timesteps"),
        ({"skip_block_list": ((1,), (2,))}, "needs guidance_timesteps"),
        ({"stg_scale": (1.0, 2.0), "guidance_timesteps": (1.0,)}, "2 entries"),
        ({"skip_block_list": ((1,),), "guidance_timesteps": (1.0, 0.5)}, "1 entries"),
        ({"guidance_timesteps": ()}, "empty"),
    ],
)
def test_lists_that_do_not_fit_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**wrong)


def test_blocks_and_lists_of_blocks_do_not_mix() -> None:
    mixed: Any = (1, (2,))
    with pytest.raises(ValueError, match="mixes"):
        Guidance(skip_block_list=mixed, guidance_timesteps=(1.0, 0.5))


def step(cfg: float = 1.0, stg: float = 0.0, rescale: float = 1.0) -> StepGuidance:
    return StepGuidance(cfg, stg, rescale, ())


def test_guidance_is_off_at_scale_one_and_zero() -> None:
    assert not step(1.0, 0.0, 0.7).uses_cfg
    assert not step(1.0, 0.0, 0.7).uses_stg
    assert not step(3.0, 0.0, 0.7).uses_rescaling
    assert step(3.0, 1.0, 0.7).uses_rescaling
    assert combine(POSITIVE, None, None, step()) is POSITIVE


def test_guidance_of_equal_predictions_changes_nothing() -> None:
    guided = combine(POSITIVE, POSITIVE, POSITIVE, step(7.0, 2.0, 0.5), cfg_star_rescale=True)
    torch.testing.assert_close(guided, POSITIVE)


def test_cfg_scale_two_doubles_the_way_from_the_negative() -> None:
    guided = combine(POSITIVE, NEGATIVE, None, step(cfg=2.0))
    torch.testing.assert_close(guided - NEGATIVE, 2 * (POSITIVE - NEGATIVE))


def test_cfg_star_does_not_see_the_length_of_the_negative() -> None:
    short, long = (
        combine(POSITIVE, scale * NEGATIVE, None, step(cfg=3.0), cfg_star_rescale=True)
        for scale in (0.1, 10.0)
    )
    torch.testing.assert_close(short, long)


def test_what_cfg_star_leaves_is_orthogonal_to_the_negative() -> None:
    rest = POSITIVE - projection(POSITIVE, NEGATIVE) * NEGATIVE
    product = (rest * NEGATIVE).sum(dim=(1, 2))
    torch.testing.assert_close(product, torch.zeros(2), rtol=0, atol=1e-5)


def test_full_rescaling_gives_back_the_spread_of_the_unguided_prediction() -> None:
    guided = combine(POSITIVE, NEGATIVE, PERTURBED, step(5.0, 2.0, 1.0 - 1e-9))
    assert combine(POSITIVE, NEGATIVE, PERTURBED, step(5.0, 2.0, 1.0)).std() > POSITIVE.std()
    torch.testing.assert_close(spread(guided), spread(POSITIVE))


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    how = step(5.0, 2.0, 0.7)
    whole = combine(POSITIVE, NEGATIVE, PERTURBED, how, cfg_star_rescale=True)
    for row in (slice(0, 1), slice(1, 2)):
        alone = combine(POSITIVE[row], NEGATIVE[row], PERTURBED[row], how, cfg_star_rescale=True)
        torch.testing.assert_close(whole[row], alone)


@dataclass
class Recorder:
    """A model that answers with the mean of its text and remembers what it was asked."""

    calls: list[dict[str, Any]] = field(default_factory=list)

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
    ) -> Tensor:
        call = locals()
        del call["self"]
        self.calls.append(call)
        text = prompt_embeds.mean(dim=(1, 2), keepdim=True)
        return latents + text - 10 * (1 - skip_layer_mask.amin(dim=0))[:, None, None]


def denoiser(model: Recorder, guidance: Guidance) -> GuidedDenoiser:
    prompts = Prompts(
        positive=torch.full((2, 3, 4), 2.0),
        positive_mask=torch.ones(2, 3, dtype=torch.int64),
        negative=torch.full((2, 3, 4), -1.0),
        negative_mask=torch.zeros(2, 3, dtype=torch.int64),
    )
    return GuidedDenoiser(model, torch.zeros(1, 3, 5), prompts, guidance, 4, torch.float32)


@pytest.mark.parametrize(
    ("cfg", "stg", "texts"),
    [
        (1.0, 0.0, [2.0]),
        (3.0, 0.0, [-1.0, 2.0]),
        (1.0, 1.0, [2.0, 2.0]),
        (3.0, 1.0, [-1.0, 2.0, 2.0]),
    ],
)
def test_a_step_asks_only_for_what_it_needs(cfg: float, stg: float, texts: list[float]) -> None:
    model = Recorder()
    guidance = Guidance(cfg, stg, 1.0, skip_block_list=(1, 3))
    guided = denoiser(model, guidance)(torch.zeros(2, 5, 4), 0.25)
    (call,) = model.calls
    assert call["prompt_embeds"][::2, 0, 0].tolist() == texts
    assert call["prompt_mask"][::2, 0].tolist() == [float(text > 0) for text in texts]
    rows = 2 * len(texts)
    assert [len(call[name]) for name in ("latents", "coords", "timestep")] == [rows] * 3
    assert call["timestep"].unique().tolist() == [0.25]
    keep = torch.ones(4, rows)
    if stg:
        keep[1::2, -2:] = 0
    assert torch.equal(call["skip_layer_mask"], keep)
    expected = (2.0 if cfg == 1 else -1 + cfg * 3) + (10 * stg)
    torch.testing.assert_close(guided, torch.full((2, 5, 4), expected))


def test_a_block_that_is_not_there_is_named_when_it_is_used() -> None:
    latents = torch.zeros(2, 5, 4)
    denoiser(Recorder(), Guidance(1.0, 0.0, skip_block_list=(42,)))(latents, 1.0)
    with pytest.raises(ValueError, match="block 42 of 4"):
        denoiser(Recorder(), Guidance(1.0, 1.0, skip_block_list=(42,)))(latents, 1.0)
