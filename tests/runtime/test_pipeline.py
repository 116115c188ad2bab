"""The pipeline with fakes for engines: order, feeds, noise and pixels."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Self

import numpy as np
import pytest

from ltx_engines.bundle import Bundle
from ltx_engines.errors import UserError
from ltx_trt.coordinates import token_coordinates, unpatchify
from ltx_trt.decoder import crop, to_frames
from ltx_trt.guidance import Guidance
from ltx_trt.noise import Noise
from ltx_trt.pipeline import (
    Decoded,
    Event,
    Planned,
    PromptEncoded,
    StageOpened,
    StepDone,
    generate,
)
from ltx_trt.request import Request
from ltx_trt.schedule import Steps
from ltx_trt.session import check_feeds
from tests.runtime.conftest import CHANNELS, LAYERS, LENGTH, WIDTH

CLEAN = np.float32(0.4)

REQUEST = Request(
    prompt="w5 w7",
    negative_prompt="w3",
    width=64,
    height=32,
    num_frames=9,
    frame_rate=25.0,
    seed=5,
    steps=Steps(3),
    guidance=Guidance(3.0, 1.0, 0.7, (1,)),
)

Feeds = dict[str, Any]


class Fake:
    """Engines that record; the transformer is exact for clean latents of CLEAN everywhere."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.log: list[str] = []
        self.feeds: list[tuple[str, Feeds]] = []
        self.velocity: Callable[[Feeds], Any] = lambda f: (
            (f["latents"] - CLEAN) / f["timestep"][..., np.newaxis]
        )

    def open(self, stage: str) -> "FakeSession":
        self.log.append(f"open {stage}")
        return FakeSession(self, stage)

    def of(self, stage: str) -> list[Feeds]:
        return [feeds for name, feeds in self.feeds if name == stage]


class FakeSession:
    def __init__(self, fake: Fake, stage: str) -> None:
        self.fake, self.stage = fake, stage

    def __call__(self, feeds: Any) -> dict[str, Any]:
        check_feeds(self.stage, self.fake.bundle.stage(self.stage), feeds)
        self.fake.feeds.append((self.stage, dict(feeds)))
        if self.stage == "text_encoder":
            ids = feeds["input_ids"].astype(np.float32)
            return {"prompt_embeds": np.repeat(ids[..., np.newaxis], WIDTH, axis=2)}
        if self.stage == "transformer":
            return {"velocity": self.fake.velocity(feeds)}
        frames, rows, columns = feeds["latents"].shape[2:]
        shape = (1, 3, 8 * (frames - 1) + 1, 32 * rows, 32 * columns)
        return {"pixels": np.full(shape, feeds["latents"].mean(), np.float32)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.fake.log.append(f"close {self.stage}")


@pytest.fixture
def fake(bundle: Bundle) -> Fake:
    return Fake(bundle)


def run(fake: Fake, request: Request = REQUEST) -> list[Event]:
    return list(generate(request, fake.bundle, fake.open))


def only(events: list[Event], kind: type[Any]) -> Any:
    (event,) = (event for event in events if isinstance(event, kind))
    return event


def test_one_stage_is_open_at_a_time(fake: Fake) -> None:
    run(fake)
    stages = ("text_encoder", "transformer", "vae_decoder")
    assert fake.log == [f"{verb} {stage}" for stage in stages for verb in ("open", "close")]


def test_events_come_in_the_order_of_the_work(fake: Fake) -> None:
    events = run(fake)
    assert [type(event) for event in events] == [
        Planned,
        StageOpened,
        PromptEncoded,
        StageOpened,
        StepDone,
        StepDone,
        StepDone,
        StageOpened,
        Decoded,
    ]
    planned = only(events, Planned)
    assert planned.shape.latent == (2, 1, 2)
    assert planned.batches == (3, 3, 3)
    (one,) = planned.passes
    assert (one.prompts, one.noises) == (3, 0)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [(s.index, s.total) for s in steps] == [(1, 3), (2, 3), (3, 3)]
    assert [s.sigma for s in steps] == list(planned.sigmas[1:])
    assert only(events, PromptEncoded).tokens == 3


def test_nothing_is_opened_before_the_first_event_is_taken(fake: Fake) -> None:
    events = generate(REQUEST, fake.bundle, fake.open)
    assert isinstance(next(events), Planned)
    assert fake.log == []
    events.close()


def test_leaving_early_closes_what_is_open(fake: Fake) -> None:
    events: Iterator[Event] = generate(REQUEST, fake.bundle, fake.open)
    for event in events:
        if isinstance(event, StepDone):
            break
    events.close()  # type: ignore[attr-defined]
    assert fake.log[-1] == "close transformer"


def test_the_transformer_sees_uncond_text_and_perturbed(fake: Fake) -> None:
    run(fake)
    first, *_ = fake.of("transformer")
    prompts = first["prompt_embeds"][:, :3, 0]
    assert prompts.tolist() == [[3, 1, 0], [5, 7, 1], [5, 7, 1]]
    assert first["prompt_mask"][:, :4].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert first["skip_layer_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert first["timestep"].tolist() == [[1.0]] * 3
    for row in (1, 2):
        assert np.array_equal(first["latents"][0], first["latents"][row])
    expected = token_coordinates(only(run(fake), Planned).shape, 25.0, causal=True)
    assert np.array_equal(first["coords"], np.repeat(expected, 3, axis=0))


def test_without_guidance_one_branch_and_one_prompt_run(fake: Fake) -> None:
    events = run(fake, replace(REQUEST, guidance=Guidance(1.0, 0.0)))
    assert only(events, Planned).batches == (1, 1, 1)
    assert len(fake.of("text_encoder")) == 1
    assert fake.of("transformer")[0]["prompt_embeds"].shape == (1, LENGTH, WIDTH)
    assert fake.of("transformer")[0]["skip_layer_mask"].shape == (LAYERS, 1)


def test_the_batch_follows_the_guidance_timesteps(fake: Fake) -> None:
    guidance = Guidance((3.0, 1.0), (0.0, 1.0), 1.0, (1,), (0.99, 0.1))
    events = run(fake, replace(REQUEST, guidance=guidance, steps=Steps(4)))
    assert [len(f["latents"]) for f in fake.of("transformer")] == [2, 2, 2, 2]
    planned = only(events, Planned)
    masks = [f["skip_layer_mask"].min() for f in fake.of("transformer")]
    assert masks == [1.0 if sigma >= 0.99 else 0.0 for sigma in planned.sigmas[:-1]]


@pytest.mark.parametrize("sampler", ["euler", "stochastic", "dpmpp-2m", "ddim"])
def test_an_exact_model_reaches_the_clean_latents(fake: Fake, sampler: str) -> None:
    eta = 0.5 if sampler == "ddim" else 0.0
    run(fake, replace(REQUEST, sampler=sampler, eta=eta, decode_noise_scale=0.0))
    latents = fake.of("vae_decoder")[0]["latents"]
    assert np.allclose(latents, CLEAN, atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "stochastic"])
def test_noise_comes_from_one_stream_in_the_agreed_order(fake: Fake, sampler: str) -> None:
    events = run(fake, replace(REQUEST, sampler=sampler, decode_noise_scale=0.25))
    assert only(events, Planned).passes[0].noises == (2 if sampler == "stochastic" else 0)
    noise, shape = Noise(5), (1, 4, CHANNELS)
    initial = noise.normal(shape)
    if sampler == "stochastic":
        fresh = [noise.normal(shape) for _ in range(3)]
        at_second = fake.of("transformer")[1]
        sigma = at_second["timestep"][0, 0]
        expected = (1 - sigma) * CLEAN + sigma * fresh[0]
        assert np.allclose(at_second["latents"][0], expected[0], atol=1e-5)
    decode = noise.normal((1, CHANNELS, 2, 1, 2))
    block = noise.normal((2, 2, 4))
    assert np.array_equal(fake.of("transformer")[0]["latents"][:1], initial)
    feeds = fake.of("vae_decoder")[0]
    assert np.allclose(feeds["latents"], 0.75 * CLEAN + 0.25 * decode, atol=1e-5)
    assert np.array_equal(feeds["noise_1"], block)
    assert feeds["timestep"].tolist() == [np.float32(0.05)]


def test_tokens_become_latents_frame_row_column(fake: Fake) -> None:
    fake.velocity = lambda feeds: np.zeros_like(feeds["latents"])
    run(fake, replace(REQUEST, guidance=Guidance(1.0, 0.0), decode_noise_scale=0.0))
    initial = Noise(5).normal((1, 4, CHANNELS))
    expected = unpatchify(initial, (2, 1, 2))
    assert np.array_equal(fake.of("vae_decoder")[0]["latents"], expected)


def test_equal_seeds_give_equal_frames(fake: Fake) -> None:
    one, other = (only(run(fake), Decoded).frames for _ in range(2))
    assert np.array_equal(one, other)


def test_a_size_that_must_be_cut_is_said_and_cut(fake: Fake) -> None:
    events = run(fake, replace(REQUEST, width=50, height=30, num_frames=6))
    planned = only(events, Planned)
    assert (planned.shape.frames, planned.shape.height, planned.shape.width) == (9, 32, 64)
    assert planned.notes == ("6 frames of 30 x 50 (height x width) are cut out of 9 of 32 x 64",)
    assert only(events, Decoded).frames.shape == (6, 30, 50, 3)
    with pytest.raises(UserError, match="width must be a multiple of 32"):
        run(fake, replace(REQUEST, width=50, strict_shape=True))


def test_a_prompt_that_is_cut_is_said(fake: Fake) -> None:
    events = run(fake, replace(REQUEST, prompt="w4 " * 30))
    assert only(events, PromptEncoded).notes == (
        "the prompt has 31 tokens, the last 19 are cut off",
    )


def test_starting_from_a_video_is_refused(fake: Fake) -> None:
    with pytest.raises(UserError, match="skip_initial_inference_steps"):
        run(fake, replace(REQUEST, steps=Steps(30, skip_initial=17)))
    assert fake.log == []


def test_an_overflow_names_the_step_and_stops(fake: Fake) -> None:
    fake.velocity = lambda feeds: np.full_like(feeds["latents"], np.inf)
    with pytest.raises(UserError, match="velocity at step 1 overflowed"):
        run(fake, replace(REQUEST, guidance=Guidance(1.0, 0.0)))
    assert fake.log[-1] == "close transformer"


def test_pixels_are_clipped_and_truncated_as_in_the_original() -> None:
    values = np.array([-1.5, -1.0, -0.5, 0.0, 0.999, 1.0, 7.0], np.float32)
    frames = to_frames(np.broadcast_to(values, (1, 3, 2, 4, 7)))
    assert frames.shape == (2, 4, 7, 3)
    assert frames[1, 2, :, 0].tolist() == [0, 0, 63, 127, 254, 255, 255]


def test_padding_is_cut_on_both_sides_the_odd_pixel_at_the_end() -> None:
    frames = np.zeros((9, 32, 64, 3), np.uint8)
    frames[:, 1:30, 7:57] = 9
    found = crop(frames, 5, 29, 50)
    assert found.shape == (5, 29, 50, 3)
    assert (found == 9).all()
