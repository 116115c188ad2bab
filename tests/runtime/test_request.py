"""Who decides: the command line before the config before the bundle."""

from pathlib import Path
from typing import Any

import pytest

from ltx_engines.bundle import Bundle
from ltx_engines.errors import UserError
from ltx_engines.pipeline_config import PipelineConfig
from ltx_trt.request import Request, Wishes, resolve
from tests.runtime.conftest import manifest


def here(**defaults: Any) -> Bundle:
    plain = manifest()
    changed = plain.defaults.model_copy(update=defaults)
    return Bundle(Path("bundle"), plain.model_copy(update={"defaults": changed}))


def request(
    config: PipelineConfig | None = None, bundle: Bundle | None = None, **wishes: Any
) -> Request:
    return resolve(Wishes("w3", **wishes), bundle or here(), config)[0]


def test_the_bundle_decides_what_nobody_else_does() -> None:
    found = request()
    assert (found.width, found.height, found.num_frames) == (64, 32, 9)
    assert found.steps.num_inference_steps == 4
    assert found.guidance.skip_block_list == (1,)
    assert found.seed == 171198
    assert found.sampler == "euler"


def test_the_config_goes_before_the_bundle_and_the_command_line_before_both() -> None:
    config = PipelineConfig(guidance_scale=[5.0, 1.0], num_inference_steps=7, stg_scale=0.0)
    found = request(config)
    assert found.guidance.guidance_scale == (5.0, 1.0)
    assert found.steps.num_inference_steps == 7
    assert found.guidance.rescaling_scale == 0.7
    found = request(config, guidance_scale=2.5, num_inference_steps=3, width=96)
    assert found.guidance.guidance_scale == 2.5
    assert found.steps.num_inference_steps == 3
    assert found.guidance.stg_scale == 0.0
    assert found.width == 96


def test_a_number_of_steps_replaces_a_list_of_them_and_the_reverse() -> None:
    distilled = here(timesteps=(1.0, 0.5), skip_final_inference_steps=0)
    assert request(bundle=distilled).steps.timesteps == (1.0, 0.5)
    assert request(bundle=distilled, num_inference_steps=6).steps.timesteps is None
    assert request(PipelineConfig(num_inference_steps=6), distilled).steps.timesteps is None
    listed = request(PipelineConfig(timesteps=[1.0, 0.9]), here(skip_final_inference_steps=1))
    assert listed.steps.timesteps == (1.0, 0.9)
    assert listed.steps.skip_final == 0


def test_a_config_that_samples_stochastically_chooses_that_sampler() -> None:
    assert request(PipelineConfig(stochastic_sampling=True)).sampler == "stochastic"
    assert request(bundle=here(stochastic_sampling=True)).sampler == "stochastic"
    plain = PipelineConfig(stochastic_sampling=False)
    assert request(plain, here(stochastic_sampling=True)).sampler == "euler"
    assert request(PipelineConfig(stochastic_sampling=True), sampler="ddim").sampler == "ddim"


def test_a_forced_schedule_comes_through() -> None:
    assert request(PipelineConfig(sampler="uniform")).steps.source == "uniform"


def test_a_decode_timestep_alone_is_the_noise_scale_too() -> None:
    found = request(PipelineConfig(decode_timestep=0.2))
    assert (found.decode_timestep, found.decode_noise_scale) == (0.2, 0.2)
    found = request(PipelineConfig(decode_timestep=0.2, decode_noise_scale=0.1))
    assert (found.decode_timestep, found.decode_noise_scale) == (0.2, 0.1)


def test_the_residual_mode_perturbs_nothing_and_says_so() -> None:
    found, notes = resolve(Wishes("w3"), here(), PipelineConfig(stg_mode="residual"))
    assert found.guidance.skip_block_list is None
    assert any("no effect" in note for note in notes)


def test_another_stg_mode_than_the_bundles_is_refused() -> None:
    with pytest.raises(UserError, match="--stg-mode transformer_block"):
        request(PipelineConfig(stg_mode="stg_t"))


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"frame_rate": 0.0}, "frame rate"),
        ({"frame_rate": float("nan")}, "frame rate"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"sampler": "dpmpp"}, r"unknown sampler 'dpmpp'.*dpmpp-2m"),
        ({"eta": 1.5}, "eta"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(wish: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        request(**wish)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        resolve(Wishes("  "), here())


def test_a_config_may_hold_the_size_and_the_rate_too() -> None:
    config = PipelineConfig(width=128, num_frames=17, frame_rate=24.0, negative_prompt="dull")
    found = request(config, width=96)
    assert (found.width, found.height, found.num_frames) == (96, 32, 17)
    assert found.frame_rate == 24.0
    assert found.negative_prompt == "dull"


def test_a_mode_that_the_bundle_was_not_exported_with_is_refused() -> None:
    with pytest.raises(UserError, match="ltx-export onnx --stg-mode attention_skip"):
        request(PipelineConfig(stg_mode="stg_as"))
    assert request(PipelineConfig(stg_mode="stg_av")).guidance.skip_block_list == (1,)
    assert request(PipelineConfig(stg_mode="stg_r")).guidance.skip_block_list is None


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"eta": 0.5}, "eta is of the sampler ddim; euler"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number from 0, not nan"),
        ({"stg_scale": -3.0}, "stg_scale must be a number from 0, not -3"),
        ({"rescaling_scale": float("inf")}, "rescaling_scale must be"),
        ({"frame_rate": 0.001}, "frame rate must be from 1 to 240"),
        ({"width": -5}, "width must be from 1 to 32768, not -5"),
        ({"num_frames": 10**20}, "num_frames must be from 1"),
    ],
)
def test_a_number_without_sense_is_refused(wishes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        request(**wishes)


def test_what_does_nothing_beside_the_rest_is_said() -> None:
    wishes = Wishes("w3", stg_scale=0.0, rescaling_scale=0.5)
    assert resolve(wishes, here())[1] == ("--rescaling-scale has no effect without --stg-scale",)
    bare = here(skip_block_list=None)
    assert "no block is named" in resolve(Wishes("w3", stg_scale=1.0), bare)[1][0]
    config = PipelineConfig(text_encoder_max_tokens=7)
    assert "text_encoder_max_tokens has no effect" in resolve(Wishes("w3"), here(), config)[1][0]
