"""The original's yaml as it is, and what a slip in it costs."""

from pathlib import Path

import pytest

from ltx_engines.bundle import Defaults
from ltx_engines.errors import UserError
from ltx_engines.pipeline_config import PipelineConfig, load, over, resolve_stg_mode
from ltx_engines.presets import PRESETS, named

BASE = """\
pipeline_type: base
checkpoint_path: "ltx-video-2b-v0.9.5.safetensors"
guidance_scale: 3
stg_scale: 1
rescaling_scale: 0.7
skip_block_list: [19]
num_inference_steps: 40
stg_mode: "attention_values"
decode_timestep: 0.05
decode_noise_scale: 0.025
text_encoder_model_name_or_path: "PixArt-alpha/PixArt-XL-2-1024-MS"
precision: "bfloat16"
sampler: "from_checkpoint"
prompt_enhancement_words_threshold: 120
prompt_enhancer_image_caption_model_name_or_path: "MiaoshouAI/Florence-2-large-PromptGen-v2.0"
prompt_enhancer_llm_model_name_or_path: "unsloth/Llama-3.2-3B-Instruct"
stochastic_sampling: false
"""

MULTI = """\
pipeline_type: multi-scale
guidance_scale: 1
first_pass: {timesteps: [1.0, 0.7], tone_map_compression_ratio: 0.2, stg_scale: 2}
second_pass:
  timesteps: [0.9, 0.4]
"""
"""Not one of the original's: keys beside the passes are of both."""

DEV = """\
pipeline_type: multi-scale
checkpoint_path: "ltxv-13b-0.9.8-dev.safetensors"
downscale_factor: 0.6666666
spatial_upscaler_model_path: "ltxv-spatial-upscaler-0.9.8.safetensors"
stg_mode: "attention_values"
decode_timestep: 0.05
decode_noise_scale: 0.025
precision: "bfloat16"
sampler: "from_checkpoint"
stochastic_sampling: false
first_pass:
  guidance_scale: [1, 1, 6, 8, 6, 1, 1]
  stg_scale: [0, 0, 4, 4, 4, 2, 1]
  rescaling_scale: [1, 1, 0.5, 0.5, 1, 1, 1]
  guidance_timesteps: [1.0, 0.996,  0.9933, 0.9850, 0.9767, 0.9008, 0.6180]
  skip_block_list: [[], [11, 25, 35, 39], [22, 35, 39], [28], [28], [28], [28]]
  num_inference_steps: 30
  skip_final_inference_steps: 3
  cfg_star_rescale: true
second_pass:
  guidance_scale: [1]
  stg_scale: [1]
  rescaling_scale: [1]
  guidance_timesteps: [1.0]
  skip_block_list: [27]
  num_inference_steps: 30
  skip_initial_inference_steps: 17
  cfg_star_rescale: true
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "ltxv.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_base_config_of_the_original_is_read_whole(tmp_path: Path) -> None:
    config = load(write(tmp_path, BASE))
    assert config.guidance_scale == 3
    assert config.skip_block_list == [19]
    assert config.num_inference_steps == 40
    assert config.stochastic_sampling is False
    (note,) = config.notes()
    for key in ("checkpoint_path", "precision", "text_encoder_model_name_or_path"):
        assert key in note
    assert "not enhanced" in note


def test_per_step_lists_are_read(tmp_path: Path) -> None:
    text = "guidance_scale: [1, 6.5]\nskip_block_list: [[], [11, 25]]\nguidance_timesteps: [1, 0.9]"
    config = load(write(tmp_path, text))
    assert config.guidance_scale == [1, 6.5]
    assert config.skip_block_list == [[], [11, 25]]
    assert config.notes() == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE + "guidance_scal: 4\n", r"guidance_scal.*did you mean 'guidance_scale'"),
        ("pipeline_type: multi-scale\nfirst_pass: {}\n", "second_pass is missing"),
        (MULTI + "first_pass: [1]\n", r"first_pass should hold keys and values, not \[1\]"),
        ("second_pass: {}\n", "second_pass is of pipeline_type: multi-scale; say that"),
        (BASE + "first_pass: {}\n", "first_pass is of pipeline_type: multi-scale; say that"),
        (MULTI + "  scale: 3\n", r"unknown key second_pass\.scale; did you mean 'stg_scale'"),
        (MULTI + "  width: 3\n", r"unknown key second_pass\.width"),
        (MULTI + "  num_inference_steps: 3\n", "second_pass: give timesteps or num_inference"),
        (MULTI.replace("[0.9", "[1.0"), "second_pass starts from the upsampled first one"),
        (MULTI.replace("timesteps: [0.9", "num_inference_steps: 4 # ["), "starts from the upsamp"),
        (MULTI + "downscale_factor: 1.5\n", "downscale_factor should be less than or equal to 1"),
        (MULTI + "  tone_map_compression_ratio: 2\n", "tone_map_compression_ratio should be less"),
        ("pipeline_type: bass\n", "pipeline_type should be 'base' or 'multi-scale'"),
        ("num_inference_steps: 0\n", "num_inference_steps should be greater than or equal to 1"),
        ("num_inference_steps: '4'\n", "num_inference_steps"),
        ("guidance_scale: yes\n", "guidance_scale"),
        ("guidance_scale: .nan\n", "finite"),
        ("guidance_scale: strong\n", "guidance_scale"),
        ("skip_block_list: [1, [2]]\n", "skip_block_list"),
        ("sampler: karras\n", "sampler should be 'from_checkpoint'"),
        ("timesteps: [1.0]\nnum_inference_steps: 3\n", "not both"),
        ("- a\n- b\n", "must hold keys and values, not list"),
        ("", "not NoneType"),
        ("a: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("3: 4\n", "keys must be words, not 3"),
        ("x: !!python/object/apply:os.system [ls]\n", "is not YAML"),
    ],
)
def test_a_slip_in_the_config_costs_one_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=words) as told:
        load(path)
    assert "\n" not in str(told.value)
    assert str(told.value).startswith(str(path))


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("attention_values", "attention_values"),
        ("STG_AV", "attention_values"),
        ("stg_as", "attention_skip"),
        ("transformer_block", "transformer_block"),
        ("residual", None),
        ("stg_r", None),
    ],
)
def test_a_mode_has_several_names_and_residual_has_no_effect(name: str, mode: str | None) -> None:
    assert resolve_stg_mode(name) == mode


def test_an_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'attention_skip'"):
        resolve_stg_mode("attention_skp")


def test_the_originals_command_line_options_may_stand_in_the_file(tmp_path: Path) -> None:
    config = load(write(tmp_path, BASE + "width: 128\nheight: 96\nframe_rate: 24\n"))
    assert (config.width, config.height, config.frame_rate) == (128, 96, 24)


def test_a_multi_scale_config_of_the_original_is_the_preset_of_its_name(tmp_path: Path) -> None:
    config, preset = load(write(tmp_path, DEV)), load(named("ltxv-13b-0.9.8-dev"))
    differing = {k for k in PipelineConfig.model_fields if getattr(config, k) != getattr(preset, k)}
    assert differing == {"precision"}
    assert over(Defaults(), config) == over(Defaults(), preset)
    (note,) = config.notes()
    assert "spatial_upscaler_model_path" in note
    assert "downscale_factor" not in note


def test_what_is_said_beside_the_passes_counts_for_both(tmp_path: Path) -> None:
    found = over(Defaults(), load(write(tmp_path, MULTI)))
    first, second = found.passes
    assert (first.timesteps, second.timesteps) == ((1.0, 0.7), (0.9, 0.4))
    assert (first.guidance_scale, second.guidance_scale) == (1.0, 1.0)
    assert (first.stg_scale, second.stg_scale) == (2.0, 1.0)  # the second is the model's own
    assert (first.tone_map_compression_ratio, second.tone_map_compression_ratio) == (0.2, 0.0)


def test_a_pass_with_steps_of_its_own_has_no_use_for_those_of_both(tmp_path: Path) -> None:
    text = MULTI + "num_inference_steps: 5\nskip_final_inference_steps: 1\n"
    assert over(Defaults(), load(write(tmp_path, text))).passes[1].timesteps == (0.9, 0.4)


def two_passes() -> Defaults:
    return over(Defaults(), load(named("ltxv-13b-0.9.8-dev")))


def test_a_config_of_one_pass_takes_the_second_one_of_a_bundle_away(tmp_path: Path) -> None:
    found = over(two_passes(), load(write(tmp_path, BASE)))
    assert found.second is None
    base = over(Defaults(), load(write(tmp_path, BASE)))
    assert found == base


def test_a_config_that_is_not_whole_changes_both_passes_of_a_bundle() -> None:
    found = over(two_passes(), PipelineConfig(stg_scale=0.0, num_inference_steps=20))
    assert [wanted.stg_scale for wanted in found.passes] == [0, 0]
    assert found.guidance_scale == (1, 1, 6, 8, 6, 1, 1)
    first, second = found.passes
    assert (first.num_inference_steps, first.skip_final_inference_steps) == (20, 2)
    assert (second.num_inference_steps, second.skip_initial_inference_steps) == (20, 11)


def test_timesteps_of_one_pass_are_not_for_a_bundle_of_two() -> None:
    with pytest.raises(UserError, match="makes two passes, and timesteps are of one"):
        over(two_passes(), PipelineConfig(timesteps=[1.0, 0.5]))


def test_a_downscale_factor_without_effect_is_named(tmp_path: Path) -> None:
    (note,) = load(write(tmp_path, "downscale_factor: 0.5\n")).notes()
    assert "downscale_factor (of multi-scale pipelines)" in note


@pytest.mark.parametrize("name", PRESETS)
def test_an_original_file_that_is_not_there_is_the_preset_of_its_name(name: str) -> None:
    path = Path(f"configs/{name}.yaml")
    config = load(path)
    assert config.notes()[0] == f"{path} is not there, so the preset {name} counts"
    assert over(Defaults(), config) == over(Defaults(), load(named(name)))


def test_a_file_that_is_there_goes_before_the_preset_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "ltxv-2b-0.9.5.yaml"
    path.write_text("num_inference_steps: 7\n", encoding="utf-8")
    assert load(path).said() == {"num_inference_steps": 7}


def test_a_config_without_a_checkpoint_goes_by_its_files_name(tmp_path: Path) -> None:
    """It was called `a config for None`."""
    path = tmp_path / "mine.yaml"
    path.write_text("num_inference_steps: 7\n", encoding="utf-8")
    assert load(path).title() == "mine.yaml"
    path.write_text("checkpoint_path: a.safetensors\n", encoding="utf-8")
    assert load(path).title() == "a config for a.safetensors"
    assert PipelineConfig().title() == "the config"


def test_a_missing_file_names_the_nearest_preset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No such file.*did you mean 'ltxv-2b-0\.9\.5\.yaml'"):
        load(tmp_path / "ltxv-2b-0.95.yaml")
