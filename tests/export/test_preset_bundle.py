"""`ltx-export onnx --preset`: the preset becomes the bundle's defaults, for one pass or two."""

import os
import shutil
from pathlib import Path

import pytest

from ltx_engines import bundle, pipeline_config, presets
from ltx_engines.bundle import Bundle, Defaults
from ltx_engines.errors import UserError
from ltx_export import cli, engine_profiles
from ltx_export.engine_profiles import Buckets
from ltx_export.pipeline_defaults import Pipeline, read
from ltx_ref.ltx_video.config import ModelConfig, parse_config
from tests.export.checkpoints import config, write_checkpoint
from tests.export.conftest import Exported, Files
from tests.runtime import upsampling

LEVELS = [1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219]
DISTILLED = "ltxv-2b-0.9.8-distilled"
DEV = "ltxv-13b-0.9.8-dev"


def model(layers: int, *, distilled: bool) -> ModelConfig:
    table = config("0.9.5")
    table["transformer"]["num_layers"] = layers
    return parse_config(table | ({"allowed_inference_steps": LEVELS} if distilled else {}))


def defaults(name: str, layers: int, *, distilled: bool) -> Pipeline:
    return read(presets.named(name), model(layers, distilled=distilled), None)


@pytest.fixture(scope="module")
def two_passes(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small model as a distilled one, with a preset's defaults and an upsampler made by hand.
    It has two blocks, of which no step leaves one out."""
    folder = tmp_path_factory.mktemp("two") / "bundle"
    shutil.copytree(exported.bundle.path, folder, copy_function=os.link)
    found = defaults(DISTILLED, 2, distilled=True).defaults
    changes = {"defaults": found, "allowed_inference_steps": tuple(LEVELS)}
    bundle.update(folder, bundle.read(folder).model_copy(update=changes))
    upsampling.add(folder)
    return bundle.open_bundle(folder, cache=folder.parent / "cache")


def test_a_preset_becomes_the_bundles_defaults(two_passes: Bundle) -> None:
    found = two_passes.manifest.defaults
    told = pipeline_config.load(presets.named(DISTILLED))
    assert found == pipeline_config.over(Defaults(), told)
    assert found.second is not None
    assert found.second.timesteps == (0.9094, 0.725, 0.4219)


def test_two_passes_are_run_from_the_bundle_alone(two_passes: Bundle, tmp_path: Path) -> None:
    from ltx_trt import cli as runtime

    words = ["run", "--prompt", "a b", "--bundle", str(two_passes.path)]
    words += ["--width", "64", "--height", "64", "--num-frames", "9", "-o", str(tmp_path / "a.gif")]
    assert runtime.main([*words, "--no-prompt-cache"]) == 0
    assert (tmp_path / "a.gif").is_file()


def test_engines_of_two_passes_are_for_what_each_stage_sees_of_the_clip(
    two_passes: Bundle,
) -> None:
    manifest = two_passes.manifest

    def latents(stage: str, passes: int | None = None) -> list[tuple[int, int]]:
        buckets = Buckets(("1216x704x121",), 1, 256, passes=passes)
        found = engine_profiles.profiles(stage, manifest, buckets)
        return list(dict.fromkeys((p["latent_height"][2], p["latent_width"][2]) for p in found))

    def tokens(passes: int | None = None) -> list[int]:
        buckets = Buckets(("1216x704x121",), 1, 256, passes=passes)
        return [p["tokens"][2] for p in engine_profiles.profiles("transformer", manifest, buckets)]

    assert tokens() == tokens(2) == [5600, 22400]  # facts/ltx_video.md 11
    assert latents("latent_upsampler") == [(14, 25)]
    assert latents("vae_decoder") == [(28, 50)]
    assert latents("vae_encoder") == [(14, 25), (28, 50)]
    assert tokens(1) == [13376]
    assert latents("vae_decoder", 1) == [(22, 38)]


def test_a_range_of_clips_is_a_range_of_both_passes(two_passes: Bundle) -> None:
    buckets = Buckets(("704x480x9..1216x704x121",), 1, 256)
    first, second = engine_profiles.profiles("transformer", two_passes.manifest, buckets)
    assert first["tokens"] == (2 * 9 * 14, 5600, 5600)  # 0.6666666 of 480 is 319
    assert second["tokens"] == (2 * 18 * 28, 22400, 22400)


def test_the_most_branches_of_both_passes_count(exported: Exported) -> None:
    plain = exported.bundle.manifest
    for name, branches in ((DEV, 3), (DISTILLED, 1), ("ltxv-2b-0.9", 3)):
        found = pipeline_config.over(plain.defaults, pipeline_config.load(presets.named(name)))
        changed = plain.model_copy(update={"defaults": found})
        assert engine_profiles.usual_branches(changed) == branches


def test_every_preset_fits_a_model_of_its_family() -> None:
    for preset in presets.PRESETS.values():
        layers = {"2B": 28, "13B": 48}[preset.release.size]
        found = defaults(preset.name, layers, distilled=preset.release.distilled)
        assert len(found.defaults.passes) == len(preset.steps)


@pytest.mark.parametrize(
    ("name", "layers", "distilled", "said"),
    [
        (DEV, 28, False, r"preset:ltxv-13b-0\.9\.8-dev|is for 13B models, this one is 2B"),
        (DEV, 48, True, "is for models that are not distilled"),
        (DEV, 40, False, None),
        (DEV, 39, False, "skip_block_list names block 39, this model has 0 to 38"),
        (DISTILLED, 2, True, None),
    ],
)
def test_a_preset_that_does_not_fit_a_model_is_refused(
    name: str, layers: int, distilled: bool, said: str | None
) -> None:
    if said is None:
        assert defaults(name, layers, distilled=distilled).defaults.second is not None
        return
    with pytest.raises(UserError, match=said):
        defaults(name, layers, distilled=distilled)


def test_guidance_of_a_config_is_refused_for_a_distilled_model(tmp_path: Path) -> None:
    path = tmp_path / "guided.yaml"
    path.write_text("guidance_scale: 3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"guided\.yaml: guidance_scale is 3, but .*distilled"):
        read(path, model(28, distilled=True), None)


def test_two_passes_want_an_upsampler_in_a_whole_bundle(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = config("0.9.5") | {"allowed_inference_steps": LEVELS}
    checkpoint = write_checkpoint(tmp_path / "small.safetensors", table)
    words = ["onnx", str(checkpoint), "--text-encoder", str(files.text_encoder)]
    words += ["--out", str(tmp_path / "bundle"), "--preset", DISTILLED]
    assert cli.main(words) == 2
    assert "give its file with --upsampler" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
