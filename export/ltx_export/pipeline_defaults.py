"""What a run of this model does when nobody says otherwise, written into the bundle.

From the original's configs/ltxv-*.yaml if one is given, else what those files say for such a model.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from ltx_engines import strict
from ltx_engines.bundle import Defaults, SchedulerFacts, StgMode
from ltx_engines.errors import UserError, nearest
from ltx_ref.ltx_video.config import ModelConfig
from ltx_ref.text import MAX_LENGTH

STG_MODES: Mapping[str, StgMode | None] = MappingProxyType(
    {
        "attention_values": "attention_values",
        "stg_av": "attention_values",
        "attention_skip": "attention_skip",
        "stg_as": "attention_skip",
        "transformer_block": "transformer_block",
        "stg_t": "transformer_block",
        "residual": None,
        "stg_r": None,
    }
)
"""The original's names. `residual` has no effect there: no block of the transformer does it."""

SAMPLERS = MappingProxyType(
    {
        "from_checkpoint": None,
        "uniform": SchedulerFacts(sampler="Uniform"),
        "linear-quadratic": SchedulerFacts(sampler="LinearQuadratic"),
    }
)

WITHOUT_EFFECT = frozenset(
    {
        "checkpoint_path",
        "precision",
        "prompt_enhancement_words_threshold",
        "prompt_enhancer_image_caption_model_name_or_path",
        "prompt_enhancer_llm_model_name_or_path",
        "text_encoder_model_name_or_path",
    }
)
"""Keys that name files and types which the command line and the checkpoint decide here."""

OTHERS = ("pipeline_type", "sampler", "stg_mode", "text_encoder_max_tokens")

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


def read(path: Path | None, config: ModelConfig, stg_mode: StgMode | None) -> Pipeline:
    """The configuration of the file, or that of the model alone; a given `stg_mode` wins.

    Raises:
        UserError: the file is no configuration of a base pipeline, or does not fit the model.
    """
    table = {} if path is None else _table(path)
    if ignored := sorted(WITHOUT_EFFECT & table.keys()):
        log.info("%s: without effect here: %s", path, ", ".join(ignored))
    told = {key: table[key] for key in Defaults.model_fields if table.get(key) is not None}
    if "timesteps" in told and "num_inference_steps" not in told:
        told["num_inference_steps"] = len(told["timesteps"])
    elif "num_inference_steps" in told:
        told.setdefault("timesteps", None)
    try:
        defaults = Defaults.model_validate_json(json.dumps(of_model(config) | told), strict=True)
    except ValidationError as error:
        raise UserError(f"{path}: {strict.problem(error, told, Defaults)}") from None
    _check_blocks(defaults, config.transformer.num_layers, path)
    length = table.get("text_encoder_max_tokens", MAX_LENGTH)
    if type(length) is not int or length < 2:
        raise UserError(f"{path}: text_encoder_max_tokens must be a number from 2, not {length!r}")
    return Pipeline(
        defaults,
        _choice(SAMPLERS, table, "sampler", path) or scheduler_facts(config),
        stg_mode or _stg_mode(table, path),
        length,
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


def _table(path: Path) -> dict[str, Any]:
    try:
        table = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path} must hold keys and values, not {type(table).__name__}")
    if table.get("pipeline_type", "base") != "base" or {"first_pass", "second_pass"} & table.keys():
        raise UserError(
            f"{path}: a bundle runs the base pipeline, this is a multi-scale one; "
            "use a file with pipeline_type: base or leave --pipeline-config out"
        )
    known = (*Defaults.model_fields, *WITHOUT_EFFECT, *OTHERS)
    for key in table:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), known)}")
    return table


def _choice(words: Mapping[str, Any], table: dict[str, Any], key: str, path: Path | None) -> Any:
    if (word := table.get(key)) is None:
        return None
    if str(word).lower() not in words:
        raise UserError(f"{path}: {key} is {word!r}, wanted one of {', '.join(words)}")
    return words[str(word).lower()]


def _stg_mode(table: dict[str, Any], path: Path | None) -> StgMode:
    mode: StgMode | None = _choice(STG_MODES, table, "stg_mode", path)
    if mode is None and "stg_mode" in table:
        raise UserError(
            f"{path}: stg_mode {table['stg_mode']!r} changes nothing in these models; "
            "set stg_scale to 0, or choose attention_values"
        )
    return mode or "attention_values"


def _check_blocks(defaults: Defaults, layers: int, path: Path | None) -> None:
    listed = defaults.skip_block_list or ()
    flat = [b for entry in listed for b in (entry if isinstance(entry, tuple) else (entry,))]
    for block in flat:
        if not 0 <= block < layers:
            raise UserError(
                f"{path}: skip_block_list names block {block}, this model has 0 to {layers - 1}"
            )
