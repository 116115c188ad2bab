"""The original's yaml as it is, and what a slip in it costs."""

from pathlib import Path

import pytest

from ltx_engines.errors import UserError
from ltx_engines.pipeline_config import load, resolve_stg_mode

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
        ("pipeline_type: multi-scale\nfirst_pass: {}\n", "need a latent_upsampler stage"),
        ("second_pass: {}\n", "need a latent_upsampler stage"),
        ("pipeline_type: bass\n", "pipeline_type should be 'base'"),
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
