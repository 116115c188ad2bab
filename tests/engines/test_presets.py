"""The presets, beside what is known of the releases, and for which models they are."""

import json

import pytest

from ltx_engines import pipeline_config, presets
from ltx_engines.bundle import Defaults
from ltx_engines.defaults import Pass
from ltx_engines.errors import UserError
from ltx_engines.presets import PRESETS

DISTILLED = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219)
"""The noise levels that distilled checkpoints list: LinearQuadratic in eight steps."""


def resolved(name: str) -> Defaults:
    config = pipeline_config.load(presets.named(name))
    return pipeline_config.over(Defaults(), config)


def test_all_eleven_configs_and_the_four_before_them_are_there() -> None:
    two = ["0.9", "0.9.1", "0.9.5", "0.9.6-dev", "0.9.6-distilled"]
    two += ["0.9.8-distilled", "0.9.8-distilled-fp8"]
    thirteen = [f"0.9.{n}-{kind}" for n in (7, 8) for kind in ("dev", "distilled")]
    thirteen += [f"{name}-fp8" for name in thirteen]
    assert {*PRESETS} == {f"ltxv-2b-{n}" for n in two} | {f"ltxv-13b-{n}" for n in thirteen}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_every_step_and_scale_itself(name: str) -> None:
    """Nothing is left to a bundle whose defaults are quite others."""
    config = pipeline_config.load(presets.named(name))
    odd = Pass(guidance_scale=9, rescaling_scale=0.1, skip_block_list=(3,), timesteps=(0.5,))
    other = Defaults(**{**Defaults().model_dump(), **odd.model_dump(), "decode_timestep": 0.3})
    mine = [wanted.model_dump() for wanted in resolved(name).passes]
    theirs = [wanted.model_dump() for wanted in pipeline_config.over(other, config).passes]
    assert mine == theirs
    assert pipeline_config.over(other, config).decode_timestep == 0.05


@pytest.mark.parametrize("name", [name for name in PRESETS if "-distilled" in name])
def test_a_distilled_preset_keeps_to_the_levels_and_to_one_branch(name: str) -> None:
    for wanted in resolved(name).passes:
        wanted.check_guidance(distilled=True)
        assert wanted.branches() == 1
        assert {*(wanted.timesteps or DISTILLED)} <= {*DISTILLED}


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("ltxv-2b-0.9.1", (40,)),
        ("ltxv-2b-0.9.6-distilled", (8,)),
        ("ltxv-2b-0.9.8-distilled", (7, 3)),
        ("ltxv-13b-0.9.7-dev", (27, 13)),
    ],
)
def test_the_steps_of_each_pass_are_told(name: str, steps: tuple[int, ...]) -> None:
    assert PRESETS[name].steps == steps
    assert f"{' + '.join(map(str, steps))} steps" in next(
        line for line in presets.lines() if line.startswith(f"{name} ")
    )


def test_only_the_13b_distilled_models_of_098_map_tones() -> None:
    toned = {
        name
        for name in PRESETS
        if (two := resolved(name).second) and two.tone_map_compression_ratio
    }
    assert toned == {"ltxv-13b-0.9.8-distilled", "ltxv-13b-0.9.8-distilled-fp8"}


def test_an_fp8_preset_runs_as_the_one_without_and_says_so() -> None:
    name = "ltxv-13b-0.9.8-dev"
    assert resolved(f"{name}-fp8") == resolved(name)
    (note,) = pipeline_config.load(presets.named(f"{name}-fp8")).notes()
    assert note.endswith("runs as ltxv-13b-0.9.8-dev; the bundle's own precision counts")
    assert pipeline_config.load(presets.named(name)).notes() == ()


def test_the_list_for_programs_holds_every_setting() -> None:
    told = json.loads(presets.as_json())
    assert [*told] == [*PRESETS]
    assert told["ltxv-2b-0.9"]["settings"]["skip_block_list"] == [19]


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'ltxv-2b-0\.9\.9'.*did you mean"):
        presets.named("ltxv-2b-0.9.9")


def test_a_preset_and_a_config_are_one_too_many() -> None:
    path = presets.named("ltxv-2b-0.9")
    assert presets.chosen(path, None) == path
    assert presets.chosen(None, "ltxv-2b-0.9") == path
    assert presets.chosen(None, None) is None
    with pytest.raises(UserError, match="leave one of them out"):
        presets.chosen(path, "ltxv-2b-0.9")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_own_model(name: str) -> None:
    release = PRESETS[name].release
    layers = {"2B": 28, "13B": 48}[release.size]
    assert presets.fit(release, name, layers, distilled=release.distilled) == ()


@pytest.mark.parametrize(
    ("name", "layers", "distilled", "said"),
    [
        ("ltxv-13b-0.9.8-dev", 28, False, "is for 13B models, this one is 2B .28 blocks."),
        ("ltxv-13b-0.9.8-dev", 28, False, "use ltxv-2b-0.9 or .*ltxv-2b-0.9.6-dev$"),
        ("ltxv-2b-0.9.8-distilled", 48, True, "use ltxv-13b-0.9.7-distilled or ltxv-13b-0.9.8-d"),
        ("ltxv-13b-0.9.8-dev", 48, True, "not distilled, this one is .*use ltxv-13b-0.9.7-distil"),
        ("ltxv-2b-0.9.5", 28, True, "not distilled, this one is"),
        ("ltxv-2b-0.9.5", 6, True, "not distilled, this one is"),
    ],
)
def test_a_preset_of_another_model_is_refused_with_those_that_fit(
    name: str, layers: int, distilled: bool, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        presets.fit(PRESETS[name].release, f"the preset {name}", layers, distilled=distilled)


def test_a_model_of_ones_own_size_or_without_its_list_of_levels_is_only_noted() -> None:
    distilled = PRESETS["ltxv-13b-0.9.8-distilled"].release
    (note,) = presets.fit(distilled, "this", 6, distilled=True)
    assert note == "this is for 13B models, this one has 6 blocks"
    (note,) = presets.fit(distilled, "this", 48, distilled=False)
    assert "does not say that it is" in note
