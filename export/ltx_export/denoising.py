"""One seed through any model: the same noise, the same texts, the same steps of ltx_ref."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ltx_engines.bundle import Defaults
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_export import pipeline_defaults
from ltx_export.ladder import Output
from ltx_export.pipeline_defaults import Pipeline
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video import model as ltx_video
from ltx_ref.ltx_video.conditioning import coordinates
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX, ModelConfig, SchedulerConfig
from ltx_ref.ltx_video.guidance import Guidance, GuidedDenoiser, Prompts, VelocityModel
from ltx_ref.ltx_video.pipeline import Request, levels, seeded
from ltx_ref.ltx_video.sampling import euler, stochastic
from ltx_ref.ltx_video.transformer import StgMode, Transformer
from ltx_ref.offload import offloaded
from ltx_ref.quantized import BLOCKS
from ltx_ref.tensor_file import TensorFile, put
from ltx_ref.text import encode, load_text_encoder, load_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a transformer was called with."""

    latents: Tensor
    coords: Tensor
    timestep: Tensor
    prompt_embeds: Tensor
    prompt_mask: Tensor
    skip_layer_mask: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Walk:
    """From the noise of one seed to latents."""

    config: ModelConfig
    request: Request
    prompts: Prompts
    seed: int
    sigmas: tuple[float, ...]
    """The last one is 0."""

    def latents(self, model: VelocityModel, dtype: torch.dtype) -> NDArray[np.float32]:
        """[1, tokens, channels] after all steps; `dtype` is the model's."""
        *_, last = self._steps(model, dtype)
        return _array(last)

    def outputs(
        self, model: VelocityModel, dtype: torch.dtype
    ) -> tuple[dict[Output, NDArray[np.float32]], Inputs]:
        """Both outputs, and the inputs of the first step."""
        recorder = Recorder(model)
        latents = self.latents(recorder, dtype)
        if recorder.inputs is None or recorder.velocity is None:
            raise AssertionError("a walk without a step")
        return {"velocity": _array(recorder.velocity), "latents": latents}, recorder.inputs

    def velocity(self, model: VelocityModel, inputs: Inputs) -> NDArray[np.float32]:
        """[branches, tokens, channels] of one step."""
        with torch.no_grad():
            return _array(model(**inputs.tensors(), stg_mode=self.request.stg_mode))

    @torch.no_grad()
    def _steps(self, model: VelocityModel, dtype: torch.dtype) -> Iterator[Tensor]:
        config, grid, draw = self.config.transformer, self.request.grid, seeded(self.seed)
        denoiser = GuidedDenoiser(
            model=model,
            coords=coordinates(
                grid, self.request.frame_rate, causal=config.causal_temporal_positioning
            ),
            prompts=self.prompts,
            guidance=self.request.guidance,
            num_layers=config.num_layers,
            dtype=dtype,
            stg_mode=self.request.stg_mode,
        )
        shape = (1, grid.tokens, config.in_channels)
        if self.request.sampler == "stochastic":
            yield from stochastic(denoiser, draw(shape), self.sigmas, lambda: draw(shape))
        else:
            yield from euler(denoiser, draw(shape), self.sigmas)


class Recorder:
    """A model, and what its first call was and gave."""

    def __init__(self, model: VelocityModel) -> None:
        self.model = model
        self.inputs: Inputs | None = None
        self.velocity: Tensor | None = None

    def __call__(
        self,
        latents: Tensor,
        coords: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        skip_layer_mask: Tensor,
        *,
        stg_mode: StgMode,
    ) -> Tensor:
        inputs = Inputs(latents, coords, timestep, prompt_embeds, prompt_mask, skip_layer_mask)
        velocity = self.model(**inputs.tensors(), stg_mode=stg_mode)
        if self.inputs is None:
            self.inputs, self.velocity = inputs, velocity
        return velocity


def pipeline(path: Path | None, config: ModelConfig, stg_mode: StgMode | None) -> Pipeline:
    """What a walk follows: of a file of two passes the first one, which is said.

    Raises:
        UserError: as `pipeline_defaults.read`.
    """
    found = pipeline_defaults.read(path, config, stg_mode)
    if found.defaults.second is not None:
        log.warning(
            "%s makes two passes: the steps and the guidance of the first one are followed", path
        )
    return found


def request(
    pipeline: Pipeline, shape: VideoShape, steps: int | None, config: ModelConfig
) -> tuple[Request, ModelConfig]:
    """What the model's defaults say, for this clip; the configuration with the schedule in use.

    Raises:
        UserError: the model does not know these steps, or its noise levels are given by name and
            the steps are counted, or the guidance contradicts itself.
    """
    defaults = pipeline.defaults
    if steps is not None and defaults.timesteps is not None:
        raise UserError(
            f"--steps {steps}: this model's {len(defaults.timesteps)} noise levels are given by "
            "name; leave --steps out"
        )
    made = Request(
        num_frames=shape.frames,
        height=shape.height,
        width=shape.width,
        frame_rate=defaults.frame_rate,
        num_inference_steps=steps or defaults.num_inference_steps,
        skip_final_inference_steps=0 if steps else defaults.skip_final_inference_steps,
        timesteps=defaults.timesteps,
        sampler="stochastic" if defaults.stochastic_sampling else "euler",
        guidance=_guidance(defaults),
        stg_mode=pipeline.stg_mode,
    )
    scheduled = replace(config, scheduler=SchedulerConfig(**pipeline.scheduler.model_dump()))
    try:
        levels(scheduled, made)
    except ValueError as error:
        if steps is None:
            raise UserError(f"the pipeline's configuration: {error}") from None
        raise UserError(f"--steps {steps}: {error}; leave --steps out") from None
    return made, scheduled


def _guidance(defaults: Defaults) -> Guidance:
    try:
        return Guidance(
            guidance_scale=defaults.guidance_scale,
            stg_scale=defaults.stg_scale,
            rescaling_scale=defaults.rescaling_scale,
            skip_block_list=defaults.skip_block_list or (),
            guidance_timesteps=defaults.guidance_timesteps,
            cfg_star_rescale=defaults.cfg_star_rescale,
        )
    except ValueError as error:
        raise UserError(f"the pipeline's configuration: {error}") from None


@torch.no_grad()
def prompts(folder: Path, texts: tuple[str, str], max_length: int) -> Prompts:
    """The embeddings of a prompt and of the negative one, in float32; the encoder is freed."""
    tokenizer = load_tokenizer(folder, max_length)
    embeds, mask = encode(load_text_encoder(folder), tokenizer, texts)
    wide, kept = embeds.float(), mask.float()
    return Prompts(wide[:1], kept[:1], wide[1:], kept[1:])


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint as a transformer in one element type; codes stay codes."""

    path: Path
    dtype: torch.dtype
    device: str = "cpu"
    one_block: bool = False
    """Blocks are read when their turn comes."""
    ignore: tuple[str, ...] = ()

    @contextmanager
    def opened(self) -> Iterator[Transformer]:
        if not self.one_block:
            model = ltx_video.load(self.path, self.ignore, device=self.device)
            yield model.transformer.to(self.dtype)
            return
        model = ltx_video.skeleton(read_header(self.path), self.ignore)
        with offloaded(model, self.path, self.device):
            transformer = model.transformer.to(self.dtype)
            for block in transformer.transformer_blocks:
                block.register_forward_pre_hook(self._settle)  # behind the one that reads
            yield transformer

    def _settle(self, block: nn.Module, _: object) -> None:
        block.to(self.dtype)

    def block(self, transformer: Transformer, index: int) -> nn.Module:
        """One block with its weights, whether or not the open transformer has them now."""
        if not self.one_block:
            return transformer.transformer_blocks[index]
        header = read_header(self.path)
        model = ltx_video.skeleton(header, self.ignore)
        block = model.transformer.transformer_blocks[index]
        with TensorFile(header) as file:
            for name in block.state_dict():
                path = f"{TRANSFORMER_PREFIX}{BLOCKS}.{index}.{name}"
                put(block, name, file.read(path, self.device))
        return block.to(self.dtype)


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A transformer that is called from the CPU."""

    transformer: Transformer
    device: str

    def __call__(
        self,
        latents: Tensor,
        coords: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        skip_layer_mask: Tensor,
        *,
        stg_mode: StgMode,
    ) -> Tensor:
        inputs = Inputs(latents, coords, timestep, prompt_embeds, prompt_mask, skip_layer_mask)
        there = {name: tensor.to(self.device) for name, tensor in inputs.tensors().items()}
        velocity: Tensor = self.transformer(**there, stg_mode=stg_mode)
        return velocity.cpu()


def _array(tensor: Tensor) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = tensor.float().numpy()
    return numbers
