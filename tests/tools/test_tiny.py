"""The small world of ltx-tiny: drawing, captions, held-out scenes, detector, tokenizer, recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tiny import captions, clips, detector
from tiny.clips import DIRECTIONS, PALETTE, SHAPES, Format, Scene
from tiny.detector import Seen, detect

FORMATS = (
    Format(25, 128, 128, 24.0),
    Format(25, 96, 160, 24.0),
    Format(33, 160, 96, 24.0),
    Format(17, 128, 128, 12.0),
)
SCENE = Scene("circle", "red", "blue", "right")


def seen_in(scene: Scene) -> Seen:
    return Seen(scene.shape, scene.colour, scene.background, scene.direction)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_detector_reads_what_was_drawn(form: Format) -> None:
    rng = np.random.default_rng(7)
    for _ in range(25):
        scene = clips.sample(rng)
        assert detect(clips.draw(scene, form, rng)) == seen_in(scene)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_detector_reads_every_direction(direction: str) -> None:
    scene = replace(SCENE, direction=direction)
    clip = clips.draw(scene, FORMATS[0], np.random.default_rng(0))
    assert detect(clip).direction == direction


@pytest.mark.parametrize("colour", PALETTE)
def test_every_colour_is_nearest_to_itself_in_spite_of_errors(colour: str) -> None:
    rgb = np.array(PALETTE[colour], dtype=np.float32)
    for error in product((-20, 20), repeat=3):
        assert detector.nearest_colour(np.clip(rgb + error, 0, 255)) == colour


def test_the_detector_sees_nothing_in_an_empty_clip() -> None:
    empty = np.full((9, 64, 64, 3), PALETTE["green"], dtype=np.uint8)
    assert detect(empty) == Seen("none", "none", "green", "none")


def test_the_detector_sees_no_direction_in_a_still_clip() -> None:
    clip = clips.draw(SCENE, FORMATS[0], np.random.default_rng(0))
    assert detect(np.repeat(clip[:1], 9, axis=0)) == replace(seen_in(SCENE), direction="none")


def test_the_detector_reads_a_noisy_clip() -> None:
    rng = np.random.default_rng(0)
    clip = clips.draw(SCENE, FORMATS[0], rng).astype(np.float32)
    noisy = np.clip(clip + rng.normal(0, 15, clip.shape), 0, 255).astype(np.uint8)
    assert detect(noisy) == seen_in(SCENE)


def test_played_backwards_a_shape_goes_the_other_way() -> None:
    clip = clips.draw(SCENE, FORMATS[0], np.random.default_rng(0))
    assert detect(clip[::-1]).direction == "left"


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_have_the_area_of_the_circle(shape: str) -> None:
    y, x = np.mgrid[-60:61, -60:61].astype(np.float32)
    area = np.clip(0.5 - clips.distance(shape, 25.0, x, y), 0, 1).sum()
    assert area == pytest.approx(np.pi * 25**2, rel=0.01)


def test_a_shape_stays_in_the_picture_and_moves_at_its_speed() -> None:
    rng = np.random.default_rng(0)
    for form in FORMATS:
        scene = clips.sample(rng)
        clip = clips.draw(scene, form, rng)
        edge = np.concatenate([clip[:, [0, -1]].reshape(-1, 3), clip[:, :, [0, -1]].reshape(-1, 3)])
        assert (edge == PALETTE[scene.background]).all()
    ways = {
        speed: np.linalg.norm(np.diff(path[[0, -1]], axis=0))
        for speed in clips.SPEEDS
        for path in [clips.path(replace(SCENE, speed=speed), FORMATS[0], rng)]
    }
    assert ways == pytest.approx(clips.SPEEDS)  # the clip lasts for one second


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="no such shape: blob"):
        clips.distance("blob", 1.0, np.zeros(1, np.float32), np.zeros(1, np.float32))


def test_training_never_draws_a_held_out_scene() -> None:
    rng = np.random.default_rng(0)
    assert not any(clips.sample(rng).held_out for _ in range(3000))


def test_held_out_are_about_a_tenth_with_every_value_in_them_and_outside() -> None:
    scenes = list(clips.scenes())
    out = [scene for scene in scenes if scene.held_out]
    assert len(scenes) == 4 * 8 * 7 * 4
    assert 0.08 < len(out) / len(scenes) < 0.12
    for name, values in (
        ("shape", SHAPES),
        ("colour", PALETTE),
        ("background", PALETTE),
        ("direction", DIRECTIONS),
    ):
        assert {getattr(scene, name) for scene in out} == set(values)
        assert {getattr(scene, name) for scene in scenes if not scene.held_out} == set(values)


def test_speed_and_size_do_not_bring_a_scene_back() -> None:
    scene = next(scene for scene in clips.scenes() if scene.held_out)
    assert all(
        replace(scene, speed=speed, size=size).held_out
        for speed in clips.SPEEDS
        for size in clips.SIZES
    )


def test_a_caption_names_the_scene_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = clips.sample(rng)
        caption = captions.describe(scene, rng)
        said = set(captions.split(caption))
        for table, value in (
            (captions.COLOURS, scene.colour),
            (captions.COLOURS, scene.background),
            (captions.NOUNS, scene.shape),
        ):
            assert said & set(table[value])
        assert any(way in caption for way in captions.WAYS[scene.direction])
        others = set(PALETTE) - {scene.colour, scene.background}
        assert not said & {word for colour in others for word in captions.COLOURS[colour]}
        assert "  " not in caption
        assert caption == caption.strip()


def test_a_ways_words_tell_all_directions_apart() -> None:
    ways = [way for options in captions.WAYS.values() for way in options]
    assert len(ways) == len(set(ways))


def test_equal_seeds_draw_equal_clips_and_captions() -> None:
    def once() -> tuple[bytes, str]:
        rng = np.random.default_rng(3)
        scene = clips.sample(rng)
        return clips.draw(scene, FORMATS[0], rng).tobytes(), captions.describe(scene, rng)

    assert once() == once()


@pytest.fixture(scope="module")
def tokenizer() -> object:
    pytest.importorskip("torch")
    from tiny import text

    return text.tokenizer()


def test_the_tokenizer_knows_every_word_of_every_caption(tokenizer: object) -> None:
    rng = np.random.default_rng(0)
    texts = [captions.describe(clips.sample(rng), rng) for _ in range(300)]
    for encoding in tokenizer.encode_batch([*texts, captions.NEGATIVE_PROMPT]):  # type: ignore[attr-defined]
        assert 2 not in encoding.ids  # <unk>
        assert encoding.ids[-1] == 1  # </s>


def test_the_tokenizer_ignores_case_and_marks_strange_words(tokenizer: object) -> None:
    encode = tokenizer.encode  # type: ignore[attr-defined]
    assert encode("A Red circle.").ids == encode("a red circle .").ids
    assert encode("a zebra").ids == [encode("a").ids[0], 2, 1]
    assert encode("").ids == [1]


def test_the_shipped_tokenizer_is_the_one_of_the_code(tokenizer: object) -> None:
    shipped = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny/text_encoder/tokenizer.json"
    found = json.loads(shipped.read_text(encoding="utf-8"))
    wanted = json.loads(tokenizer.to_str())  # type: ignore[attr-defined]
    length = {"padding", "truncation"}  # set by the exporter
    assert {key: found[key] for key in found.keys() - length} == {
        key: wanted[key] for key in wanted.keys() - length
    }


def test_the_recipe_is_a_model_the_reference_knows() -> None:
    pytest.importorskip("torch")
    from tiny import recipe

    plan = recipe.load()
    assert plan.model.generation == "0.9.5"
    assert plan.model.transformer.in_channels == plan.model.vae.latent_channels
    assert sum(share for share, _ in plan.formats) == pytest.approx(1)


def test_a_training_of_one_step_writes_what_the_reference_loads(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from ltx_ref import text
    from ltx_ref.ltx_video import model
    from tiny import recipe
    from train_tiny import main

    small = json.loads(recipe.RECIPE.read_text())
    small["formats"] = [{"share": 1, "frames": 9, "height": 64, "width": 64, "frame_rate": 24}]
    small["vae_training"]["pixels"] = 9 * 64 * 64
    small["denoiser_training"]["batch"] = 4
    file, work, out = tmp_path / "recipe.json", tmp_path / "work", tmp_path / "out"
    file.write_text(json.dumps(small))
    for _ in range(2):  # the second run finds everything done
        main(out, work, file, steps=1, clips=9)
        loaded = model.load(out / "ltx-tiny.safetensors")
        assert loaded.config == recipe.load().model
        assert not loaded.vae.per_channel_statistics.get_buffer("mean-of-means").isnan().any()
        encoder = text.load_text_encoder(out / "text_encoder")
        embeds, mask = text.encode(
            encoder, text.load_tokenizer(out / "text_encoder", 8), ["a ball"]
        )
        assert embeds.shape == (1, 8, loaded.config.transformer.caption_channels)
        assert mask.sum() == 3
