"""Clips in windows: where they lie, what each is held to, and that nothing else has changed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_trt import SEED, cli
from ltx_trt.backend import Choice, VaeTile
from ltx_trt.conditioning import Item, Place, condition
from ltx_trt.coordinates import token_coordinates, unpatchify
from ltx_trt.denoising import Text
from ltx_trt.guidance import Guidance
from ltx_trt.long_video import (
    Chunks,
    Scene,
    Window,
    _seconds,
    check_prompts,
    chunked,
    parse_prompts,
    prompts,
    windows,
)
from ltx_trt.noise import Noise
from ltx_trt.options import SHIPPED
from ltx_trt.pipeline import Event, Floats, Planned, StepDone, _Run, frames_of, generate, plan
from ltx_trt.request import Request, SecondPass, Wishes, resolve
from ltx_trt.schedule import Steps
from ltx_trt.session import Feeds, check_feeds
from ltx_trt.session.choice import open_stages
from ltx_trt.session.vae_tiles import STRETCH, HostTiles
from tests.runtime import upsampling
from tests.runtime.conftest import CHANNELS, WIDTH

REQUEST = Request(
    prompt="w5",
    negative_prompt="w3",
    width=64,
    height=32,
    num_frames=65,
    frame_rate=24.0,
    seed=5,
    steps=Steps(2),
    guidance=Guidance(1.0),
    chunks=Chunks(25),
)


@pytest.mark.parametrize("latent_frames", range(1, 40))
@pytest.mark.parametrize("chunks", [Chunks(9), Chunks(25), Chunks(33, 2), Chunks(65, 8)])
def test_windows_make_each_latent_frame_once_and_hold_enough(
    latent_frames: int, chunks: Chunks
) -> None:
    found = windows(latent_frames, chunks)
    made = [frame for part in found for frame in range(latent_frames)[part.new]]
    assert made == list(range(latent_frames))
    assert len({part.end - part.first for part in found}) == 1
    assert all(chunks.held <= part.held < part.end - part.first for part in found[1:])
    assert found[0].held == 0


def test_a_clip_in_one_piece_is_one_window() -> None:
    assert windows(13, None) == (Window(0, 0, 13),)
    assert windows(4, Chunks(25)) == (Window(0, 0, 4),)


def test_each_frame_is_made_in_one_window() -> None:
    parts = windows(9, Chunks(25))
    assert [part.first_new_frame for part in parts] == [0, 25, 49]
    assert [sum(part.makes(frame) for part in parts) for frame in range(65)] == [1] * 65


@pytest.mark.parametrize(
    ("seconds", "frames", "found"),
    [
        (None, 481, None),  # 20 seconds
        (None, 489, Chunks(121, 3)),
        (1.0, 49, Chunks(25)),
        (2.0, 49, None),
        (0.375, 49, Chunks(9)),
        (20.0, 961, Chunks(473, 12)),
    ],
)
def test_a_chunk_is_said_in_seconds_and_needed_above_twenty(
    seconds: float | None, frames: int, found: Chunks | None
) -> None:
    assert chunked(seconds, frames, 24, 121) == found


@pytest.mark.parametrize("seconds", [0, -1, 0.3, 20.5, float("nan"), float("inf")])
def test_a_chunk_that_the_model_cannot_see_is_refused_in_seconds(seconds: float) -> None:
    with pytest.raises(UserError, match=r"--chunk must be from 0.375 to 20 seconds"):
        chunked(seconds, 961, 24, 121)


def test_a_text_counts_from_its_time_on() -> None:
    changes = parse_prompts(["2:w9", " 1.04 : w7 "], 65, 24)
    assert changes == ((25, "w7"), (48, "w9"))
    parts = windows(9, Chunks(25))
    assert prompts("w5", Chunks(25, 1, changes), parts) == ("w5", "w7", "w9")
    assert prompts("w5", None, windows(9, None)) == ("w5",)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("w5", "is SECONDS:TEXT"),
        ("x:w5", "is SECONDS:TEXT"),
        ("inf:w5", "is SECONDS:TEXT"),
        ("nan:w5", "is SECONDS:TEXT"),
        ("0:w5", "the clip goes from 0 to 2.708 seconds"),
        ("3:w5", "the clip goes from 0 to 2.708 seconds"),
        ("1:  ", "says nothing"),
        ("2.0:w9", "there is a text for this time"),
    ],
)
def test_a_text_that_has_no_place_is_refused(word: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_prompts(["2:w5", word], 65, 24)


def scene(*items: tuple[Item, Floats]) -> Scene:
    return Scene.of(items, (1, 2, 9, 1, 2))


MADE = np.arange(36, dtype=np.float32).reshape(1, 2, 9, 1, 2)
PLACE = Place(VideoShape(25, 32, 64), 24.0, causal=True)
SECOND_WINDOW = windows(9, Chunks(25))[1]
STILL = Item(np.zeros((1, 3, 1, 32, 64), np.float32))


def test_a_window_begins_with_the_very_latents_of_the_last_at_their_own_distance() -> None:
    latents = np.full((1, 2, 4, 1, 2), -1, np.float32)
    found = scene().condition(latents, SECOND_WINDOW, MADE, PLACE, Noise(1))
    assert found.strengths is not None
    grid = unpatchify(found.latents, (4, 1, 2))
    np.testing.assert_array_equal(grid[:, :, :1], MADE[:, :, 3:4])
    assert (grid[:, :, 1:] == -1).all()
    assert found.strengths.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert found.extra == 0
    whole = token_coordinates(VideoShape(65, 32, 64), 24.0, causal=True)[..., 6:14]
    away = whole - found.coordinates
    assert np.ptp(away[:, 0]) < 1e-5  # one shift in time
    assert not away[:, 1:].any()


def test_an_image_stands_beside_the_window_that_makes_its_frame_at_its_time() -> None:
    image = (replace(STILL, frame=30, strength=0.5), np.ones((1, 2, 1, 1, 2), np.float32))
    latents = np.zeros((1, 2, 4, 1, 2), np.float32)
    first, second, _ = windows(9, Chunks(25))
    assert scene(image).condition(latents, first, MADE, PLACE, Noise(1)).extra == 0
    found = scene(image).condition(latents, second, MADE, PLACE, Noise(1))
    assert found.strengths is not None
    assert found.extra == 2
    assert found.strengths.tolist() == [[0.5, 0.5, 1, 1, 0, 0, 0, 0, 0, 0]]
    times = found.coordinates[0, 0] * 24
    # the window's second latent frame is the clip's fifth, which begins at frame 25
    assert round(float(times[0] - times[4])) == 30 - 25


def test_a_sequence_goes_on_through_all_windows_that_it_reaches() -> None:
    given = (replace(STILL, strength=0.25), np.full((1, 2, 6, 1, 2), 8, np.float32))
    latents = np.zeros((1, 2, 4, 1, 2), np.float32)
    found = scene(given).condition(latents, SECOND_WINDOW, MADE, PLACE, Noise(1))
    grid = unpatchify(found.latents, (4, 1, 2))
    assert grid[0, 0, 1:, 0, 0].tolist() == [2, 2, 0]  # latent frames 4, 5 and 6 of the clip
    assert found.strengths is not None
    assert found.strengths.tolist() == [[1, 1, 0.25, 0.25, 0.25, 0.25, 0, 0]]


@pytest.mark.parametrize("strengths", [(0.5, 0.25), (1.0, 0.25), (0.75, 1.0), (0.5, 0.0)])
def test_items_that_overlap_are_mixed_in_a_chunk_as_in_one_piece(
    strengths: tuple[float, float],
) -> None:
    """Sequences from frame 0, 25 frames, and from frame 8, which has four latent frames more: two
    beside the clip's own, and two at the third and fourth of them."""
    numbers = np.random.default_rng(3)
    noise, *given = (numbers.standard_normal((1, 2, 4, 1, 2)).astype(np.float32) for _ in range(3))
    pixels = np.zeros((1, 3, 25, 32, 64), np.float32)
    items = [
        (Item(pixels, frame, strength), latents)
        for frame, strength, latents in zip((0, 8), strengths, given, strict=True)
    ]
    first = windows(9, Chunks(33))[0]
    longer = replace(PLACE, shape=replace(PLACE.shape, frames=33))
    noise = np.concatenate([noise, noise[:, :, :1]], axis=2)
    chunk = scene(*items).condition(noise, first, MADE, longer, Noise(1))
    whole = condition(noise, items, longer, Noise(1))
    np.testing.assert_allclose(chunk.latents, whole.latents, atol=1e-6)
    np.testing.assert_array_equal(chunk.coordinates, whole.coordinates)
    assert chunk.strengths is not None
    assert whole.strengths is not None
    np.testing.assert_array_equal(chunk.strengths, whole.strengths)


class Fake:
    """Engines that record; the transformer's answer depends on the prompt and on what it sees."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.opened: list[str] = []
        self.fed: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, stage: str) -> "FakeSession":
        self.opened.append(stage)
        return FakeSession(self, stage)

    def of(self, stage: str) -> list[dict[str, Any]]:
        return [feeds for name, feeds in self.fed if name == stage]

    def run(self, request: Request) -> list[Event]:
        return list(generate(request, self.bundle, self))


class FakeSession:
    def __init__(self, fake: Fake, stage: str) -> None:
        self.fake, self.stage = fake, stage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, feeds: Feeds) -> dict[str, Any]:
        check_feeds(self.stage, self.fake.bundle.stage(self.stage), feeds)
        self.fake.fed.append((self.stage, dict(feeds)))
        if self.stage == "text_encoder":
            ids = feeds["input_ids"].astype(np.float32)
            return {"prompt_embeds": np.repeat(ids[..., np.newaxis], WIDTH, axis=2)}
        latents = feeds["latents"]
        if self.stage == "transformer":
            return {"velocity": latents * 0.5 - feeds["prompt_embeds"].mean() / 10}
        if self.stage == "latent_upsampler":
            return {"upsampled": latents.repeat(2, axis=3).repeat(2, axis=4)}
        frames, rows, columns = latents.shape[2:]
        shape = (1, 3, 8 * (frames - 1) + 1, 32 * rows, 32 * columns)
        return {"pixels": np.zeros(shape, np.float32)}


@pytest.fixture
def fake(bundle: Bundle) -> Fake:
    return Fake(bundle)


def test_a_clip_in_chunks_opens_each_stage_once_and_counts_all_steps(fake: Fake) -> None:
    events = fake.run(REQUEST)
    assert fake.opened == ["text_encoder", "transformer", "vae_decoder"]
    assert frames_of(events).shape == (65, 32, 64, 3)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [(step.index, step.total) for step in steps] == [(n, 6) for n in range(1, 7)]
    planned = next(event for event in events if isinstance(event, Planned))
    assert planned.shape == VideoShape(65, 32, 64)
    assert planned.batches == (1,) * 6
    assert [one.shape.frames for one in planned.passes] == [25]
    assert planned.notes == ("made in 3 chunks of 1.04 seconds",)


def test_what_is_held_is_what_was_made_and_is_told_to_be_clean(fake: Fake) -> None:
    fake.run(replace(REQUEST, decode_noise_scale=0))
    calls, (decoded,) = fake.of("transformer"), fake.of("vae_decoder")
    assert len(calls) == 6
    noise = Noise(REQUEST.seed)
    first = calls[0]["latents"]
    np.testing.assert_array_equal(first, noise.normal((1, 8, CHANNELS)))
    assert not (calls[0]["timestep"] != calls[0]["timestep"][0, 0]).any()
    windows_of = [None, None, (3, 1), (3, 1), (5, 2), (5, 2)]  # the last is as long as the others
    for call, window in zip(calls, windows_of, strict=True):
        if window is not None:
            first, held = window
            assert (call["timestep"][:, : 2 * held] == 0).all()
            assert (call["timestep"][:, 2 * held :] > 0).all()
            seen = unpatchify(call["latents"], (4, 1, 2))[:, :, :held]
            np.testing.assert_array_equal(seen, decoded["latents"][:, :, first : first + held])


def test_each_window_hears_its_text(fake: Fake) -> None:
    fake.run(replace(REQUEST, chunks=Chunks(25, 1, ((24, "w7"), (48, "w9")))))
    heard = [float(call["prompt_embeds"].max()) for call in fake.of("transformer")]
    assert heard[0] == heard[1] < heard[2] == heard[3] < heard[4] == heard[5]
    assert len(fake.of("text_encoder")) == 3


def test_a_clip_that_fits_into_one_chunk_is_as_without(fake: Fake) -> None:
    short = replace(REQUEST, num_frames=25)
    in_chunks, at_once = (frames_of(fake.run(r)) for r in (short, replace(short, chunks=None)))
    np.testing.assert_array_equal(in_chunks, at_once)
    one, two = (fake.of("transformer")[index] for index in (0, 2))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_two_passes_go_through_the_windows_one_after_the_other(
    make_bundle: Callable[..., Path],
) -> None:
    pytest.importorskip("onnx")
    folder = make_bundle()
    upsampling.add(folder)
    fake = Fake(open_bundle(folder))
    second = SecondPass(Steps(timesteps=(0.5,)), Guidance(1.0), downscale_factor=0.5)
    events = fake.run(replace(REQUEST, height=64, second=second))
    assert fake.opened == [
        *("text_encoder", "transformer", "latent_upsampler", "transformer", "vae_decoder")
    ]
    assert [call["latents"].shape[1] for call in fake.of("transformer")] == [4] * 6 + [16] * 3
    assert len(fake.of("latent_upsampler")) == 3
    assert frames_of(events).shape == (65, 64, 64, 3)
    for call, held in zip(fake.of("transformer")[7:], (1, 2), strict=True):
        assert (call["timestep"][:, : 4 * held] == 0).all()
        assert (call["timestep"][:, 4 * held :] == 0.5).all()


TINY = Wishes("a red circle moves right on a blue background", width=64, height=64, seed=SEED)


def test_ltx_tiny_goes_on_from_a_video_in_chunks_and_keeps_its_frames() -> None:
    """A video over more than one chunk, and an image at the end of the clip."""
    pytest.importorskip("onnxruntime")
    wishes = replace(TINY, num_frames=49, num_inference_steps=3, chunk=1.0)
    blue = np.empty((1, 3, 33, 64, 64), np.float32)
    blue[:] = np.array([-0.7, -0.4, 0.7], np.float32).reshape(1, 3, 1, 1, 1)
    with open_stages(SHIPPED, Choice(threads=1)) as stages:
        request, _ = resolve(wishes, stages.bundle)
        assert request.chunks == Chunks(25)
        held = replace(request, conditioning=(Item(blue), Item(-blue[:, :, :1], 48)))
        assert plan(held, stages.bundle.manifest).passes[0].extra == 4
        frames = frames_of(generate(held, stages.bundle, stages))
        free = frames_of(generate(request, stages.bundle, stages))
        again = frames_of(generate(request, stages.bundle, stages))
    wanted = np.array([38, 76, 216])
    assert np.abs(frames[1:32] - wanted).mean() < 10
    assert np.abs(free[1:32] - wanted).mean() > np.abs(frames[1:32] - wanted).mean()
    np.testing.assert_array_equal(free, again)


def test_texts_over_time_need_chunks() -> None:
    bundle = open_bundle(SHIPPED)
    with pytest.raises(UserError, match="--prompt-at is of clips that are made in chunks"):
        resolve(replace(TINY, num_frames=49, prompt_at=("1:w5",)), bundle)
    request, _ = resolve(replace(TINY, num_frames=961, prompt_at=("1:w5",)), bundle)
    assert request.chunks == Chunks(25, 1, ((24, "w5"),))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--chunk", "0"), "--chunk must be from 0.375 to 20 seconds"),
        (("--chunk", "21"), "(the model's window) at 24 frames a second, not 21"),
        (
            ("--chunk", "1", "--prompt-at", "w5"),
            "--prompt-at is SECONDS:TEXT, such as 2.5:TEXT, not 'w5'",
        ),
        (("--prompt-at", "1:w5"), "say how long a chunk is: --chunk SECONDS"),
    ],
)
def test_what_cannot_be_chunked_costs_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ("run", "--prompt", "w5", "--num-frames", "49", "-o", "o.mp4", *arguments)
    assert cli.main(line) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_long_clip_is_decoded_in_stretches_however_much_memory_there_is() -> None:
    def tile(frames: int, wish: VaeTile = VaeTile.auto, budget: int | None = None) -> Any:
        return HostTiles("vae_decoder", 300.0, budget, wish)((frames, 4, 4))

    assert tile(STRETCH) is None
    assert tile(STRETCH + 1) == tile(400, budget=1 << 40) == (STRETCH, 4, 4)
    assert tile(400, VaeTile.off) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["1:w7", "0.5:w9"], "--prompt-at 0.5:w9: no chunk shows this text"),
        (["2.5:w7"], "those near it begin at 1.042, 2.042 seconds"),
    ],
)
def test_a_text_that_no_chunk_shows_is_refused(words: list[str], said: str) -> None:
    chunks = Chunks(25, 1, parse_prompts(words, 65, 24))
    with pytest.raises(UserError, match=said):
        check_prompts(chunks, windows(9, chunks), 24)


def test_a_text_that_comes_late_says_when() -> None:
    chunks = Chunks(25, 1, parse_prompts(["1:w7", "2.042:w9"], 65, 24))
    notes = check_prompts(chunks, windows(9, chunks), 24)
    assert notes == ("--prompt-at counts where the next chunk begins: 1 at 1.042 seconds",)


@pytest.mark.parametrize("rate", [23.976, 24, 30, 240])
def test_the_times_that_a_refusal_names_can_be_used(rate: float) -> None:
    chunks = Chunks(25)
    parts = windows(41, chunks)
    for part in parts[1:]:
        word = f"{_seconds(part.first_new_frame, rate)}:w7"
        (said,) = parse_prompts([word], 321, rate)
        assert said[0] == part.first_new_frame


def test_a_clip_for_a_still_image_model_is_not_refused_for_a_chunk_nobody_has_said() -> None:
    assert chunked(None, 482, 24, 1) == Chunks(9)


def test_a_chunk_longer_than_the_clip_says_that_it_has_no_effect() -> None:
    bundle = open_bundle(SHIPPED)
    request, notes = resolve(replace(TINY, num_frames=49, chunk=5.0), bundle)
    assert request.chunks is None
    assert notes == ("--chunk 5 has no effect: the clip has 2.04 seconds",)


def test_an_image_does_not_make_the_held_end_of_a_window_noisy() -> None:
    """It was, before each step, by the noise that is for images."""
    image = Item(np.zeros((1, 3, 1, 32, 64), np.float32))
    run = _Run.plan(replace(REQUEST, conditioning=(image,)), open_bundle(SHIPPED).manifest)
    channels, one = run.manifest.model.latent_channels, run.passes[0]
    clip = (1, channels, 9, 1, 2)
    scene = Scene.of([(image, np.zeros((1, channels, 1, 1, 2), np.float32))], clip)
    text = Text(np.zeros((1, 1, 1), np.float32), np.ones((1, 1), np.float32))
    for part in run.windows[:2]:
        latents, place = run._begun(one, part, None)
        held = scene.condition(latents, part, np.ones(clip, np.float32), place, run.noise)
        job = run._job(one, held, (text, text))
        seen = job.renoised(job.latents, one.table[0])
        moved = np.abs(seen - job.latents).max(axis=2)[0] > 0
        assert moved.tolist() == [part.first == 0] * 2 + [False] * 6
