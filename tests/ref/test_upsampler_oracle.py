"""Our latent upsampler against the original's and diffusers', and what its file may say."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ltx_ref.checkpoint import CheckpointError
from ltx_ref.ltx_video import upsampler
from ltx_ref.ltx_video.config import (
    VAE_GENERATIONS,
    ModelConfig,
    SchedulerConfig,
    TransformerConfig,
)
from ltx_ref.ltx_video.model import LTXVideo
from ltx_ref.ltx_video.upsampler import LatentUpsampler, UpsamplerStage
from ltx_ref.ltx_video.upsampler_config import (
    SPATIAL,
    TEMPORAL,
    UpsamplerConfig,
    check_latent_channels,
    parse_upsampler_config,
)
from tests.ref import test_vae_oracle
from tests.ref.oracles import ORIGINAL_MISSING, TOLERANCE, difference, normals, randomize

SMALL: dict[str, Any] = {"in_channels": 8, "mid_channels": 64, "num_blocks_per_stage": 2}
KINDS = {
    "spatial": replace(SPATIAL, **SMALL),
    "temporal": replace(TEMPORAL, **SMALL),
    "both": replace(TEMPORAL, spatial_upsample=True, **SMALL),
    "images": replace(SPATIAL, dims=2, **SMALL),
}


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest) -> UpsamplerConfig:
    return KINDS[request.param]


def upsampler_of(config: UpsamplerConfig, seed: int) -> LatentUpsampler:
    with torch.device("meta"):
        module = LatentUpsampler(config)
    randomize(module, seed)
    return module.eval()


def original(ours: LatentUpsampler) -> Any:
    module = pytest.importorskip(
        "ltx_video.models.autoencoders.latent_upsampler", reason=ORIGINAL_MISSING
    )
    with torch.device("meta"):
        oracle = module.LatentUpsampler.from_config(asdict(ours.config))
    oracle.load_state_dict(ours.state_dict(), assign=True)
    return oracle.eval()


def diffusers(ours: LatentUpsampler) -> Any:
    module = pytest.importorskip(
        "diffusers.pipelines.ltx.modeling_latent_upsampler", reason="an oracle of the tests"
    )
    with torch.device("meta"):
        oracle = module.LTXLatentUpsamplerModel(**asdict(ours.config))
    oracle.load_state_dict(ours.state_dict(), assign=True)
    return oracle.eval()


SHAPES = [(1, 1, 2, 3), (2, 3, 3, 2), (1, 4, 5, 4)]
"""Batch, latent frames, rows and columns."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_both_oracles_upsample_as_ours(
    config: UpsamplerConfig, shape: tuple[int, int, int, int], seed: int
) -> None:
    ours = upsampler_of(config, seed)
    latents = normals(shape[0], 8, *shape[1:], seed=seed + 10)
    found = ours(latents)
    assert difference(found, original(ours)(latents)) <= TOLERANCE
    assert difference(found, diffusers(ours)(latents)) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_sides_double_and_the_first_frame_stays_one(
    config: UpsamplerConfig, shape: tuple[int, int, int, int]
) -> None:
    batch, frames, rows, columns = shape
    time, *sides = config.stride
    found = upsampler_of(config, 2)(normals(batch, 8, frames, rows, columns, seed=3))
    wanted_frames = 2 * frames - 1 if time == 2 else frames
    assert found.shape == (batch, 8, wanted_frames, sides[0] * rows, sides[1] * columns)


def test_images_do_not_see_each_other_and_frames_do() -> None:
    latents = normals(1, 8, 3, 2, 2, seed=4)
    for kind, alone in (("images", True), ("spatial", False)):
        ours = upsampler_of(KINDS[kind], 5)
        differs = difference(ours(latents)[:, :, :1], ours(latents[:, :, :1]))
        assert (differs <= TOLERANCE) is alone


@pytest.mark.parametrize(
    ("release", "parameters"), [(SPATIAL, 126_250_624), (TEMPORAL, 130_968_192)]
)
def test_the_released_sizes_agree_with_both_oracles(
    release: UpsamplerConfig, parameters: int
) -> None:
    ours = upsampler_of(release, 6)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert len(ours.state_dict()) == 72
    latents = normals(1, 128, 2, 2, 3, seed=7)
    found = ours(latents)
    assert difference(found, original(ours)(latents)) <= TOLERANCE
    assert difference(found, diffusers(ours)(latents)) <= TOLERANCE


def vae_of(seed: int) -> Any:
    """A VAE whose statistics are far from 0 and 1."""
    return test_vae_oracle.vae_of(test_vae_oracle.small("0.9.5"), seed)


def stage_of(config: UpsamplerConfig, seed: int) -> UpsamplerStage:
    vae = vae_of(seed)
    return upsampler.join(upsampler_of(config, seed), vae.per_channel_statistics)


def test_the_stage_is_what_the_original_pipeline_does_between_its_passes(
    config: UpsamplerConfig,
) -> None:
    module = pytest.importorskip("ltx_video.pipelines.pipeline_ltx_video", reason=ORIGINAL_MISSING)
    ours, vae, latents = upsampler_of(config, 8), vae_of(8), normals(2, 8, 3, 2, 3, seed=9)
    pipeline = module.LTXMultiScalePipeline(
        SimpleNamespace(vae=test_vae_oracle.original(vae)), original(ours)
    )
    wanted = pipeline._upsample_latents(pipeline.latent_upsampler, latents)
    stage = upsampler.join(ours, vae.per_channel_statistics)
    assert difference(stage(latents), wanted) <= TOLERANCE
    assert difference(ours(latents), wanted) > 1e-2, "the statistics do nothing"


def test_the_stage_is_diffusers_upsampling_pipeline(config: UpsamplerConfig) -> None:
    module = pytest.importorskip("diffusers", reason="an oracle of the tests")
    ours, vae, latents = upsampler_of(config, 11), vae_of(11), normals(1, 8, 2, 3, 2, seed=12)
    pipeline = module.LTXLatentUpsamplePipeline(
        test_vae_oracle.diffusers(vae, "0.9.5"), diffusers(ours)
    )
    wanted: Tensor = pipeline(latents=latents, output_type="latent", return_dict=False)[0]
    stage = upsampler.join(ours, vae.per_channel_statistics)
    assert difference(stage(latents), wanted) <= TOLERANCE


def test_the_stages_weights_are_named_as_in_their_two_files(config: UpsamplerConfig) -> None:
    ours, stage = upsampler_of(config, 13), stage_of(config, 13)
    statistics = {
        f"vae.per_channel_statistics.{name}" for name in ("mean-of-means", "std-of-means")
    }
    assert set(stage.state_dict()) == set(ours.state_dict()) | statistics
    assert set(original(ours).state_dict()) == set(ours.state_dict())


def test_no_name_of_the_upsampler_is_one_of_the_checkpoint() -> None:
    checkpoint = ModelConfig(TransformerConfig(), VAE_GENERATIONS["0.9.5"], SchedulerConfig())
    with torch.device("meta"):
        both = [set(LTXVideo(checkpoint).state_dict()), set(LatentUpsampler(SPATIAL).state_dict())]
    assert not both[0] & both[1]


def test_joining_copies_nothing() -> None:
    ours, statistics = upsampler_of(KINDS["spatial"], 14), vae_of(14).per_channel_statistics
    weights = upsampler.join(ours, statistics).state_dict()
    for name, tensor in ours.state_dict().items():
        assert weights[name].data_ptr() == tensor.data_ptr()


def test_an_upsampler_for_another_vae_is_refused() -> None:
    other = upsampler_of(replace(KINDS["spatial"], in_channels=12), 15)
    with pytest.raises(CheckpointError, match="of 12 channels, the checkpoint's VAE has 8; take"):
        upsampler.join(other, vae_of(15).per_channel_statistics)
    check_latent_channels(SPATIAL, 128)


def table_of(config: UpsamplerConfig) -> dict[str, Any]:
    return {"_class_name": "LatentUpsampler", **asdict(config)}


def write(path: Path, ours: LatentUpsampler, metadata: dict[str, str] | None = None) -> Path:
    default = {"config": json.dumps(table_of(ours.config))}
    save_file(ours.state_dict(), path, default if metadata is None else metadata)
    return path


def test_a_file_loads_as_the_original_loads_it(config: UpsamplerConfig, tmp_path: Path) -> None:
    ours = upsampler_of(config, 16).bfloat16()
    path = write(tmp_path / "upsampler.safetensors", ours)
    module = pytest.importorskip(
        "ltx_video.models.autoencoders.latent_upsampler", reason=ORIGINAL_MISSING
    )
    loaded, oracle = upsampler.load(path), module.LatentUpsampler.from_pretrained(path)
    assert loaded.config == config
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.bfloat16}
    latents = normals(1, 8, 2, 2, 2, seed=17).bfloat16()
    assert torch.equal(loaded(latents), oracle.eval()(latents))


def test_the_originals_own_description_is_read_back(config: UpsamplerConfig) -> None:
    assert parse_upsampler_config(original(upsampler_of(config, 18)).config()) == config


def test_absent_keys_mean_what_they_mean_to_the_original() -> None:
    module = pytest.importorskip(
        "ltx_video.models.autoencoders.latent_upsampler", reason=ORIGINAL_MISSING
    )
    with torch.device("meta"):
        oracle = module.LatentUpsampler.from_config({})
    assert table_of(parse_upsampler_config({})) == oracle.config()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"mid_chanels": 64}, "unknown key 'mid_chanels' .*; did you mean 'mid_channels'\\?$"),
        ({"transformer": {}}, "unknown key 'transformer' .*; known are in_channels, .*$"),
        ({"_class_name": "Transformer3DModel"}, "of a Transformer3DModel, wanted a LatentUps"),
        ({"dims": 1}, "dims is 1, wanted 2 or 3"),
        ({"dims": True}, "dims is True, wanted int"),
        ({"spatial_upsample": 1}, "spatial_upsample is 1, wanted bool"),
        ({"mid_channels": 48}, "mid_channels is 48, wanted a multiple of 32"),
        ({"mid_channels": 0}, "mid_channels is 0, wanted at least 1"),
        ({"num_blocks_per_stage": -1}, "num_blocks_per_stage is -1, wanted at least 0"),
        ({"spatial_upsample": False}, "are both false, wanted one true"),
        ({"dims": 2, "temporal_upsample": True}, "temporal_upsample with dims 2"),
    ],
)
def test_a_description_that_cannot_be_followed_costs_one_line(
    change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem) as caught:
        parse_upsampler_config(table_of(KINDS["spatial"]) | change)
    assert "\n" not in str(caught.value)


def test_a_key_that_the_user_calls_harmless_is_passed_over() -> None:
    table = table_of(SPATIAL) | {"spatial_scale": 2.0, "_diffusers_version": "0.28.2"}
    assert parse_upsampler_config(table, ignore=["spatial_scale"]) == SPATIAL


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"format": "pt"}, "has no 'config' metadata; wanted the original upscaler file"),
        ({"config": "{"}, "'config' is not JSON"),
        ({"config": "[]"}, "'config' is not a JSON object"),
        ({"config": '{"dimms": 3}'}, "did you mean 'dims'"),
        ({"config": json.dumps(table_of(SPATIAL))}, r"does not fit the model: \d+ missing"),
    ],
)
def test_a_file_that_is_no_upsampler_is_refused_by_name(
    tmp_path: Path, metadata: dict[str, str], problem: str
) -> None:
    path = write(tmp_path / "x.safetensors", upsampler_of(KINDS["images"], 19), metadata)
    with pytest.raises(CheckpointError, match=problem) as caught:
        upsampler.load(path)
    assert str(path) in str(caught.value)


def test_the_description_is_read_without_torch() -> None:
    code = "import sys, ltx_ref.ltx_video.upsampler_config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
