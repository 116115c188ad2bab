"""The original's configs/ltxv-*.yaml, read as they are, and the same by name.

The exporter makes a bundle's defaults of one, the runtime a run. Files, element types and the
rewriting of prompts are decided elsewhere here: those keys are accepted and named in a note, since
they change nothing. Five options of the original's command line may stand in a file, too.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from ltx_engines import presets, strict
from ltx_engines.bundle import SchedulerFacts, StgMode
from ltx_engines.defaults import NO_SKIPS, Defaults
from ltx_engines.errors import UserError, nearest
from ltx_engines.presets import Preset, Release

DECIDED_ELSEWHERE = (
    "checkpoint_path",
    "precision",
    "text_encoder_model_name_or_path",
    "spatial_upscaler_model_path",
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

SIZES = ("width", "height", "num_frames", "frame_rate", "negative_prompt", "downscale_factor")

Positive = Annotated[int, Field(ge=1)]
Skipped = Annotated[int, Field(ge=0)]
PerStep = float | list[float]


class Pass(BaseModel):
    """The keys of one denoising. A key that is absent (None) says nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    num_inference_steps: Positive | None = None
    timesteps: list[float] | None = None
    skip_initial_inference_steps: Skipped | None = None
    skip_final_inference_steps: Skipped | None = None
    stochastic_sampling: bool | None = None
    guidance_scale: PerStep | None = None
    stg_scale: PerStep | None = None
    rescaling_scale: PerStep | None = None
    skip_block_list: list[int] | list[list[int]] | None = None
    guidance_timesteps: list[float] | None = None
    cfg_star_rescale: bool | None = None
    tone_map_compression_ratio: Annotated[float, Field(ge=0, le=1)] | None = None

    def said(self) -> dict[str, Any]:
        """The keys of a pass that are there."""
        values = {key: getattr(self, key) for key in Pass.model_fields}
        return {key: value for key, value in values.items() if value is not None}


class PipelineConfig(Pass):
    """A file. What it says of a pass counts for both of a multi-scale pipeline's, where the pass
    itself says nothing; what nobody says is the bundle's."""

    pipeline_type: Literal["base", "multi-scale"] | None = None
    first_pass: Pass | None = None
    second_pass: Pass | None = None
    downscale_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    sampler: Literal["from_checkpoint", "uniform", "linear-quadratic"] | None = None
    stg_mode: str | None = None
    decode_timestep: float | None = None
    decode_noise_scale: float | None = None
    width: Positive | None = None
    height: Positive | None = None
    num_frames: Positive | None = None
    frame_rate: Annotated[float, Field(gt=0)] | None = None
    negative_prompt: str | None = None
    text_encoder_max_tokens: Annotated[int, Field(ge=2)] | None = None
    checkpoint_path: str | None = None
    precision: str | None = None
    text_encoder_model_name_or_path: str | None = None
    spatial_upscaler_model_path: str | None = None
    prompt_enhancement_words_threshold: int | None = None
    prompt_enhancer_image_caption_model_name_or_path: str | None = None
    prompt_enhancer_llm_model_name_or_path: str | None = None

    @property
    def multi_scale(self) -> bool:
        return self.pipeline_type == "multi-scale"

    def passes(self) -> tuple[dict[str, Any], ...]:
        """What is said of each."""
        own = [self.first_pass, self.second_pass] if self.multi_scale else [None]
        return tuple(_over(self.said(), wanted) for wanted in own)

    def release(self) -> Release | None:
        """The released checkpoint that it is for, if it names one."""
        return presets.RELEASES.get(Path(self.checkpoint_path or "").name)

    _file: str = PrivateAttr("the config")

    def model_post_init(self, context: Any, /) -> None:
        if context is not None:
            self._file = str(context)

    def title(self) -> str:
        """What it is, at the beginning of a sentence about a model."""
        if self.checkpoint_path is None:
            return self._file
        return f"a config for {self.checkpoint_path}"

    def notes(self) -> tuple[str, ...]:
        """What of this file has no effect, in words for the user."""
        parts = []
        if fixed := [key for key in DECIDED_ELSEWHERE if getattr(self, key) is not None]:
            parts.append(f"{', '.join(fixed)} (a bundle's own files and types count)")
        if self.downscale_factor is not None and not self.multi_scale:
            parts.append("downscale_factor (of multi-scale pipelines)")
        if self.prompt_enhancement_words_threshold:
            parts.append("prompts are not enhanced by a language model")
        return (f"without effect in the config: {'; '.join(parts)}",) if parts else ()


class Shipped(PipelineConfig):
    """A preset. It names no file of the user's; `note` is on how it was chosen."""

    name: str
    note: str | None = None

    @classmethod
    def of(cls, preset: Preset, note: str | None = None) -> Self:
        own = {"name": preset.name, "note": note, "checkpoint_path": preset.release.file}
        return cls.model_validate({**preset.settings, **own})

    def title(self) -> str:
        return f"the preset {self.name}"

    def notes(self) -> tuple[str, ...]:
        found = () if self.note is None else (self.note,)
        if presets.find(self.name).precision == "bfloat16":
            return found
        plain = self.name.removesuffix("-fp8")
        return (*found, f"{self.title()} runs as {plain}; the bundle's own precision counts")


def load(path: Path) -> PipelineConfig:
    """The file, or the preset that stands for it.

    Raises:
        UserError: it is not there, or says what cannot be understood.
    """
    if str(path).startswith(presets.PREFIX):
        return Shipped.of(presets.find(str(path).removeprefix(presets.PREFIX)))
    try:
        text = path.read_bytes()
    except FileNotFoundError:  # users of the original name its configs/*.yaml without having them
        if path.suffix != ".yaml" or path.stem not in presets.PRESETS:
            raise UserError(f"{path}: No such file or directory{_meant(path)}") from None
        note = f"{path} is not there, so the preset {path.stem} counts"
        return Shipped.of(presets.PRESETS[path.stem], note)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    config = _parsed(path, text)
    _check_passes(path, config)
    return config


def over(defaults: Defaults, config: PipelineConfig) -> Defaults:
    """The config where it says something, else the defaults.

    A config that says its pipeline_type is whole: the defaults' lists, which go along with
    schedules and scales of their own, are then not mixed with it.

    Raises:
        UserError: it says of one pass what is different in two.
    """
    changes = {key: said for key in SIZES if (said := getattr(config, key)) is not None}
    changes |= _decode(config)
    if config.pipeline_type is not None:
        whole = defaults.without_lists()
        first, *rest = (whole.changed(said) for said in config.passes())
        changes["second"] = rest[0] if rest else None
    else:
        (said,) = config.passes()
        first = defaults.changed(said)
        if defaults.second is not None:
            if "timesteps" in said:
                raise UserError(
                    "this model makes two passes, and timesteps are of one; give a config with "
                    "pipeline_type: multi-scale, first_pass and second_pass, or with base"
                )
            changes["second"] = defaults.second.changed(said)
    return defaults.model_copy(update=dict(first) | changes)


def resolve_stg_mode(word: str) -> StgMode | None:
    """The mode of that name; None for `residual`, which never had an effect in these models."""
    if (mode := STG_MODES.get(word.lower())) is None:
        raise UserError(
            f"unknown stg_mode {word!r}{nearest(word.lower(), STG_MODES)}; "
            f"known are {', '.join(STG_MODES)}"
        )
    return None if mode == "residual" else mode


def _over(shared: dict[str, Any], own: Pass | None) -> dict[str, Any]:
    """A pass with steps of its own has no use for those that are said for both."""
    said = {} if own is None else own.said()
    if {"timesteps", "num_inference_steps"} & said.keys():
        steps = ("timesteps", "num_inference_steps", *NO_SKIPS)
        shared = {key: value for key, value in shared.items() if key not in steps}
    return shared | said


def _decode(config: PipelineConfig) -> dict[str, float]:
    """Without a noise scale of its own, a config's decode timestep is the scale too."""
    found = {"decode_timestep": config.decode_timestep}
    found["decode_noise_scale"] = config.decode_noise_scale
    if config.decode_noise_scale is None:
        found["decode_noise_scale"] = config.decode_timestep
    return {key: value for key, value in found.items() if value is not None}


def _parsed(path: Path, text: bytes) -> PipelineConfig:
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold keys and values, not {type(data).__name__}")
    for key in data:
        if not isinstance(key, str):
            raise UserError(f"{path}: keys must be words, not {key!r}")
    try:
        return PipelineConfig.model_validate(data, context=path.name)
    except ValidationError as error:
        raise UserError(f"{path}: {strict.problem(error, data, PipelineConfig)}") from None


def _check_passes(path: Path, config: PipelineConfig) -> None:
    own = {"first_pass": config.first_pass, "second_pass": config.second_pass}
    for key, wanted in own.items():
        if config.multi_scale and wanted is None:
            raise UserError(f"{path}: {key} is missing, which pipeline_type: multi-scale wants")
        if wanted is not None and not config.multi_scale:
            raise UserError(
                f"{path}: {key} is of pipeline_type: multi-scale; say that, or leave {key} out"
            )
    for key, wanted in (("the file", config), *own.items()):
        if wanted is not None and None not in (wanted.timesteps, wanted.num_inference_steps):
            where = "" if wanted is config else f"{key}: "
            raise UserError(f"{path}: {where}give timesteps or num_inference_steps, not both")
    if config.multi_scale and not _starts_below(config.passes()[1]):
        raise UserError(
            f"{path}: second_pass starts from the upsampled first one; give it timesteps below 1, "
            "or num_inference_steps with skip_initial_inference_steps"
        )


def _starts_below(second: dict[str, Any]) -> bool:
    """Whether its first noise level is not pure noise."""
    if (levels := second.get("timesteps")) is not None:
        return bool(levels) and levels[0] < 1
    return bool(second.get("num_inference_steps") and second.get("skip_initial_inference_steps"))


def _meant(path: Path) -> str:
    """The name of a preset that is nearly that of the missing file."""
    return nearest(path.name, (f"{name}.yaml" for name in presets.PRESETS))
