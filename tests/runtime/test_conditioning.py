"""Given images among the clip's own latents: where they lie, and how long they are held."""

from dataclasses import replace
from typing import Self

import numpy as np
import pytest

from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_trt import sampler
from ltx_trt.conditioning import Item, Place, check, condition, extra_tokens
from ltx_trt.coordinates import token_coordinates, unpatchify
from ltx_trt.denoising import Denoising, Floats, Text, on_the_host
from ltx_trt.guidance import StepGuidance
from ltx_trt.noise import Noise
from ltx_trt.sampler import SAMPLERS
from ltx_trt.session import Feeds

CLIP = VideoShape(33, 64, 96)
PLACE = Place(CLIP, 25.0, causal=True)
FRAMES, ROWS, COLUMNS = CLIP.latent
CELLS = ROWS * COLUMNS
CHANNELS = 4


def item(frames: int = 1, frame: int = 0, strength: float = 1.0) -> Item:
    return Item(np.zeros((1, 3, frames, 64, 96), np.float32), frame, strength)


def latents(value: float, frames: int) -> Floats:
    return np.full((1, CHANNELS, frames, ROWS, COLUMNS), value, np.float32)


CLIPS_OWN = latents(0, FRAMES)


def held(found: Floats) -> list[float]:
    """The value of each latent frame, with extra tokens before them."""
    (rows,) = found.reshape(1, -1, CELLS, *found.shape[2:])
    assert all(np.ptp(frame.reshape(CELLS, -1), axis=0).max() == 0 for frame in rows)
    return [float(frame.flat[0]) for frame in rows]


def test_without_items_all_is_as_it_was() -> None:
    found = condition(CLIPS_OWN, [], PLACE, Noise(1))
    assert found.strengths is None
    assert found.extra == 0
    assert np.array_equal(unpatchify(found.latents, CLIP.latent), CLIPS_OWN)


def test_what_begins_at_frame_0_is_mixed_into_the_first_latents() -> None:
    found = condition(CLIPS_OWN, [(item(9, strength=0.25), latents(8, 2))], PLACE, Noise(1))
    assert held(found.latents) == [2, 2, 0, 0, 0]
    assert found.strengths is not None
    assert held(found.strengths) == [0.25, 0.25, 0, 0, 0]


@pytest.mark.parametrize(("frame", "extra"), [(0, 0), (1, 1), (2, 1), (8, 1)])
def test_only_what_begins_at_frame_0_needs_no_tokens_of_its_own(frame: int, extra: int) -> None:
    assert item(1, frame).extra == extra


def test_a_later_image_is_a_latent_frame_of_its_own_with_the_time_of_its_frame() -> None:
    found = condition(CLIPS_OWN, [(item(1, 13), latents(8, 1))], PLACE, Noise(1))
    assert found.extra == CELLS == extra_tokens([item(1, 13)], CLIP)
    assert held(found.latents) == [8, 0, 0, 0, 0, 0]
    assert found.strengths is not None
    assert held(found.strengths) == [1, 0, 0, 0, 0, 0]
    first, others = found.coordinates[..., :CELLS], found.coordinates[..., CELLS:]
    assert np.allclose(first[0, 0], 13 / 25.0)
    assert np.array_equal(first[:, 1:], others[:, 1:, :CELLS])
    assert np.array_equal(others, token_coordinates(CLIP, 25.0, causal=True))


def test_a_later_sequence_lies_in_its_place_but_for_its_first_two_latent_frames() -> None:
    given = np.concatenate([latents(value, 1) for value in (5, 6, 7)], axis=2)
    found = condition(CLIPS_OWN, [(item(17, 16, 1.0), given)], PLACE, Noise(1))
    assert held(found.latents) == [5, 6, 0, 0, 0, 0, 7]
    seconds = found.coordinates[0, 0, : 2 * CELLS].reshape(2, CELLS)
    assert np.allclose(seconds, np.array([[16], [17]]) / 25.0)


def test_the_noise_of_a_weak_keyframe_is_drawn_for_it() -> None:
    noise = Noise(4).normal((1, CHANNELS, 1, ROWS, COLUMNS))
    found = condition(CLIPS_OWN, [(item(1, 8, 0.5), latents(8, 1))], PLACE, Noise(4))
    first = unpatchify(found.latents[:, :CELLS], (1, ROWS, COLUMNS))
    assert np.allclose(first, 0.5 * noise + 4)


def test_several_items_lie_in_the_order_in_which_they_are_given() -> None:
    given = [(item(1, 24), latents(5, 1)), (item(), latents(6, 1)), (item(9, 8), latents(7, 2))]
    found = condition(CLIPS_OWN, given, PLACE, Noise(1))
    assert held(found.latents) == [5, 7, 7, 6, 0, 0, 0, 0]
    assert found.extra == 3 * CELLS == extra_tokens([one for one, _ in given], CLIP)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (item(strength=2), "strength must be from 0 to 1, not 2"),
        (item(strength=float("nan")), "strength must be from 0 to 1, not nan"),
        (item(10), "has 10 frames, not 8k + 1; cut it to 9"),
        (item(1, 33), "do not fit into a clip of 33; let it begin from frame 0 to 32"),
        (item(1, -1), "from frame -1 do not fit"),
        (item(41), "do not fit into a clip of 33; let it begin in a longer clip"),
        (item(9, 7), "begins at a multiple of 8, not at frame 7; try 0 or 8"),
    ],
)
def test_an_item_that_cannot_stand_there_is_refused_in_one_line(wrong: Item, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check([item(), wrong], CLIP)
    assert str(caught.value).startswith("conditioning item 2")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


TEXT = Text(np.zeros((1, 4, 6), np.float32), np.ones((1, 4), np.float32))
PLAIN = StepGuidance(1.0, 0.0, 1.0)
SIGMAS = (1.0, 0.8, 0.5, 0.3, 0.0)
CLEAN = np.float32(0.4)


class Exact:
    """A transformer that knows the clean latents; it keeps what it is told."""

    def __init__(self) -> None:
        self.feeds: list[Feeds] = []

    def __call__(self, feeds: Feeds) -> dict[str, Floats]:
        self.feeds.append(dict(feeds))
        levels = feeds["timestep"][..., np.newaxis]
        away = feeds["latents"] - CLEAN
        velocity = np.divide(away, levels, out=np.full_like(away, 9), where=levels > 0)
        return {"velocity": velocity}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def job(items: list[tuple[Item, Floats]], name: str = "euler", renoised: float = 0.0) -> Denoising:
    noise = Noise(3)
    fresh = unpatchify(noise.normal((1, CLIP.tokens, CHANNELS)), CLIP.latent)
    found = condition(fresh, items, PLACE, noise)
    table = sampler.table(name, SIGMAS, eta=0.5 if name == "ddim" else 0.0)
    guidance = (PLAIN,) * len(table)
    return Denoising(
        found.latents,
        found.coordinates,
        TEXT,
        TEXT,
        table,
        guidance,
        3,
        noise,
        found.strengths,
        renoised,
    )


def walked(job: Denoising) -> tuple[Exact, Floats]:
    exact = Exact()
    steps = on_the_host(exact, job)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return exact, end.value


WEAK, HARD = (item(1, 8, 0.5), latents(8, 1)), (item(), latents(7, 1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_token_waits_until_the_clip_has_come_down_to_its_level(name: str) -> None:
    wanted = job([WEAK, HARD], name)
    exact, _ = walked(wanted)
    levels = [feeds["timestep"][0] for feeds in exact.feeds]
    assert [row[0] for row in levels] == pytest.approx([0.5, 0.5, 0.5, 0.3])
    assert [row[CELLS] for row in levels] == [0, 0, 0, 0]
    assert [row[-1] for row in levels] == pytest.approx(SIGMAS[:-1])
    seen = [feeds["latents"][0, 0] for feeds in exact.feeds]
    assert all(np.array_equal(row, wanted.latents[0, 0]) for row in seen[:3])
    assert not np.array_equal(seen[3], seen[2])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_hard_token_never_moves_and_all_others_reach_the_clean_latents(name: str) -> None:
    """With an exact model, whatever the sampler: a token's first step is of first order, for one
    that looks back too."""
    _, found = walked(job([WEAK, HARD], name))
    assert (found[0, CELLS : 2 * CELLS] == 7).all()
    others = np.delete(found[0], np.s_[CELLS : 2 * CELLS], axis=0)
    assert np.allclose(others, CLEAN, atol=1e-5)


def test_a_sampler_that_looks_back_sees_no_change_before_a_tokens_first_step() -> None:
    """On a path that is not straight the second order shows."""

    class Bent(Exact):
        def __call__(self, feeds: Feeds) -> dict[str, Floats]:
            super().__call__(feeds)
            return {"velocity": np.sin(feeds["latents"] * 3)}

    def first_move(name: str) -> Floats:
        bent = Bent()
        steps = on_the_host(bent, job([WEAK], name))
        for _ in range(4):
            next(steps)
        token: Floats = bent.feeds[3]["latents"][0, :CELLS]
        return token

    assert np.allclose(first_move("dpmpp-2m"), first_move("euler"), atol=1e-6)


def test_hard_tokens_get_fresh_noise_before_each_step_and_no_others_do() -> None:
    wanted = job([WEAK, HARD], renoised=0.15)
    stream = Noise(3)
    stream.normal((1, CLIP.tokens, CHANNELS))
    stream.normal((1, CHANNELS, 1, ROWS, COLUMNS))
    exact, _ = walked(wanted)
    hard = np.s_[CELLS : 2 * CELLS]
    for feeds, sigma in zip(exact.feeds, SIGMAS, strict=False):
        fresh = stream.normal(wanted.latents.shape)[0, hard]
        assert np.allclose(feeds["latents"][0, hard], 7 + 0.15 * sigma**2 * fresh, atol=1e-6)
        assert np.array_equal(feeds["latents"][0, :CELLS], wanted.latents[0, :CELLS]) == (
            sigma >= 0.5
        )


def test_branches_of_guidance_are_told_the_same_levels() -> None:
    guided = replace(job([WEAK]), guidance=(StepGuidance(3.0, 1.0, 0.7, (1,)),) * 4)
    exact, _ = walked(guided)
    assert [feeds["timestep"].shape for feeds in exact.feeds] == [(3, CLIP.tokens + CELLS)] * 4
    assert all(np.ptp(feeds["timestep"], axis=0).max() == 0 for feeds in exact.feeds)


def test_a_clip_without_items_has_one_level() -> None:
    exact, _ = walked(job([]))
    assert [feeds["timestep"].shape for feeds in exact.feeds] == [(1, 1)] * 4
