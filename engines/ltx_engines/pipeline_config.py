"""The original's configs/ltxv-*.yaml, read as they are.

The exporter makes a bundle's defaults of one, the runtime a run. Files, element types and the
rewriting of prompts are decided elsewhere here: those keys are accepted and named in a note, since
they change nothing. Five options of the original's command line may stand in a file, too.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ltx_engines import strict
from ltx_engines.bundle import SchedulerFacts, StgMode
from ltx_engines.errors import UserError, nearest

DECIDED_ELSEWHERE = (
    "checkpoint_path",
    "precision",
    "text_encoder_model_name_or_path",
    "spatial_upscaler_model_path",
    "downscale_factor",
)

STG_MODES: dict[str, StgMode | Literal["residual"]] = {
    "attention_values": "attention_values",
    "stg_av": "attention_values",
    "attention_skip": "attention_skip",
    "stg_as": "attention_skip",
    "residual": "residual",
    "stg_r": "residual",
    "transformer_block": "transformer_block",
    "stg_t": "transformer_block",
}

SCHEDULES: dict[str, SchedulerFacts | None] = {
    "from_checkpoint": None,
    "uniform": SchedulerFacts(sampler="Uniform"),
    "linear-quadratic": SchedulerFacts(sampler="LinearQuadratic"),
}

Positive = Annotated[int, Field(ge=1)]
Skipped = Annotated[int, Field(ge=0)]
PerStep = float | list[float]


class PipelineConfig(BaseModel):
    """The keys of a base pipeline. A key that is absent (None) leaves the bundle's default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    pipeline_type: Literal["base", "multi-scale"] = "base"
    num_inference_steps: Positive | None = None
    timesteps: list[float] | None = None
    skip_initial_inference_steps: Skipped | None = None
    skip_final_inference_steps: Skipped | None = None
    sampler: Literal["from_checkpoint", "uniform", "linear-quadratic"] | None = None
    stochastic_sampling: bool | None = None
    guidance_scale: PerStep | None = None
    stg_scale: PerStep | None = None
    rescaling_scale: PerStep | None = None
    skip_block_list: list[int] | list[list[int]] | None = None
    guidance_timesteps: list[float] | None = None
    cfg_star_rescale: bool | None = None
    stg_mode: str | None = None
    decode_timestep: float | None = None
    decode_noise_scale: float | None = None
    width: Positive | None = None
    height: Positive | None = None
    num_frames: Positive | None = None
    frame_rate: float | None = None
    negative_prompt: str | None = None
    text_encoder_max_tokens: Annotated[int, Field(ge=2)] | None = None
    checkpoint_path: str | None = None
    precision: str | None = None
    text_encoder_model_name_or_path: str | None = None
    spatial_upscaler_model_path: str | None = None
    downscale_factor: float | None = None
    prompt_enhancement_words_threshold: int | None = None
    prompt_enhancer_image_caption_model_name_or_path: str | None = None
    prompt_enhancer_llm_model_name_or_path: str | None = None

    def notes(self) -> tuple[str, ...]:
        """What of this file has no effect, in words for the user."""
        parts = []
        if fixed := [key for key in DECIDED_ELSEWHERE if getattr(self, key) is not None]:
            parts.append(f"{', '.join(fixed)} (a bundle's own files and types count)")
        if self.prompt_enhancement_words_threshold:
            parts.append("prompts are not enhanced by a language model")
        return (f"without effect in the config: {'; '.join(parts)}",) if parts else ()


def load(path: Path) -> PipelineConfig:
    try:
        data = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold keys and values, not {type(data).__name__}")
    for key in data:
        if not isinstance(key, str):
            raise UserError(f"{path}: keys must be words, not {key!r}")
    _check_one_pass(path, data)
    try:
        config = PipelineConfig.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {strict.problem(error, data, PipelineConfig)}") from None
    if config.timesteps is not None and config.num_inference_steps is not None:
        raise UserError(f"{path}: give timesteps or num_inference_steps, not both")
    return config


def resolve_stg_mode(word: str) -> StgMode | None:
    """The mode of that name; None for `residual`, which never had an effect in these models."""
    if (mode := STG_MODES.get(word.lower())) is None:
        raise UserError(
            f"unknown stg_mode {word!r}{nearest(word.lower(), STG_MODES)}; "
            f"known are {', '.join(STG_MODES)}"
        )
    return None if mode == "residual" else mode


def _check_one_pass(path: Path, data: dict[str, Any]) -> None:
    passes = [key for key in ("first_pass", "second_pass") if key in data]
    if data.get("pipeline_type") == "multi-scale" or passes:
        raise UserError(
            f"{path}: multi-scale pipelines need a latent_upsampler stage, which bundles do "
            "not have yet; use a config with pipeline_type: base"
        )
