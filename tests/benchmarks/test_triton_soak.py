"""How the soak of a Triton server draws its requests, and what it calls wrong."""

from hashlib import sha256

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")

import triton_soak as soak
from ltx_trt import media
from tests.triton.asking import Outcome

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 200, (3, 32, 32, 3), np.uint8)
VIDEO = media.video_bytes(FRAMES, 24.0)


def clip() -> soak.Ask:
    return next(one for one in soak.drawn(50, 1) if one.kind == "clip")


def answer(one: soak.Ask, frames: media.Frames = FRAMES) -> Outcome:
    steps = one.question.wishes["num_inference_steps"]
    events = [{"event": "step", "index": index + 1} for index in range(steps)]
    report = {"event": "done", "sha256": sha256(frames.tobytes()).hexdigest()}
    return Outcome(events=[*events, report], video=media.video_bytes(frames, 24.0))


def judged(one: soak.Ask, seen: Outcome) -> str:
    alone = soak.Clip(sha256(FRAMES.tobytes()).hexdigest(), VIDEO)
    return soak.judged(one, seen, {one.clip: alone})


def test_one_seed_draws_one_list_with_all_kinds() -> None:
    asks = soak.drawn(300, 6)
    assert asks == soak.drawn(300, 6) != soak.drawn(300, 7)
    assert {one.kind for one in asks} == {"clip", "cancelled", *soak.WRONG}


def test_the_clip_that_is_made_alone_is_right() -> None:
    one = clip()
    assert judged(one, answer(one)) == ""


def test_one_level_in_one_pixel_is_another_clip() -> None:
    one, near = clip(), FRAMES.copy()
    near[1, 3, 4, 0] += 1
    assert judged(one, answer(one, near)) == "another clip"
    assert judged(one, answer(one, FRAMES[:2])) == "another clip"


def test_a_step_that_was_not_told_is_wrong() -> None:
    one, seen = clip(), answer(clip())
    del seen.events[0]
    assert judged(one, seen).startswith("steps ")


@pytest.mark.parametrize("kind", soak.WRONG)
def test_a_wrong_request_must_be_refused_in_its_own_words(kind: str) -> None:
    one = soak.Ask(kind, clip().question)
    said = soak.WRONG[kind][2]
    assert judged(one, Outcome("INVALID_ARGUMENT", f"{said} and so on")) == ""
    assert judged(one, Outcome("INVALID_ARGUMENT", "something else"))
    assert judged(one, Outcome("OK", said))


def test_who_gave_up_hears_no_more_and_who_hears_nothing_is_lost() -> None:
    gone = soak.Ask("cancelled", clip().question)
    assert judged(gone, Outcome("CANCELLED")) == ""
    assert judged(gone, Outcome("OK"))
    assert judged(gone, Outcome("DEADLINE_EXCEEDED")) == soak.LOST


def test_memory_that_grows_to_the_end_is_not_met() -> None:
    one = clip()
    clips = {one.clip: soak.Clip(sha256(FRAMES.tobytes()).hexdigest(), VIDEO)}

    def row(sizes: list[int]) -> dict[str, object]:
        memory = soak.Memory([(float(i + 1), size) for i, size in enumerate(sizes)])
        return {**soak.summed([one], [answer(one)], clips, memory), "leftovers": 0}

    assert soak.met(row([1, 100, 100, 100, 100, 101]))
    assert not soak.met(row([100, 100, 100, 110, 120, 120]))
    assert not soak.met({**row([1, 1, 1, 1, 1, 1]), "leftovers": 1})
