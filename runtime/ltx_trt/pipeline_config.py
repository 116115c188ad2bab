"""The original's configs/ltxv-*.yaml, read as they are.

What such a file decides about a run is taken over. What was decided when the bundle was exported
(checkpoint, precision, text encoder) is accepted and named in a note, since it changes nothing.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ltx_engines import strict
from ltx_engines.bundle import StgMode
from ltx_engines.errors import UserError, nearest

DECIDED_AT_EXPORT = (
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

Steps = Annotated[int, Field(ge=1)]
Skipped = Annotated[int, Field(ge=0)]
PerStep = float | list[float]


class PipelineConfig(BaseModel):
    """The keys of a base pipeline. A key that is absent (None) leaves the bundle's default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    pipeline_type: Literal["base", "multi-scale"] = "base"
    num_inference_steps: Steps | None = None
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
        if fixed := [key for key in DECIDED_AT_EXPORT if getattr(self, key) is not None]:
            parts.append(f"{', '.join(fixed)} were decided when the bundle was exported")
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


def resolve_stg_mode(wished: str, baked: StgMode) -> bool:
    """Whether perturbing has an effect: the mode `residual` never had one.

    The mode is part of the exported graph, so any other than the bundle's own is refused.
    """
    if (mode := STG_MODES.get(wished.lower())) is None:
        raise UserError(
            f"unknown stg_mode {wished!r}{nearest(wished.lower(), STG_MODES)}; "
            f"known are {', '.join(STG_MODES)}"
        )
    if mode not in ("residual", baked):
        raise UserError(
            f"stg_mode is {mode}, but this bundle was exported with {baked}; export one with "
            f"`ltx-export onnx --stg-mode {mode}`"
        )
    return mode != "residual"


def _check_one_pass(path: Path, data: dict[str, Any]) -> None:
    passes = [key for key in ("first_pass", "second_pass") if key in data]
    if data.get("pipeline_type") == "multi-scale" or passes:
        raise UserError(
            f"{path}: multi-scale pipelines need a latent_upsampler stage; this bundle has none; "
            "use a config with pipeline_type: base"
        )
