"""The profiles of an engine follow from the clips and the table of tensors."""

from dataclasses import replace

import pytest

from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_export import engine_profiles
from ltx_export.engine_profiles import Buckets
from tests.export.conftest import Exported

BUCKETS = Buckets(("256x192x9", "320x256x17"), branches=3, text_tokens=256)


def test_each_clip_is_a_profile_and_the_transformers_batch_has_room_for_guidance(
    exported: Exported,
) -> None:
    found = engine_profiles.profiles("transformer", exported.bundle.manifest, BUCKETS)
    tokens = [VideoShape(9, 192, 256).tokens, VideoShape(17, 256, 320).tokens]
    assert [p["tokens"] for p in found] == [(n, n, n) for n in tokens]
    for profile in found:
        assert profile["batch"] == (1, 3, 3)
        assert profile["text"] == (256, 256, 256)
        assert profile["timesteps"] == (1, 1, 1)


def test_every_named_axis_of_every_stage_has_a_size(exported: Exported) -> None:
    manifest = exported.bundle.manifest
    for stage, entry in manifest.stages.items():
        for profile in engine_profiles.profiles(stage, manifest, BUCKETS):
            shapes = engine_profiles.shapes(entry, profile)
            assert shapes.keys() == {tensor.name for tensor in entry.inputs}
            for least, likely, most in shapes.values():
                assert all(a <= b <= c for a, b, c in zip(least, likely, most, strict=True))


def test_the_axes_of_noise_follow_the_latent_grid(exported_091: Exported) -> None:
    manifest = exported_091.bundle.manifest
    profile, _ = engine_profiles.profiles("vae_decoder", manifest, BUCKETS)
    assert manifest.model.noise_blocks
    for noise in manifest.model.noise_blocks:
        block = noise.name.removeprefix("noise_")
        assert profile[f"height_{block}"] == (6 * noise.scale,) * 3
        assert profile[f"width_{block}"] == (8 * noise.scale,) * 3


def test_the_text_encoder_has_no_clip_and_so_one_profile(exported: Exported) -> None:
    found = engine_profiles.profiles("text_encoder", exported.bundle.manifest, BUCKETS)
    assert found == ({"batch": (1, 2, 2), "text": (256, 256, 256)},)


def test_the_encoder_reads_a_clip_or_its_first_image(exported: Exported) -> None:
    found = engine_profiles.profiles("vae_encoder", exported.bundle.manifest, BUCKETS)
    assert [p["frames"][0] for p in found] == [9, 1, 17, 1]
    assert [p["latent_frames"][0] for p in found] == [2, 1, 3, 1]


def test_given_images_need_a_timestep_for_each_token(exported: Exported) -> None:
    buckets = replace(BUCKETS, shapes=("256x192x9",), conditioning=0)
    one, each = engine_profiles.profiles("transformer", exported.bundle.manifest, buckets)
    assert one["timesteps"] == (1, 1, 1)
    assert each["timesteps"] == each["tokens"] == one["tokens"]


def test_keyframes_have_room_before_the_clips_own_tokens(exported: Exported) -> None:
    buckets = replace(BUCKETS, shapes=("256x192x9",), conditioning=3)
    one, each = engine_profiles.profiles("transformer", exported.bundle.manifest, buckets)
    clip = VideoShape(9, 192, 256).tokens
    with_keyframes = clip + 3 * 6 * 8
    assert one["tokens"] == (clip, clip, clip)
    assert each["tokens"] == each["timesteps"] == (clip, with_keyframes, with_keyframes)


def test_given_sequences_may_be_shorter_than_the_clip(exported: Exported) -> None:
    buckets = replace(BUCKETS, shapes=("256x192x17",), conditioning=2)
    sequence, image = engine_profiles.profiles("vae_encoder", exported.bundle.manifest, buckets)
    assert sequence["latent_frames"] == (1, 3, 3)
    assert sequence["frames"] == (1, 17, 17)
    assert image["frames"] == (1, 1, 1)


def test_a_range_is_tuned_for_its_last_clip(exported: Exported) -> None:
    buckets = replace(BUCKETS, shapes=("256x192x9..320x256x17",))
    (found,) = engine_profiles.profiles("transformer", exported.bundle.manifest, buckets)
    assert found["tokens"] == (2 * 6 * 8, 3 * 8 * 10, 3 * 8 * 10)
    assert engine_profiles.ends("256x192x9") == (VideoShape(9, 192, 256),) * 2


@pytest.mark.parametrize("word", ["256x192", "256x192x9..", "256x192x10", "a..b"])
def test_a_clip_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(UserError):
        engine_profiles.ends(word)


@pytest.mark.parametrize(
    ("guidance", "stg", "branches"), [(3.0, 1.0, 3), (1.0, 0.0, 1), ((1.0, 8.0), 0.0, 2)]
)
def test_the_models_defaults_say_how_many_branches_there_are(
    exported: Exported, guidance: float | tuple[float, ...], stg: float, branches: int
) -> None:
    manifest = exported.bundle.manifest
    scales = {"guidance_scale": guidance, "stg_scale": stg}
    defaults = manifest.defaults.model_copy(update=scales)
    assert engine_profiles.usual_branches(manifest.model_copy(update={"defaults": defaults})) == (
        branches
    )
