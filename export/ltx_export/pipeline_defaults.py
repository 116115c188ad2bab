"""What a run of this model does when nobody says otherwise, written into the bundle.

From the original's configs/ltxv-*.yaml if one is given, else what those files say for such a model.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ltx_engines import pipeline_config, presets, strict
from ltx_engines.bundle import Defaults, SchedulerFacts, StgMode
from ltx_engines.defaults import Pass
from ltx_engines.errors import UserError
from ltx_engines.pipeline_config import PipelineConfig
from ltx_engines.stages import STAGES
from ltx_ref.ltx_video.config import ModelConfig
from ltx_ref.text import MAX_LENGTH

BLOCK, OF_BLOCKS = 19, 28
"""The block that the original's files perturb, and the size of the model they do it in."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a pipeline's configuration decides about a bundle."""

    defaults: Defaults
    scheduler: SchedulerFacts
    stg_mode: StgMode
    max_length: int


def read(
    path: Path | None,
    config: ModelConfig,
    stg_mode: StgMode | None,
    stages: tuple[str, ...] = (),
) -> Pipeline:
    """The configuration of the file, or that of the model alone; a given `stg_mode` wins. A bundle
    of all stages is to be run as it says.

    Raises:
        UserError: the file is no configuration of a pipeline, or does not fit the model.
    """
    told = PipelineConfig() if path is None else pipeline_config.load(path)
    distilled = config.allowed_inference_steps is not None
    layers = config.transformer.num_layers
    notes = told.notes()
    if (release := told.release()) is not None:
        notes += presets.fit(release, told.title(), layers, distilled=distilled)
    for note in notes:
        log.warning("%s: %s", path, note)
    defaults = pipeline_config.over(Defaults(**of_model(config)), told)
    if defaults.second and set(STAGES) <= set(stages) and "latent_upsampler" not in stages:
        raise UserError(
            f"{path} makes two passes with a latent upsampler between them; give its file with "
            "--upsampler, such as ltxv-spatial-upscaler-0.9.8.safetensors"
        )
    for wanted in defaults.passes:
        _check_fit(wanted, layers, distilled, path)
    return Pipeline(
        defaults,
        pipeline_config.SCHEDULES[told.sampler or "from_checkpoint"] or scheduler_facts(config),
        stg_mode or _stg_mode(told, path),
        told.text_encoder_max_tokens or MAX_LENGTH,
    )


def of_model(config: ModelConfig) -> dict[str, Any]:
    """Distilled models name their noise levels and want no guidance; the others perturb a block."""
    if config.allowed_inference_steps is not None:
        levels = sorted((level for level in config.allowed_inference_steps if level), reverse=True)
        plain = {"guidance_scale": 1.0, "stg_scale": 0.0, "rescaling_scale": 1.0}
        steps = {"timesteps": levels, "num_inference_steps": len(levels)}
        return plain | steps | {"skip_block_list": None}
    layers = config.transformer.num_layers
    block = BLOCK if layers > BLOCK else BLOCK * layers // OF_BLOCKS
    return {"skip_block_list": [block]}


def scheduler_facts(config: ModelConfig) -> SchedulerFacts:
    """
    Raises:
        UserError: the checkpoint names a schedule that is not known.
    """
    fields = {
        name: value
        for name in SchedulerFacts.model_fields
        if (value := getattr(config.scheduler, name)) is not None
    }
    try:
        return SchedulerFacts.model_validate(fields)
    except ValidationError as error:
        problem = strict.problem(error, fields, SchedulerFacts)
        raise UserError(f"the checkpoint's scheduler: {problem}") from None


def _stg_mode(told: PipelineConfig, path: Path | None) -> StgMode:
    if told.stg_mode is None:
        return "attention_values"
    if mode := pipeline_config.resolve_stg_mode(told.stg_mode):
        return mode
    raise UserError(
        f"{path}: stg_mode {told.stg_mode!r} changes nothing in these models; "
        "set stg_scale to 0, or choose attention_values"
    )


def _check_fit(wanted: Pass, layers: int, distilled: bool, path: Path | None) -> None:
    """A block that no step leaves out may be one that there is not, as in the distilled configs."""
    for block in wanted.perturbed():
        if not 0 <= block < layers:
            raise UserError(
                f"{path}: skip_block_list names block {block}, this model has 0 to {layers - 1}"
            )
    try:
        wanted.check_guidance(distilled=distilled)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
