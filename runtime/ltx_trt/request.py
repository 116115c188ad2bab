"""What a run shall do: the command line before the pipeline config before the bundle's defaults."""

from dataclasses import dataclass, field, replace
from typing import TypeVar

from ltx_engines.bundle import Bundle, Defaults
from ltx_engines.errors import UserError
from ltx_engines.pipeline_config import PipelineConfig, resolve_stg_mode
from ltx_trt import SEED
from ltx_trt.guidance import Blocks, Guidance, PerStep
from ltx_trt.sampler import SAMPLERS
from ltx_trt.schedule import Steps
from ltx_trt.tokens import tokenizer_entry

T = TypeVar("T")

LARGEST = 32768
"""Pixels or frames. Far beyond any model, and small enough to count tokens with."""


@dataclass(frozen=True, slots=True)
class Request:
    """One clip. Sizes are as wished; `strict_shape` refuses those that the model cannot make."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    frame_rate: float
    seed: int = SEED
    steps: Steps = field(default_factory=Steps)
    guidance: Guidance = field(default_factory=Guidance)
    sampler: str = "euler"
    eta: float = 0.0
    decode_timestep: float = 0.05
    decode_noise_scale: float = 0.025
    strict_shape: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError("the prompt is empty; say what the clip shows: --prompt TEXT")
        for name in ("width", "height", "num_frames"):
            if not 1 <= (size := getattr(self, name)) <= LARGEST:
                raise UserError(f"{name} must be from 1 to {LARGEST}, not {size}")
        if not 1 <= self.frame_rate <= 240:
            raise UserError(f"frame rate must be from 1 to 240, not {self.frame_rate:g}")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed must be from 0 to 2^64 - 1, not {self.seed}")
        if self.sampler not in SAMPLERS:
            raise UserError(f"unknown sampler {self.sampler!r}, known are {', '.join(SAMPLERS)}")
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta is of the sampler ddim; {self.sampler} has no use for it")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must be from 0 to 1, not {self.eta:g}")
        for name, share in (
            ("decode_timestep", self.decode_timestep),
            ("decode_noise_scale", self.decode_noise_scale),
        ):
            if not 0 <= share <= 1:
                raise UserError(f"{name} must be from 0 to 1, not {share:g}")


@dataclass(frozen=True, slots=True)
class Wishes:
    """The command line's part; None leaves the choice to the config or the bundle."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    frame_rate: float | None = None
    seed: int = SEED
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    stg_scale: float | None = None
    rescaling_scale: float | None = None
    sampler: str | None = None
    eta: float = 0.0
    strict_shape: bool = False


def resolve(
    wishes: Wishes, bundle: Bundle, config: PipelineConfig | None = None
) -> tuple[Request, tuple[str, ...]]:
    """The request, and notes on what of the config has no effect."""
    defaults = bundle.manifest.defaults
    notes = () if config is None else config.notes()
    steps, guidance = _steps(defaults), _guidance(defaults)
    sampler = "stochastic" if defaults.stochastic_sampling else "euler"
    request = Request(
        prompt=wishes.prompt,
        negative_prompt=_first(wishes.negative_prompt, defaults.negative_prompt),
        width=_first(wishes.width, defaults.width),
        height=_first(wishes.height, defaults.height),
        num_frames=_first(wishes.num_frames, defaults.num_frames),
        frame_rate=_first(wishes.frame_rate, defaults.frame_rate),
        seed=wishes.seed,
        decode_timestep=defaults.decode_timestep,
        decode_noise_scale=defaults.decode_noise_scale,
        strict_shape=wishes.strict_shape,
    )
    if config is not None:
        steps, guidance = _with_steps(steps, config), _with_guidance(guidance, config)
        request = _with_size(_with_decode(request, config), wishes, config)
        if config.stochastic_sampling is not None:
            sampler = "stochastic" if config.stochastic_sampling else "euler"
        guidance, more = _with_mode(guidance, config, bundle)
        notes += (*more, *_fixed_length(config, bundle))
    if wishes.num_inference_steps is not None:
        steps = replace(steps, num_inference_steps=wishes.num_inference_steps, timesteps=None)
    guidance = replace(
        guidance,
        guidance_scale=_first(wishes.guidance_scale, guidance.guidance_scale),
        stg_scale=_first(wishes.stg_scale, guidance.stg_scale),
        rescaling_scale=_first(wishes.rescaling_scale, guidance.rescaling_scale),
    )
    sampler = _first(wishes.sampler, sampler)
    notes += _without_effect(wishes, guidance)
    return replace(request, steps=steps, guidance=guidance, sampler=sampler, eta=wishes.eta), notes


def _fixed_length(config: PipelineConfig, bundle: Bundle) -> tuple[str, ...]:
    baked = tokenizer_entry(bundle).max_length
    if config.text_encoder_max_tokens in (None, baked):
        return ()
    return (f"text_encoder_max_tokens has no effect: this bundle was exported with {baked}",)


def _without_effect(wishes: Wishes, guidance: Guidance) -> tuple[str, ...]:
    """Options that were given and do nothing beside the others."""
    notes = []
    if wishes.stg_scale and not guidance.skip_block_list:
        notes.append("--stg-scale has no effect: no block is named to be perturbed")
    if wishes.rescaling_scale is not None and not guidance.perturbs:
        notes.append("--rescaling-scale has no effect without --stg-scale")
    return tuple(notes)


def _first(wish: T | None, other: T) -> T:
    return other if wish is None else wish


def _steps(defaults: Defaults) -> Steps:
    return Steps(
        num_inference_steps=defaults.num_inference_steps,
        timesteps=defaults.timesteps,
        skip_initial=defaults.skip_initial_inference_steps,
        skip_final=defaults.skip_final_inference_steps,
    )


def _guidance(defaults: Defaults) -> Guidance:
    return Guidance(
        guidance_scale=defaults.guidance_scale,
        stg_scale=defaults.stg_scale,
        rescaling_scale=defaults.rescaling_scale,
        skip_block_list=defaults.skip_block_list,
        guidance_timesteps=defaults.guidance_timesteps,
        cfg_star_rescale=defaults.cfg_star_rescale,
    )


def _with_steps(steps: Steps, config: PipelineConfig) -> Steps:
    """A config that says how many steps replaces a default list of them, and the reverse."""
    if config.timesteps is not None:
        steps = replace(steps, timesteps=tuple(config.timesteps), skip_initial=0, skip_final=0)
    if config.num_inference_steps is not None:
        count = config.num_inference_steps
        steps = Steps(num_inference_steps=count, source=steps.source)
    return replace(
        steps,
        skip_initial=_first(config.skip_initial_inference_steps, steps.skip_initial),
        skip_final=_first(config.skip_final_inference_steps, steps.skip_final),
        source=_first(config.sampler, steps.source),
    )


def _with_guidance(guidance: Guidance, config: PipelineConfig) -> Guidance:
    skipped, times = config.skip_block_list, config.guidance_timesteps
    return Guidance(
        guidance_scale=_frozen(config.guidance_scale, guidance.guidance_scale),
        stg_scale=_frozen(config.stg_scale, guidance.stg_scale),
        rescaling_scale=_frozen(config.rescaling_scale, guidance.rescaling_scale),
        skip_block_list=guidance.skip_block_list if skipped is None else _tuples(skipped),
        guidance_timesteps=guidance.guidance_timesteps if times is None else tuple(times),
        cfg_star_rescale=_first(config.cfg_star_rescale, guidance.cfg_star_rescale),
    )


def _with_decode(request: Request, config: PipelineConfig) -> Request:
    """Without a noise scale of its own, a config's decode timestep is the scale too."""
    timestep, scale = config.decode_timestep, config.decode_noise_scale
    return replace(
        request,
        decode_timestep=_first(timestep, request.decode_timestep),
        decode_noise_scale=_first(scale, _first(timestep, request.decode_noise_scale)),
    )


def _with_size(request: Request, wishes: Wishes, config: PipelineConfig) -> Request:
    """The config's size, rate and negative prompt, where the command line says nothing."""
    words = ("width", "height", "num_frames", "frame_rate", "negative_prompt")
    told = {
        word: getattr(config, word)
        for word in words
        if getattr(wishes, word) is None and getattr(config, word) is not None
    }
    return replace(request, **told)


def _with_mode(
    guidance: Guidance, config: PipelineConfig, bundle: Bundle
) -> tuple[Guidance, tuple[str, ...]]:
    """The mode is part of the exported graph, so any other than the bundle's own is refused."""
    if config.stg_mode is None:
        return guidance, ()
    baked = bundle.manifest.model.stg_mode
    mode = resolve_stg_mode(config.stg_mode)
    if mode is None:
        note = f"stg_mode {config.stg_mode} has no effect in LTX-Video; nothing is perturbed"
        return replace(guidance, skip_block_list=None), (note,)
    if mode != baked:
        raise UserError(
            f"stg_mode is {mode}, but this bundle was exported with {baked}; export one with "
            f"`ltx-export onnx --stg-mode {mode}`"
        )
    return guidance, ()


def _frozen(wish: float | list[float] | None, other: PerStep) -> PerStep:
    if wish is None:
        return other
    return tuple(wish) if isinstance(wish, list) else wish


def _tuples(skipped: list[int] | list[list[int]]) -> Blocks | tuple[Blocks, ...]:
    nested = tuple(tuple(entry) for entry in skipped if isinstance(entry, list))
    return nested or tuple(entry for entry in skipped if isinstance(entry, int))
