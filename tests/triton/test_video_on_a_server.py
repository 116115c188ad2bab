"""The video model on a real Triton server, in both layouts: the clips of `ltx-trt run`."""

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")

from tests.triton.asking import until_held
from tests.triton.conftest import RunAlone
from tests.triton.held_steps import Hold
from tests.triton.server import Server
from tests.triton.stream import PROMPTS, Heard, ask
from tests.waiting import until

CLIP: dict[str, Any] = {"prompt": PROMPTS[0], "seed": 7, "num_inference_steps": 6}


def test_a_seed_gives_the_video_of_the_command_line_byte_for_byte(
    running: Server, run_alone: RunAlone
) -> None:
    heard = ask(running.grpc, **CLIP)
    video, report = run_alone(**CLIP)
    assert heard.report["sha256"] == report["sha256"]
    assert heard.video == video
    told = {name: heard.report[name] for name in ("seed", "frames", "width", "height", "sigmas")}
    assert told == {name: report[name] for name in told}


@pytest.mark.parametrize(
    "options",
    [
        {"width": 96, "height": 64, "num_frames": 9},
        {"width": 70, "height": 50, "num_frames": 10, "frame_rate": 29.97},
        {"stg_scale": 1.0, "guidance_scale": 2.5, "negative_prompt": "blue"},
        {"guidance_scale": 1.0},
    ],
)
def test_every_input_means_what_its_option_means(
    running: Server, run_alone: RunAlone, options: dict[str, Any]
) -> None:
    wishes = {**CLIP, "num_inference_steps": 3, **options}
    assert ask(running.grpc, **wishes).video == run_alone(**wishes)[0]


def test_frames_are_those_of_the_report(running: Server, run_alone: RunAlone) -> None:
    heard = ask(running.grpc, format="frames", **CLIP)
    assert (heard.frames.dtype, heard.frames.shape) == ("uint8", (25, 128, 128, 3))
    assert heard.video == b""
    assert sha256(heard.frames.tobytes()).hexdigest() == run_alone(**CLIP)[1]["sha256"]


def test_progress_comes_once_for_each_step_in_order(running: Server) -> None:
    heard = ask(running.grpc, **{**CLIP, "num_inference_steps": 12})
    assert heard.steps == list(range(1, 13))
    kinds = [event["event"] for event in heard.events if event["event"] != "step"]
    assert kinds == ["planned", "stage", "prompt", "stage", "stage", "done"]
    stages = [event["stage"] for event in heard.events if event["event"] == "stage"]
    assert stages == ["text_encoder", "transformer", "vae_decoder"]


def test_a_cancelled_request_stops_within_one_step(running: Server) -> None:
    """It is under way when the news comes, and is the last."""
    before = running.figures()
    heard = ask(running.grpc, cancel_at=2, **Hold(step=3).wishes)
    assert heard.steps == [1, 2]
    wait_for(running, "ltx_requests_cancelled_total", before, 1)
    after = running.figures()
    made = difference("ltx_pass_requests_count", before, after)
    assert made == 3, f"{made:g} steps were made, cancelled after 2"
    assert after[series(after, "ltx_requests_running")] == 0
    assert ask(running.grpc, **CLIP).video


def test_eight_at_once_are_each_as_if_alone(running: Server, run_alone: RunAlone) -> None:
    """Together from their first steps, however late some come: until all are there, the model is
    at work on a clip whose step is held."""
    total, hold = 24, Hold(step=1, steps=2, waiting=8)
    clip = {**CLIP, "num_inference_steps": total}
    wishes = [{**clip, "prompt": PROMPTS[i % 4], "seed": i} for i in range(8)]
    before = running.figures()
    with ThreadPoolExecutor(9) as pool:
        held = pool.submit(ask, running.grpc, **hold.wishes)
        until_held(running, hold, held.done)
        asked = [pool.submit(ask, running.grpc, **wish) for wish in wishes]
    assert held.result().report
    for wish, found in zip(wishes, (one.result() for one in asked), strict=True):
        video, report = run_alone(**wish)
        assert found.report["sha256"] == report["sha256"], wish
        assert found.video == video
        assert found.steps == list(range(1, total + 1))
    after = running.figures()
    shared = difference("ltx_pass_requests_sum", before, after)
    passes = difference("ltx_pass_requests_count", before, after)
    steps = difference("ltx_step_seconds_count", before, after)
    assert steps == shared == 8 * total + hold.steps, "each step is of one pass"
    together = passes - hold.steps
    assert together < 8 * total / 1.5, f"{together:g} passes for {8 * total} steps"


def test_requests_of_any_shapes_at_once_are_each_as_if_alone(
    running: Server, run_alone: RunAlone
) -> None:
    """Half as wide and a third as long are as many tokens; together they would round otherwise."""
    sizes = [{"width": 96}, {"width": 64}, {"num_frames": 9}, {}]
    wishes = [{**CLIP, "num_inference_steps": 3, **size} for size in sizes]
    with ThreadPoolExecutor(4) as pool:
        heard = list(pool.map(lambda wish: ask(running.grpc, **wish), wishes))
    for wish, found in zip(wishes, heard, strict=True):
        assert found.video == run_alone(**wish)[0], wish


def test_an_error_is_of_its_request_alone(running: Server, run_alone: RunAlone) -> None:
    wishes: list[dict[str, Any]] = [CLIP, {**CLIP, "num_frames": 0}, {**CLIP, "prompt": " "}]
    with ThreadPoolExecutor(3) as pool:
        good, *bad = pool.map(lambda wish: ask(running.grpc, **wish), wishes)
    assert good.video == run_alone(**CLIP)[0]
    for heard, wrong in zip(bad, ("num_frames must be", "prompt is empty"), strict=True):
        assert wrong in heard.message
        check_line(heard)


def test_a_lone_request_has_its_passes_to_itself(running: Server) -> None:
    before = running.figures()
    ask(running.grpc, **CLIP)
    after = running.figures()
    assert difference("ltx_pass_requests_sum", before, after) == 6
    assert difference("ltx_pass_requests_count", before, after) == 6


def check_line(heard: Heard) -> None:
    assert heard.message
    assert "\n" not in heard.message
    assert "Traceback" not in heard.message
    assert "/" not in heard.message.replace("-/", ""), heard.message


def series(figures: dict[str, float], name: str) -> str:
    return f'{name}{{model="ltx_video"}}'


def difference(name: str, before: dict[str, float], after: dict[str, float]) -> float:
    return after[series(after, name)] - before[series(before, name)]


def wait_for(running: Server, name: str, before: dict[str, float], more: float) -> None:
    until(lambda: difference(name, before, running.figures()) >= more, f"{more:g} more of {name}")
