"""What a run shall do: the command line before the pipeline config before the bundle's defaults."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ltx_engines import pipeline_config, presets
from ltx_engines.bundle import Bundle, Manifest
from ltx_engines.defaults import DOWNSCALE_FACTOR, Defaults, Pass
from ltx_engines.errors import UserError
from ltx_engines.pipeline_config import PipelineConfig, resolve_stg_mode
from ltx_trt import SEED
from ltx_trt.conditioning import Item
from ltx_trt.guidance import Guidance
from ltx_trt.long_video import Chunks, chunked, parse_prompts
from ltx_trt.sampler import SAMPLERS
from ltx_trt.schedule import Steps
from ltx_trt.step_caching import Caching
from ltx_trt.tokens import tokenizer_entry

T = TypeVar("T")

LARGEST = 32768
"""Pixels or frames. Far beyond any model, and small enough to count tokens with."""


@dataclass(frozen=True, slots=True)
class SecondPass:
    """What the second pass does in its own way. The first one is made at `downscale_factor` of the
    wished size, the second at twice the first one's, and the frames are resized to the wish."""

    steps: Steps = field(default_factory=Steps)
    guidance: Guidance = field(default_factory=Guidance)
    sampler: str = "euler"
    tone_map_compression_ratio: float = 0.0
    downscale_factor: float = DOWNSCALE_FACTOR

    def __post_init__(self) -> None:
        _check_sampler(self.sampler)
        _check_share("tone_map_compression_ratio", self.tone_map_compression_ratio)
        if not 0 < self.downscale_factor <= 1:
            raise UserError(
                f"downscale_factor must be above 0 and at most 1, not {self.downscale_factor:g}"
            )


@dataclass(frozen=True, slots=True)
class Request:
    """One clip. Sizes are as wished; `strict_shape` refuses those that the model cannot make.

    `input_video` [1, 3, frames, height, width] in -1..1 is what video-to-video starts from;
    equality of requests leaves it out, for arrays have none of their own.
    """

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
    conditioning: tuple[Item, ...] = ()
    image_cond_noise_scale: float = 0.15
    input_video: NDArray[np.float32] | None = field(default=None, compare=False)
    tone_map_compression_ratio: float = 0.0
    second: SecondPass | None = None
    caching: Caching | None = None
    chunks: Chunks | None = None

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
        _check_sampler(self.sampler)
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta is of the sampler ddim; {self.sampler} has no use for it")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must be from 0 to 1, not {self.eta:g}")
        for name in ("decode_timestep", "decode_noise_scale", "tone_map_compression_ratio"):
            _check_share(name, getattr(self, name))
        if not 0 <= self.image_cond_noise_scale < math.inf:
            raise UserError(
                f"image_cond_noise_scale must be 0 or more, not {self.image_cond_noise_scale:g}"
            )


def _check_sampler(name: str) -> None:
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}, known are {', '.join(SAMPLERS)}")


def _check_share(name: str, share: float) -> None:
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
    image: tuple[str, ...] = ()
    video: tuple[str, ...] = ()
    input_video: str | None = None
    input_media_path: str | None = None
    resize: bool = False
    image_cond_noise_scale: float | None = None
    conditioning_media_paths: tuple[str, ...] = ()
    conditioning_strengths: tuple[float, ...] = ()
    conditioning_start_frames: tuple[int, ...] = ()
    chunk: float | None = None
    prompt_at: tuple[str, ...] = ()


def resolve(
    wishes: Wishes, bundle: Bundle, config: PipelineConfig | None = None
) -> tuple[Request, tuple[str, ...]]:
    """The request, and notes on what of the config has no effect.

    Raises:
        UserError: it is not for this bundle, or contradicts itself.
    """
    manifest = bundle.manifest
    config = config or PipelineConfig()
    notes = (*config.notes(), *_fit(config, manifest), *_fixed_length(config, bundle))
    defaults = pipeline_config.over(manifest.defaults, config)
    if defaults.second is not None:
        _check_upsampler(defaults, wishes, config, bundle)
    mode, more = _with_mode(config, bundle)
    passes = [_wished(wanted, wishes).model_copy(update=mode) for wanted in defaults.passes]
    for wanted in passes:
        wanted.check_guidance(distilled=manifest.allowed_inference_steps is not None)
        if (release := config.release()) is not None and release.distilled:
            wanted.check_guidance(distilled=True, what=config.title())
    walks = [_walk(wanted, wishes, config) for wanted in passes]
    notes += (*more, *_without_effect(wishes, [walk.guidance for walk in walks]))
    first, *rest = walks
    request = Request(
        prompt=wishes.prompt,
        negative_prompt=_first(wishes.negative_prompt, defaults.negative_prompt),
        width=_first(wishes.width, defaults.width),
        height=_first(wishes.height, defaults.height),
        num_frames=_first(wishes.num_frames, defaults.num_frames),
        frame_rate=_first(wishes.frame_rate, defaults.frame_rate),
        seed=wishes.seed,
        steps=first.steps,
        guidance=first.guidance,
        sampler=first.sampler,
        eta=wishes.eta,
        decode_timestep=defaults.decode_timestep,
        decode_noise_scale=defaults.decode_noise_scale,
        strict_shape=wishes.strict_shape,
        tone_map_compression_ratio=first.tone_map_compression_ratio,
        second=replace(rest[0], downscale_factor=defaults.downscale_factor) if rest else None,
    )
    chunks = _chunks(wishes, request, defaults.num_frames)
    if chunks is None and wishes.chunk is not None:
        seconds = request.num_frames / request.frame_rate
        notes += (f"--chunk {wishes.chunk:g} has no effect: the clip has {seconds:.3g} seconds",)
    return replace(request, chunks=chunks), notes


def _chunks(wishes: Wishes, request: Request, usual: int) -> Chunks | None:
    """`usual` frames are what the model is made for."""
    frames, rate = request.num_frames, request.frame_rate
    chunks = chunked(wishes.chunk, frames, rate, usual)
    prompts = parse_prompts(wishes.prompt_at, frames, rate)
    if chunks is None and prompts:
        raise UserError(
            "--prompt-at is of clips that are made in chunks, this one is made in one piece; say "
            "how long a chunk is: --chunk SECONDS"
        )
    return None if chunks is None else replace(chunks, prompts=prompts)


def _fit(config: PipelineConfig, manifest: Manifest) -> tuple[str, ...]:
    if (release := config.release()) is None:
        return ()
    distilled = manifest.allowed_inference_steps is not None
    layers = manifest.model.num_layers
    return presets.fit(release, config.title(), layers, distilled=distilled)


def _check_upsampler(
    defaults: Defaults, wishes: Wishes, config: PipelineConfig, bundle: Bundle
) -> None:
    """Two passes can be made, and be counted if they shall be."""
    what = config.title() if config.multi_scale else "this bundle's default"
    if "latent_upsampler" not in bundle.manifest.stages:
        file = config.spatial_upscaler_model_path or "ltxv-spatial-upscaler-0.9.8.safetensors"
        raise UserError(
            f"{what} makes two passes with a latent upsampler between them, and the bundle has no "
            f"stage latent_upsampler; export one with `ltx-export onnx --upsampler {file}`"
        )
    if wishes.num_inference_steps is not None and defaults.timesteps is not None:
        raise UserError(
            f"{what} names the noise levels of its two passes, which --num-inference-steps "
            f"{wishes.num_inference_steps} cannot; leave it out, or give a --pipeline-config with "
            "others"
        )


def _wished(wanted: Pass, wishes: Wishes) -> Pass:
    """A wish counts for both passes."""
    if wishes.num_inference_steps is not None:
        wanted = wanted.counted(wishes.num_inference_steps)
    scales = ("guidance_scale", "stg_scale", "rescaling_scale")
    told = {scale: wish for scale in scales if (wish := getattr(wishes, scale)) is not None}
    return wanted.model_copy(update=told)


def _walk(wanted: Pass, wishes: Wishes, config: PipelineConfig) -> SecondPass:
    """A pass in the words of whoever runs it."""
    return SecondPass(
        steps=Steps(
            num_inference_steps=wanted.num_inference_steps,
            timesteps=wanted.timesteps,
            skip_initial=wanted.skip_initial_inference_steps,
            skip_final=wanted.skip_final_inference_steps,
            source=config.sampler or "from_checkpoint",
        ),
        guidance=Guidance(
            guidance_scale=wanted.guidance_scale,
            stg_scale=wanted.stg_scale,
            rescaling_scale=wanted.rescaling_scale,
            skip_block_list=wanted.skip_block_list,
            guidance_timesteps=wanted.guidance_timesteps,
            cfg_star_rescale=wanted.cfg_star_rescale,
        ),
        sampler=wishes.sampler or ("stochastic" if wanted.stochastic_sampling else "euler"),
        tone_map_compression_ratio=wanted.tone_map_compression_ratio,
    )


def _fixed_length(config: PipelineConfig, bundle: Bundle) -> tuple[str, ...]:
    wished = config.text_encoder_max_tokens
    if wished is None or wished == (baked := tokenizer_entry(bundle).max_length):
        return ()
    return (f"text_encoder_max_tokens has no effect: this bundle was exported with {baked}",)


def _without_effect(wishes: Wishes, guidances: Sequence[Guidance]) -> tuple[str, ...]:
    """Options that were given and do nothing beside the others."""
    notes = []
    if wishes.stg_scale and not any(guidance.skip_block_list for guidance in guidances):
        notes.append("--stg-scale has no effect: no block is named to be perturbed")
    if wishes.rescaling_scale is not None and not any(g.perturbs for g in guidances):
        notes.append("--rescaling-scale has no effect without --stg-scale")
    if wishes.resize and not wishes.video and wishes.input_video is None:
        notes.append("--resize has no effect without --video or --input-video")
    return tuple(notes)


def _first(wish: T | None, other: T) -> T:
    return other if wish is None else wish


def _with_mode(config: PipelineConfig, bundle: Bundle) -> tuple[dict[str, None], tuple[str, ...]]:
    """What the config's mode changes in a pass. The mode is part of the exported graph, so any
    other than the bundle's own is refused."""
    if config.stg_mode is None:
        return {}, ()
    baked = bundle.manifest.model.stg_mode
    mode = resolve_stg_mode(config.stg_mode)
    if mode is None:
        note = f"stg_mode {config.stg_mode} has no effect in LTX-Video; nothing is perturbed"
        return {"skip_block_list": None}, (note,)
    if mode != baked:
        raise UserError(
            f"stg_mode is {mode}, but this bundle was exported with {baked}; export one with "
            f"`ltx-export onnx --stg-mode {mode}`"
        )
    return {}, ()
