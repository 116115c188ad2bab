from dataclasses import replace
from itertools import product

import pytest

from ltx_engines.stages import (
    BRANCHES,
    COEFFICIENTS,
    FLOAT,
    OPTIONAL,
    STAGES,
    STREAM,
    NoiseInput,
    Sizes,
    Stage,
    Upsampling,
    check_feeds,
    ltx_video,
    sampler_step,
)

SIZES = Sizes(
    in_channels=12,
    out_channels=12,
    caption_channels=20,
    num_layers=3,
    latent_channels=12,
    timestep_conditioning=True,
    noise_inputs=(NoiseInput(0, 4), NoiseInput(2, 2)),
    upsampling=Upsampling(spatial=True, temporal=False),
)

TABLES = ltx_video(SIZES)
ALL = (*STAGES, STREAM, *OPTIONAL)


def shapes(stage: Stage) -> dict[str, tuple[int, ...]]:
    """A legal feed: every named axis has a size of its own."""
    names = sorted({a for t in stage.inputs for a in t.axes if isinstance(a, str)})
    size = {name: 2 + i for i, name in enumerate(names)}
    return {
        t.name: tuple(a if isinstance(a, int) else size[a] for a in t.axes) for t in stage.inputs
    }


def check(stage: Stage, feeds: dict[str, tuple[int, ...]]) -> None:
    check_feeds(stage.name, stage.inputs, feeds)


def names(stage: str, tables: dict[str, Stage] = TABLES) -> list[str]:
    return [tensor.name for tensor in tables[stage].inputs]


def test_a_family_has_every_stage_under_its_own_name() -> None:
    assert set(TABLES) == set(ALL)
    assert all(stage.name == name for name, stage in TABLES.items())


@pytest.mark.parametrize("name", ALL)
def test_every_output_axis_is_fixed_or_has_a_written_name(name: str) -> None:
    stage = TABLES[name]
    tensors = list(stage.tensors())
    assert len(tensors) == len({t.name for t in tensors}), "two tensors of one name"
    for tensor in tensors:
        assert tensor.dtype in {FLOAT, "float32", "int64"}
        assert all(a > 0 if isinstance(a, int) else a.isidentifier() for a in tensor.axes)


@pytest.mark.parametrize("name", ALL)
def test_feeds_made_from_the_table_pass(name: str) -> None:
    check(TABLES[name], shapes(TABLES[name]))


def wrong_axes() -> list[tuple[str, str, int]]:
    """Every fixed axis, and every axis whose name another tensor shares."""
    found = []
    for stage in TABLES.values():
        axes = [axis for tensor in stage.inputs for axis in tensor.axes]
        for tensor in stage.inputs:
            for place, axis in enumerate(tensor.axes):
                if isinstance(axis, int) or axes.count(axis) > 1:
                    found.append((stage.name, tensor.name, place))
    return found


@pytest.mark.parametrize(("stage", "tensor", "place"), wrong_axes())
def test_one_wrong_size_is_refused(stage: str, tensor: str, place: int) -> None:
    feeds = shapes(TABLES[stage])
    shape = list(feeds[tensor])
    shape[place] += 1
    feeds[tensor] = tuple(shape)
    with pytest.raises(ValueError, match=f"^{stage}: .* axis .* is .*, wanted"):
        check(TABLES[stage], feeds)


def test_a_size_that_differs_names_the_tensor_the_axis_and_where_the_other_was_seen() -> None:
    feeds = shapes(TABLES["transformer"])
    feeds["coords"] = (*feeds["coords"][:2], 99)
    with pytest.raises(ValueError, match=r"coords axis 'tokens' is 99, wanted \d+ as in latents$"):
        check(TABLES["transformer"], feeds)


@pytest.mark.parametrize("name", ALL)
def test_one_axis_too_many_is_refused(name: str) -> None:
    stage = TABLES[name]
    for tensor in stage.inputs:
        feeds = shapes(stage)
        feeds[tensor.name] = (*feeds[tensor.name], 1)
        with pytest.raises(ValueError, match=f"{tensor.name} has axes"):
            check(stage, feeds)


@pytest.mark.parametrize("name", ALL)
def test_a_missing_and_an_unknown_name_are_both_said(name: str) -> None:
    stage = TABLES[name]
    for tensor in stage.inputs:
        feeds = shapes(stage)
        feeds["stranger"] = feeds.pop(tensor.name)
        with pytest.raises(
            ValueError, match=rf"missing \['{tensor.name}'\], unknown \['stranger'\]"
        ):
            check(stage, feeds)


def test_one_timestep_serves_all_tokens_or_each_has_its_own() -> None:
    feeds = shapes(TABLES["transformer"])
    batch, tokens, _ = feeds["latents"]
    for timesteps in (1, tokens):
        check(TABLES["transformer"], feeds | {"timestep": (batch, timesteps)})


def test_the_decoder_asks_for_what_the_checkpoint_needs_and_nothing_else() -> None:
    assert names("vae_decoder") == ["latents", "timestep", "noise_0", "noise_2"]
    for timestep, noises in product((False, True), ((), (NoiseInput(1, 8),))):
        sizes = Sizes(12, 12, 20, 3, 12, timestep, noises)
        expected = ["latents"] + ["timestep"] * timestep + [n.name for n in noises]
        assert names("vae_decoder", ltx_video(sizes)) == expected


def test_without_an_upsampler_the_stages_are_those_of_the_base_pipeline() -> None:
    assert tuple(ltx_video(replace(SIZES, upsampling=None))) == (*STAGES, STREAM)
    assert tuple(TABLES) == (*STAGES[:2], *OPTIONAL, *STAGES[2:], STREAM), "not in order of use"


@pytest.mark.parametrize(
    ("spatial", "temporal", "grid"),
    [
        (True, False, ("latent_frames", "upsampled_height", "upsampled_width")),
        (False, True, ("upsampled_frames", "latent_height", "latent_width")),
        (True, True, ("upsampled_frames", "upsampled_height", "upsampled_width")),
    ],
)
def test_an_upsampler_renames_the_axes_that_it_doubles_and_no_other(
    spatial: bool, temporal: bool, grid: tuple[str, ...]
) -> None:
    stage = ltx_video(replace(SIZES, upsampling=Upsampling(spatial, temporal)))["latent_upsampler"]
    (latents,), (upsampled,) = stage.inputs, stage.outputs
    assert latents == TABLES["vae_decoder"].inputs[0], "it takes what the decoder takes"
    assert upsampled.axes == (*latents.axes[:2], *grid)


def test_an_upsampler_that_doubles_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="doubles nothing"):
        Upsampling(spatial=False, temporal=False)


def test_a_sampler_step_takes_velocities_and_gives_a_batch_of_every_branch() -> None:
    velocity, step = TABLES["transformer"].outputs[0], sampler_step(12)
    branches = step.inputs[1 : 1 + len(BRANCHES)]
    assert [tensor.name for tensor in branches] == list(BRANCHES)
    assert {(t.dtype, t.axes[1:]) for t in branches} == {(velocity.dtype, velocity.axes[1:])}
    latents, batch = TABLES["transformer"].inputs[0], step.outputs[-1]
    assert (batch.dtype, batch.axes) == (latents.dtype, (len(BRANCHES), *latents.axes[1:]))
    assert step.inputs[-1].axes == (len(COEFFICIENTS),)
    assert step.name not in {*STAGES, *OPTIONAL}, "no model has weights for it"


def test_a_decoders_noise_has_its_own_size_at_each_level() -> None:
    stage = TABLES["vae_decoder"]
    check(stage, shapes(stage) | {"noise_0": (4, 5, 7), "noise_2": (2, 10, 14)})
    with pytest.raises(ValueError, match="noise_0 axis 4 is 5, wanted 4"):
        check(stage, shapes(stage) | {"noise_0": (5, 5, 7)})
