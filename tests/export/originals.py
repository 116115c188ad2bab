"""The original's pipelines with a checkpoint's weights, and our random numbers played to them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltx_ref.ltx_video import model as reference
from ltx_ref.ltx_video import upsampler
from ltx_trt.guidance import Guidance
from ltx_trt.noise import Noise
from ltx_trt.request import Request, SecondPass
from tests.ref import test_upsampler_oracle
from tests.ref.test_pipeline_oracle import listed, original

Floats = NDArray[np.float32]


class Tape(Noise):
    """A stream of noise that remembers; `samples` is what was drawn for posterior samples, `shapes`
    are of all, in order."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.noises: list[Tensor] = []
        self.samples: list[Tensor] = []
        self.shapes: list[tuple[int, ...]] = []
        self._drawn = self.noises

    def normal(self, shape: tuple[int, ...]) -> Floats:
        noise = super().normal(shape)
        self._drawn.append(torch.from_numpy(noise.copy()))
        self.shapes.append(shape)
        return noise

    @contextmanager
    def sampling(self) -> Iterator[None]:
        self._drawn = self.samples
        yield
        self._drawn = self.noises

    @contextmanager
    def played(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Whoever wants noise gets the first of its shape that is left, and all is taken.

        The original samples each item when it comes to it, and draws for this without a generator;
        ours are sampled before all else.
        """
        samples, noises = list(self.samples), list(self.noises)

        def randn(shape: Sequence[int], **options: Any) -> Tensor:
            pools = (noises,) if options.get("generator") is not None else (samples, noises)
            for pool in pools:
                for index, noise in enumerate(pool):
                    if noise.shape == tuple(shape):
                        return pool.pop(index)
            raise AssertionError(f"the original wants noise that ours did not: {tuple(shape)}")

        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", randn)
            patch.setattr(torch, "randn_like", lambda like: randn(like.shape))
            yield
        assert not samples
        assert not noises


class Original:
    """Both pipelines. The final latents of each pass are `latents`, normalised."""

    def __init__(self, checkpoint: Path, upsampler_file: Path) -> None:
        self._pipeline = original(reference.load(checkpoint))
        from ltx_video.pipelines.pipeline_ltx_video import LTXMultiScalePipeline

        enlarger = test_upsampler_oracle.original(upsampler.load(upsampler_file))
        self._multi_scale = LTXMultiScalePipeline(self._pipeline, enlarger)
        self.latents: list[Tensor] = []
        self._pipeline.patchifier = _Listening(self._pipeline.patchifier, self.latents)

    def __call__(self, request: Request, texts: Mapping[str, Tensor]) -> Tensor:
        """Pixels [1, 3, frames, height, width] from 0 to 1."""
        from ltx_video.pipelines.pipeline_ltx_video import ConditioningItem

        self.latents.clear()
        items = [
            ConditioningItem(torch.from_numpy(item.pixels), item.frame, item.strength)
            for item in request.conditioning
        ]
        video = request.input_video
        options: dict[str, Any] = {
            "height": request.height,
            "width": request.width,
            "num_frames": request.num_frames,
            "frame_rate": request.frame_rate,
            "negative_prompt": None,
            "generator": torch.Generator(),
            "output_type": "pt",
            "decode_timestep": request.decode_timestep,
            "decode_noise_scale": request.decode_noise_scale,
            "is_video": True,
            "vae_per_channel_normalize": True,
            "image_cond_noise_scale": request.image_cond_noise_scale,
            "conditioning_items": items or None,
            "media_items": None if video is None else torch.from_numpy(video),
            **texts,
        }
        if (second := request.second) is None:
            images: Tensor = self._pipeline(**options, **_words(request)).images
            return images
        options["downscale_factor"] = second.downscale_factor
        options["first_pass"], options["second_pass"] = _words(request), _words(second)
        images = self._multi_scale(**options).images
        return images


def _words(one: Request | SecondPass) -> dict[str, Any]:
    from ltx_video.utils.skip_layer_strategy import SkipLayerStrategy

    steps, guidance = one.steps, one.guidance
    count = None if steps.timesteps else steps.num_inference_steps
    tone = one.tone_map_compression_ratio
    if isinstance(one, Request) and one.second is not None:
        tone = 0.0
    return {
        "num_inference_steps": count,
        "timesteps": listed(steps.timesteps),
        "skip_initial_inference_steps": steps.skip_initial,
        "skip_final_inference_steps": steps.skip_final,
        "stochastic_sampling": one.sampler == "stochastic",
        "tone_map_compression_ratio": tone,
        "skip_layer_strategy": SkipLayerStrategy.AttentionValues,
        **_guidance(guidance),
    }


def _guidance(guidance: Guidance) -> dict[str, Any]:
    return {
        "guidance_scale": listed(guidance.guidance_scale),
        "stg_scale": listed(guidance.stg_scale),
        "rescaling_scale": listed(guidance.rescaling_scale),
        "skip_block_list": listed(guidance.skip_block_list),
        "guidance_timesteps": listed(guidance.guidance_timesteps),
        "cfg_star_rescale": guidance.cfg_star_rescale,
    }


class _Listening:
    """A patchifier whose results are kept."""

    def __init__(self, patchifier: Any, heard: list[Tensor]) -> None:
        self._patchifier, self._heard = patchifier, heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._patchifier, name)

    def unpatchify(self, **given: Any) -> Tensor:
        latents: Tensor = self._patchifier.unpatchify(**given)
        self._heard.append(latents.clone())
        return latents
