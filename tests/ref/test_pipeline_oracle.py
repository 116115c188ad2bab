"""The whole text-to-video pipeline against the original's: same weights, same noise, same video."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ltx_ref.ltx_video.config import (
    LINEAR_QUADRATIC,
    SD3_SHIFT,
    Generation,
    ModelConfig,
    TransformerConfig,
)
from ltx_ref.ltx_video.guidance import Guidance, Prompts
from ltx_ref.ltx_video.model import LTXVideo
from ltx_ref.ltx_video.pipeline import (
    Request,
    Step,
    Video,
    decode,
    denoise,
    levels,
    seeded,
    text_to_video,
)
from tests.ref import test_transformer_oracle, test_vae_oracle
from tests.ref.oracles import ORIGINAL_MISSING, difference, normals, randomize

TOLERANCE = 1e-5
"""Relative error after all steps. Guidance multiplies rounding differences, steps add them up."""

TRANSFORMER = TransformerConfig(2, 32, 4, 8, 8, 24, 64, causal_temporal_positioning=True)
REQUEST = Request(
    num_frames=17,
    height=64,
    width=96,
    frame_rate=25.0,
    guidance=Guidance(3.0, 1.0, 0.7, skip_block_list=(2,)),
)

# The original calls torch.meshgrid without `indexing`, and reads a config as an attribute.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning"),
]


def model_of(generation: Generation, seed: int = 1) -> LTXVideo:
    """0.9 has no causal positions and the shifted schedule; its decoder takes no timestep."""
    vae = test_vae_oracle.small(generation, encoder_base_channels=4, decoder_base_channels=4)
    newer = generation == "0.9.5"
    config = ModelConfig(
        replace(TRANSFORMER, causal_temporal_positioning=newer),
        vae,
        LINEAR_QUADRATIC if newer else SD3_SHIFT,
    )
    with torch.device("meta"):
        model = LTXVideo(config)
    randomize(model, seed)
    return model.eval()


def prompts_of(seed: int, batch: int = 1) -> Prompts:
    words = 6
    mask = torch.ones(batch, words, dtype=torch.int64)
    mask[:, 4:] = 0
    negative_mask = torch.ones_like(mask)
    negative_mask[:, 2:] = 0
    positive, negative = (normals(batch, words, 24, seed=seed + i) for i in (0, 1))
    return Prompts(positive, mask, negative, negative_mask)


class Tape:
    """A Draw that remembers, to play the same noise to the original."""

    def __init__(self, seed: int) -> None:
        self.draw = seeded(seed)
        self.noises: list[Tensor] = []

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.noises.append(self.draw(shape))
        return self.noises[-1]

    @contextmanager
    def played(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """The original draws its first noise from a generator, the later ones globally: these
        come from the tape, whose VAE noises it asks for map by map, and are all used."""
        start, *later = self.noises
        rest: list[Tensor] = [
            one for noise in later for one in (noise if _is_maps(noise, start) else noise[None])
        ]
        seeded_randn = torch.randn

        def randn(shape: Sequence[int], **options: Any) -> Tensor:
            if options.get("generator") is not None:
                return seeded_randn(shape, **options)
            assert tuple(shape) == tuple(rest[0].shape)
            return rest.pop(0)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", randn)
            patch.setattr(torch, "randn_like", lambda like: randn(like.shape))
            yield
        assert not rest


def _is_maps(noise: Tensor, start: Tensor) -> bool:
    return noise.ndim == 3 and noise.shape[1:] != start.shape[1:]


def original(model: LTXVideo) -> Any:
    pipelines = pytest.importorskip(
        "ltx_video.pipelines.pipeline_ltx_video", reason=ORIGINAL_MISSING
    )
    from ltx_video.models.transformers.symmetric_patchifier import SymmetricPatchifier
    from ltx_video.schedulers.rf import RectifiedFlowScheduler

    scheduler = model.config.scheduler
    pipeline = pipelines.LTXVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=test_vae_oracle.original(model.vae),
        transformer=test_transformer_oracle.original(model.transformer),
        scheduler=RectifiedFlowScheduler(
            shifting=scheduler.shifting,
            target_shift_terminal=scheduler.target_shift_terminal,
            sampler=scheduler.sampler,
        ),
        patchifier=SymmetricPatchifier(1),
        prompt_enhancer_image_caption_model=None,
        prompt_enhancer_image_caption_processor=None,
        prompt_enhancer_llm_model=None,
        prompt_enhancer_llm_tokenizer=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def listed(value: Any) -> Any:
    """Tuples as the lists that the original wants."""
    return [listed(entry) for entry in value] if isinstance(value, tuple) else value


def ask_original(
    pipeline: Any, prompts: Prompts, request: Request, seed: int, output: str
) -> Tensor:
    from ltx_video.utils.skip_layer_strategy import SkipLayerStrategy

    guidance = request.guidance
    strategies = {
        "attention_values": SkipLayerStrategy.AttentionValues,
        "attention_skip": SkipLayerStrategy.AttentionSkip,
        "transformer_block": SkipLayerStrategy.TransformerBlock,
    }
    images: Tensor = pipeline(
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        frame_rate=request.frame_rate,
        negative_prompt=None,
        num_inference_steps=request.num_inference_steps if request.timesteps is None else None,
        skip_final_inference_steps=request.skip_final_inference_steps,
        timesteps=listed(request.timesteps),
        guidance_scale=listed(guidance.guidance_scale),
        cfg_star_rescale=guidance.cfg_star_rescale,
        skip_layer_strategy=strategies[request.stg_mode],
        skip_block_list=listed(guidance.skip_block_list),
        stg_scale=listed(guidance.stg_scale),
        rescaling_scale=listed(guidance.rescaling_scale),
        guidance_timesteps=listed(guidance.guidance_timesteps),
        generator=torch.Generator().manual_seed(seed),
        prompt_embeds=prompts.positive,
        prompt_attention_mask=prompts.positive_mask,
        negative_prompt_embeds=prompts.negative,
        negative_prompt_attention_mask=prompts.negative_mask,
        output_type=output,
        decode_timestep=request.decode_timestep,
        decode_noise_scale=request.decode_noise_scale,
        stochastic_sampling=request.sampler == "stochastic",
        is_video=True,
        vae_per_channel_normalize=True,
    ).images
    return images


def disagreement(
    model: LTXVideo,
    request: Request,
    monkeypatch: pytest.MonkeyPatch,
    *,
    batch: int = 1,
) -> float:
    """Relative error of the final latents."""
    prompts, tape = prompts_of(seed=5, batch=batch), Tape(seed=11)
    *_, last = denoise(model, prompts, request, tape)
    assert last.lower == 0
    oracle = original(model)
    with tape.played(monkeypatch):
        wanted = ask_original(oracle, prompts, request, seed=11, output="latent")
    return difference(last.latents, wanted)


def test_forty_guided_steps_of_the_newer_models(monkeypatch: pytest.MonkeyPatch) -> None:
    assert disagreement(model_of("0.9.5"), REQUEST, monkeypatch) <= TOLERANCE


def test_forty_guided_steps_of_the_first_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shifted schedule, positions that are not causal."""
    assert disagreement(model_of("0.9"), REQUEST, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "stochastic"},
        {"stg_mode": "attention_skip"},
        {"stg_mode": "transformer_block"},
        {"timesteps": (1.0, 0.9937, 0.975, 0.725, 0.4219)},
        {"skip_final_inference_steps": 3},
        {"num_frames": 1},
        {"height": 32, "width": 32, "num_frames": 9, "frame_rate": 30.0},
    ],
    ids=lambda change: "-".join(change),
)
def test_variants_of_the_run(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(REQUEST, **{"num_inference_steps": 12, **change})
    assert disagreement(model_of("0.9.5"), request, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(1.0, 0.0, 1.0),
        Guidance(5.0, 0.0, 0.7),
        Guidance(1.0, 2.0, 0.7, (0, 3)),
        Guidance(3.0, 1.0, 1.0, (1,)),
        Guidance(3.0, 1.0, 0.7, ()),
        Guidance(3.0, 0.0, 1.0, cfg_star_rescale=True),
        Guidance(6.0, 4.0, 0.5, (2,), cfg_star_rescale=True),
        Guidance(
            guidance_scale=(1, 1, 6, 8, 6, 1, 1),
            stg_scale=(0, 0, 4, 4, 4, 2, 1),
            rescaling_scale=(1, 1, 0.5, 0.5, 1, 1, 1),
            skip_block_list=((), (1, 2, 3), (0, 2), (3,), (2,), (1,), (0,)),
            guidance_timesteps=(1.0, 0.996, 0.9933, 0.9850, 0.9767, 0.9008, 0.6180),
            cfg_star_rescale=True,
        ),
        Guidance((4.0,), (1.0,), (1.0,), (2,), guidance_timesteps=(1.0,)),
    ],
    ids=[
        "none",
        "cfg",
        "stg rescaled",
        "cfg and stg",
        "no blocks",
        "cfg star",
        "cfg star, stg rescaled",
        "lists of the 13B dev model",
        "lists of one",
    ],
)
def test_variants_of_guidance(guidance: Guidance, monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(REQUEST, guidance=guidance, num_inference_steps=30)
    assert disagreement(model_of("0.9.5"), request, monkeypatch) <= TOLERANCE


def test_several_prompts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without STG: for more than one prompt the original perturbs the wrong rows of the batch."""
    request = replace(REQUEST, guidance=Guidance(3.0, 0.0), num_inference_steps=5)
    assert disagreement(model_of("0.9.5"), request, monkeypatch, batch=2) <= TOLERANCE


@pytest.mark.parametrize("sampler", ["euler", "stochastic"])
@pytest.mark.parametrize("generation", ["0.9", "0.9.1", "0.9.5"])
def test_the_whole_way_to_pixels(
    generation: Generation, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All random numbers in the documented order, decode noise and VAE noise among them."""
    model, prompts, tape = model_of(generation), prompts_of(seed=6), Tape(seed=12)
    request = replace(REQUEST, sampler=sampler, num_inference_steps=6)
    *steps, video = text_to_video(model, prompts, request, tape)
    assert len(steps) == 6
    assert isinstance(video, Video)
    oracle = original(model)
    with tape.played(monkeypatch):
        wanted = ask_original(oracle, prompts, request, seed=12, output="pt")
    assert video.pixels.shape == (1, 3, 17, 64, 96)
    assert float(wanted.std()) > 0.1
    assert difference(video.pixels, wanted) <= TOLERANCE


def test_no_scale_of_decode_noise_means_as_much_as_the_timestep() -> None:
    model, latents = model_of("0.9.5"), normals(1, 8, 1, 1, 1, seed=3)
    same = replace(REQUEST, decode_timestep=0.3, decode_noise_scale=0.3)
    left_out = replace(REQUEST, decode_timestep=0.3, decode_noise_scale=None)
    first, second = (decode(model, latents, request, seeded(1)) for request in (same, left_out))
    assert torch.equal(first, second)


def test_a_seed_is_a_video_and_another_seed_another() -> None:
    model, request = model_of("0.9.5"), replace(REQUEST, num_inference_steps=2, num_frames=1)
    first, again, other = (
        list(text_to_video(model, prompts_of(seed=7), request, seeded(seed)))[-1]
        for seed in (1, 1, 2)
    )
    assert isinstance(first, Video)
    assert isinstance(again, Video)
    assert isinstance(other, Video)
    assert torch.equal(first.pixels, again.pixels)
    assert difference(other.pixels, first.pixels) > 0.01


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_samplers_the_original_lacks_reach_the_same_clip_with_many_steps(sampler: Any) -> None:
    model, guidance = model_of("0.9.5"), Guidance(1.0, 0.0, 1.0)
    request = replace(REQUEST, guidance=guidance, num_inference_steps=60, num_frames=1)
    ends = []
    for name in ("euler", sampler):
        *_, last = denoise(model, prompts_of(seed=8), replace(request, sampler=name), seeded(3))
        ends.append(last.latents)
    assert difference(ends[1], ends[0]) < 0.05


def test_a_run_can_be_watched_and_left_at_any_step() -> None:
    model = model_of("0.9.5")
    run = denoise(model, prompts_of(seed=9), REQUEST, seeded(1))
    first = next(run)
    assert first == Step(0, 1.0, levels(model.config, REQUEST)[1], first.latents)
    assert first.latents.shape == (1, 8, 3, 2, 3)
    assert next(run).index == 1


def test_a_distilled_model_refuses_levels_it_does_not_know() -> None:
    config = replace(model_of("0.9.5").config, allowed_inference_steps=(1.0, 0.9937))
    assert levels(config, replace(REQUEST, timesteps=(1.0, 0.9937)))[-1] == 0
    with pytest.raises(ValueError, match=r"0\.5"):
        levels(config, replace(REQUEST, timesteps=(1.0, 0.5)))


@pytest.mark.parametrize("size", [{"num_frames": 16}, {"height": 48}, {"width": 0}])
def test_a_clip_that_fits_no_latent_grid_is_refused(size: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"grid|multiple"):
        levels(model_of("0.9.5").config, replace(REQUEST, **size))
