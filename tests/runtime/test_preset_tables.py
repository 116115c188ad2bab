"""Every preset step by step, beside the original's own code: it resolves, and is asked how."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ltx_engines import pipeline_config, presets
from ltx_engines.bundle import Bundle, Manifest, SchedulerFacts, StageEntry, tensor_entries
from ltx_engines.errors import UserError
from ltx_engines.presets import PRESETS, Preset
from ltx_engines.shapes import VideoShape
from ltx_engines.stages import Upsampling, ltx_video
from ltx_trt import passes
from ltx_trt.passes import Pass
from ltx_trt.request import Request, Wishes, resolve
from tests.runtime.conftest import MODEL, SIZES, manifest

original = pytest.importorskip("ltx_video.pipelines.pipeline_ltx_video")
schedulers = pytest.importorskip("ltx_video.schedulers.rf")

LEVELS = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219)
SD3 = {"shifting": "SD3", "target_shift_terminal": 0.1, "sampler": "Uniform"}
"""The schedule of 0.9 and 0.9.1; the later ones have the linear-quadratic one."""

Row = tuple[float, float, float, float, tuple[int, ...], bool]
"""Sigma, the scales of guidance, STG and rescaling, the blocks left out, CFG-star."""


def scheduler(preset: Preset) -> dict[str, Any]:
    early = preset.name in ("ltxv-2b-0.9", "ltxv-2b-0.9.1")
    return SD3 if early else {"sampler": "LinearQuadratic"}


def bundle_of(preset: Preset, *, upsampler: bool = True) -> Bundle:
    """What a bundle of its release says, as far as a plan reads it."""
    stage = ltx_video(replace(SIZES, upsampling=Upsampling(True, False)))["latent_upsampler"]
    entry = StageEntry(
        file="latent_upsampler.onnx",
        inputs=tensor_entries(stage.inputs, "float32"),
        outputs=tensor_entries(stage.outputs, "float32"),
    )
    layers = {"2B": 28, "13B": 48}[preset.release.size]
    plain: Manifest = manifest(
        scheduler=SchedulerFacts(**scheduler(preset)),
        model=MODEL.model_copy(update={"num_layers": layers}),
        allowed_inference_steps=LEVELS if preset.release.distilled else None,
    )
    stages = {**plain.stages, "latent_upsampler": entry} if upsampler else plain.stages
    return Bundle(Path("bundle"), plain.model_copy(update={"stages": stages}))


def wished(name: str, bundle: Bundle | None = None, **wishes: Any) -> Request:
    """For a clip of 704 x 1216."""
    sizes = {"width": 1216, "height": 704, "num_frames": 121}
    config = pipeline_config.load(presets.named(name))
    return resolve(Wishes("w3", **{**sizes, **wishes}), bundle or bundle_of(PRESETS[name]), config)[
        0
    ]


def rows(planned: Pass) -> list[Row]:
    return [
        (
            sigma,
            guide.guidance_scale,
            guide.stg_scale,
            guide.rescaling_scale,
            guide.skip_blocks,
            guide.cfg_star_rescale,
        )
        for sigma, guide in zip(planned.sigmas, planned.guidance, strict=True)
    ]


class ResolvedError(Exception):
    """The original has come to where it would read a prompt."""


def of_the_original(preset: Preset, settings: dict[str, Any], shape: VideoShape) -> list[Row]:
    """`LTXVideoPipeline.__call__` up to the prompt, and what it has found out by then."""

    def prompt(*args: object, **kwargs: object) -> None:
        raise ResolvedError

    pipeline = SimpleNamespace(
        check_inputs=lambda *_: None,
        encode_prompt=prompt,
        _execution_device="cpu",
        video_scale_factor=8,
        vae_scale_factor=32,
        transformer=SimpleNamespace(config=SimpleNamespace(in_channels=128)),
        vae=original.CausalVideoAutoencoder.__new__(original.CausalVideoAutoencoder),
        scheduler=schedulers.RectifiedFlowScheduler(**scheduler(preset)),
        text_encoder=SimpleNamespace(to=lambda _: None),
        allowed_inference_steps=LEVELS if preset.release.distilled else None,
    )
    with pytest.raises(ResolvedError) as stopped:
        original.LTXVideoPipeline.__call__(
            pipeline,
            height=shape.height,
            width=shape.width,
            num_frames=shape.frames,
            frame_rate=30,
            prompt="w3",
            latents=object(),
            is_video=True,
            **settings,
        )
    frames = [entry.frame.f_locals for entry in stopped.traceback]
    found = next(f for f in frames if "skip_block_list" in f and "guidance_timesteps" in f)
    blocks = found["skip_block_list"] or [[]] * len(found["timesteps"])
    scales = zip(
        found["timesteps"].tolist(),
        found["guidance_scale"],
        found["stg_scale"],
        found["rescaling_scale"],
        map(tuple, blocks),
        strict=True,
    )
    return [(*row, found["cfg_star_rescale"]) for row in scales]


@pytest.mark.parametrize("name", PRESETS)
def test_every_step_of_a_preset_is_as_the_original_resolves_it(name: str) -> None:
    preset = PRESETS[name]
    planned = passes.plan(wished(name), bundle_of(preset).manifest)
    keys = [key for key in ("first_pass", "second_pass") if key in preset.settings]
    plain = {key: value for key, value in preset.settings.items() if not key.endswith("_pass")}
    own = [plain | preset.settings[key] for key in keys] or [plain]
    assert len(planned) == len(own)
    for found, settings in zip(planned, own, strict=True):
        theirs = of_the_original(preset, settings, found.shape)
        assert [row[1:] for row in rows(found)] == [row[1:] for row in theirs]
        assert found.sigmas == pytest.approx([row[0] for row in theirs], abs=2e-6)


def test_the_first_pass_of_the_13b_dev_model_is_the_known_table() -> None:
    """Written down when the original was run, in `shared/facts/ltx_video.md` 6.4."""
    first, second = passes.plan(
        wished("ltxv-13b-0.9.8-dev"), bundle_of(PRESETS["ltxv-13b-0.9.8-dev"]).manifest
    )
    told = [(row[1], row[2], row[3], row[4]) for row in rows(first)]
    many, three, one = (11, 25, 35, 39), (22, 35, 39), (28,)
    assert told == [
        (1, 0, 1, ()),
        *[(1, 0, 1, many)] * 2,
        *[(6, 4, 0.5, three)] * 2,
        *[(8, 4, 0.5, one)] * 5,
        *[(6, 4, 1, one)] * 4,
        *[(1, 2, 1, one)] * 5,
        *[(1, 1, 1, one)] * 8,
    ]
    assert first.batches == (1, 1, 1, *[3] * 11, *[2] * 13)
    assert second.batches == (2,) * 13
    assert (round(second.sigmas[0], 4), round(second.sigmas[-1], 4)) == (0.9548, 0.1241)
    assert (first.shape.height, first.shape.width) == (448, 800)
    assert (second.shape.height, second.shape.width) == (896, 1600)


@pytest.mark.parametrize(
    "name", [name for name in PRESETS if "dev" in name or "distil" not in name]
)
def test_scales_of_the_command_line_count_in_every_step_of_both_passes(name: str) -> None:
    request = wished(name, guidance_scale=2.0, stg_scale=0.0, negative_prompt="dull", seed=5)
    assert (request.negative_prompt, request.seed) == ("dull", 5)
    for found in passes.plan(request, bundle_of(PRESETS[name]).manifest):
        assert {(row[1], row[2]) for row in rows(found)} == {(2.0, 0.0)}
        assert {*found.batches} == {2}


def test_fewer_steps_are_the_same_share_of_both_passes() -> None:
    name = "ltxv-13b-0.9.8-dev"
    planned = passes.plan(wished(name, num_inference_steps=10), bundle_of(PRESETS[name]).manifest)
    assert [len(found.sigmas) for found in planned] == [9, 4]  # 27 and 13 of 30


@pytest.mark.parametrize("name", [name for name in PRESETS if "-distilled" in name])
@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"guidance_scale": 3.0}, "guidance_scale is 3, but this checkpoint is distilled"),
        ({"num_inference_steps": 5}, "cannot; leave it out|has not learned timestep"),
    ],
)
def test_a_distilled_model_is_neither_guided_nor_counted(
    name: str, wish: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        passes.plan(wished(name, **wish), bundle_of(PRESETS[name]).manifest)


def test_stg_on_a_distilled_model_is_refused_where_a_block_is_named() -> None:
    with pytest.raises(UserError, match=r"stg_scale is 1, but.*use stg_scale 0, or a checkpoint"):
        wished("ltxv-13b-0.9.8-distilled", stg_scale=1.0)


@pytest.mark.parametrize("name", [name for name in PRESETS if len(PRESETS[name].steps) == 2])
def test_two_passes_without_an_upsampler_are_refused_with_the_file_that_is_missing(
    name: str,
) -> None:
    file = PRESETS[name].settings["spatial_upscaler_model_path"]
    with pytest.raises(UserError, match=f"ltx-export onnx --upsampler {file}`$"):
        wished(name, bundle_of(PRESETS[name], upsampler=False))


def test_a_preset_of_another_model_is_refused_and_of_ones_own_noted() -> None:
    with pytest.raises(UserError, match=r"the preset ltxv-13b-0\.9\.8-dev is for 13B models"):
        wished("ltxv-13b-0.9.8-dev", bundle_of(PRESETS["ltxv-2b-0.9.5"]))
    config = pipeline_config.load(presets.named("ltxv-2b-0.9.6-distilled"))
    _, notes = resolve(Wishes("w3"), bundle_of(PRESETS["ltxv-2b-0.9.5"]), config)
    assert notes == (
        "the preset ltxv-2b-0.9.6-distilled is for distilled models, and this one does not say "
        "that it is",
    )


def test_the_defaults_of_a_bundle_make_two_passes_without_any_config() -> None:
    bundle = bundle_of(PRESETS["ltxv-13b-0.9.8-distilled"])
    config = pipeline_config.load(presets.named("ltxv-13b-0.9.8-distilled"))
    defaults = pipeline_config.over(bundle.manifest.defaults, config)
    kept = Bundle(bundle.path, bundle.manifest.model_copy(update={"defaults": defaults}))
    request, notes = resolve(Wishes("w3"), kept)
    assert notes == ()
    assert request == resolve(Wishes("w3"), bundle, config)[0]
    assert request.second is not None
    assert request.second.tone_map_compression_ratio == 0.6
    assert request.second.downscale_factor == 0.6666666
    base = pipeline_config.load(presets.named("ltxv-2b-0.9.6-distilled"))
    with pytest.raises(UserError, match="is for 2B models"):
        resolve(Wishes("w3"), kept, base)
    plain = pipeline_config.PipelineConfig(pipeline_type="base", num_inference_steps=8)
    assert resolve(Wishes("w3"), kept, plain)[0].second is None
