"""ltx-trt client against a server that says what each test needs."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines.errors import UserError
from ltx_engines.triton_model import INPUTS
from ltx_trt import cli

grpc = pytest.importorskip("grpc")
pytest.importorskip("tritonclient.grpc")

from ltx_trt.triton.client import Call, follow  # noqa: E402
from tests.runtime.triton_server import done, refusal, said, serving, step  # noqa: E402
from tests.waiting import HANG  # noqa: E402

VIDEO = bytes(range(256)) * 20_000
"""More than the four megabytes that gRPC takes when nobody says otherwise."""


def client(url: str, output: Path, *more: object) -> int:
    words = ("client", "--url", url, "--prompt", "a red circle", "-o", output, *more)
    return cli.main([str(word) for word in words])


def clip(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
    yield said({"event": "planned", "steps": 2, "notes": ["a note of the server"]})
    yield said({"event": "stage", "stage": "transformer", "seconds": 0.1})
    yield from (step(1), step(2))
    yield done(VIDEO, seed=wishes["seed"])


def test_the_servers_bytes_become_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(clip) as (url, _):
        assert client(url, tmp_path / "out.mp4", "--seed", 7, "--json") == 0
    assert (tmp_path / "out.mp4").read_bytes() == VIDEO
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["seed"], report["output"]) == (7, str(tmp_path / "out.mp4"))
    assert "write" in report["seconds"]
    assert err == "ltx-trt: a note of the server\n"


def test_a_refusal_with_a_status_of_its_own_ended_the_whole_server() -> None:
    """Now and then, on 24.10: the header that asks for one is not sent."""
    with serving(clip) as (url, seen):
        list(follow(Call(url, {"prompt": "x", "seed": 7})))
    assert "user-agent" in seen.headers
    assert "triton_grpc_error" not in seen.headers


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.mp4").write_bytes(b"old")

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device", str(path))

    with serving(clip) as (url, _):
        monkeypatch.setattr(Path, "write_bytes", full)
        assert client(url, tmp_path / "out.mp4") == 2
    assert "No space left on device" in one_line_at_the_end(capsys)
    assert (tmp_path / "out.mp4").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def one_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_what_is_not_said_is_not_sent(tmp_path: Path) -> None:
    with serving(clip) as (url, seen):
        assert client(url, tmp_path / "out.mp4") == 0
    assert seen.wishes == [{"prompt": "a red circle", "seed": 171198, "format": "mp4"}]


def test_every_wish_arrives_as_it_was_said(tmp_path: Path) -> None:
    wishes: dict[str, Any] = {
        "negative_prompt": "blurry, \u00e4",
        "seed": 2**63 - 1,
        "width": 64,
        "height": 32,
        "num_frames": 9,
        "num_inference_steps": 3,
        "frame_rate": 12.5,
        "guidance_scale": 2.0,
        "stg_scale": 0.5,
    }
    options = (
        word for name, wish in wishes.items() for word in (f"--{name.replace('_', '-')}", wish)
    )
    with serving(clip) as (url, seen):
        assert client(url, tmp_path / "out.mp4", *options) == 0
    assert seen.wishes == [{"prompt": "a red circle", **wishes, "format": "mp4"}]
    assert {wire.name for wire in INPUTS} == seen.wishes[0].keys()


def test_answers_come_one_by_one_in_order() -> None:
    """The second step is not computed before the first has been seen."""
    seen_first = threading.Event()

    def slow(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
        yield step(1)
        assert seen_first.wait(HANG)
        yield from (step(2), done(b"v"))

    found = []
    with serving(slow) as (url, _):
        for answer in follow(Call(url, {"prompt": "x"})):
            found.append((answer.event["event"], answer.event.get("index")))
            seen_first.set()
    assert found == [("step", 1), ("step", 2), ("done", None)]


def test_frames_become_pictures_and_are_checked(tmp_path: Path) -> None:
    frames = np.arange(2 * 2 * 4 * 3, dtype=np.uint8).reshape(2, 2, 4, 3)

    def pictures(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
        assert wishes["format"] == "frames"
        yield done(frames=frames, sha256=sha256(frames.tobytes()).hexdigest())

    with serving(pictures) as (url, _):
        assert client(url, tmp_path / "clip") == 0
    from PIL import Image

    with Image.open(tmp_path / "clip" / "0001.png") as image:
        assert (np.asarray(image) == frames[1]).all()


def test_frames_that_are_not_the_reports_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
        yield done(frames=np.zeros((2, 2, 4, 3), np.uint8), sha256="0" * 64)

    with serving(wrong) as (url, _):
        assert client(url, tmp_path / "clip") == 2
    assert "not those of the server's report" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def ends_with(code: Any, text: str) -> Callable[..., Iterator[Any]]:
    def script(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
        yield step(1)
        context.abort(code, text)

    return script


@pytest.mark.parametrize(
    ("status", "text", "wanted"),
    [
        ("INVALID_ARGUMENT", "num_frames must be from 1\nto 32768, not 0", "from 1 to 32768"),
        ("INTERNAL", "Stub process 'ltx_video_0_0' is not healthy.", "start the server again"),
        ("UNAVAILABLE", "Exceeds maximum queue size", "ask again later"),
        ("UNAVAILABLE", "Server exiting", "start it, or give its --url"),
    ],
)
def test_what_the_server_refuses_is_one_line_and_no_file(
    status: str, text: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(ends_with(grpc.StatusCode[status], text)) as (url, _):
        assert client(url, tmp_path / "out.mp4") == 2
    assert wanted in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("unexpected inference input 'x' for model 'ltx_video'", "unexpected inference input 'x'"),
        ("Exceeds maximum queue size", "ask again later"),
        ("Request for unknown model: 'ltx_video' has no available versions", "has no model"),
    ],
)
def test_an_error_without_a_status_is_known_by_its_words(
    text: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def old(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
        response = said({"event": "step"})
        response.error_message = text
        yield response

    with serving(old) as (url, _):
        assert client(url, tmp_path / "out.mp4") == 2
    assert wanted in one_line(capsys)


def test_a_stream_that_ends_early_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
        yield step(1)

    with serving(short) as (url, _):
        assert client(url, tmp_path / "out.mp4") == 2
    assert "without a clip" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_report_without_a_video_writes_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def empty(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
        yield done(b"")

    with serving(empty) as (url, _):
        assert client(url, tmp_path / "out.mp4") == 2
    assert "sent no video" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_told_from_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
        response = said({})
        yield response

    with serving(other) as (url, _):
        assert client(url, tmp_path / "out.mp4") == 2
    assert "does not understand" in one_line(capsys)


def test_an_unknown_model_is_named() -> None:
    with (
        serving(clip) as (url, _),
        pytest.raises(UserError, match="has no model nope"),
    ):
        list(follow(Call(url, {"prompt": "x"}, model="nope")))


def stuck(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
    yield step(1)
    gone = threading.Event()
    if context.add_callback(gone.set):  # it has not ended already
        gone.wait(HANG)


def test_giving_up_cancels_at_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timeout = 0.25
    with serving(stuck) as (url, seen):
        while not seen.wishes:  # until a call gets there in its time
            timeout *= 2
            assert client(url, tmp_path / "out.mp4", "--timeout", timeout) == 2
            assert f"took longer than --timeout {timeout:g};" in one_line(capsys)
        assert seen.gone.wait(HANG)


DEAD = "Stub process 'ltx_video_0_0' is not healthy."


def test_silence_of_a_dead_model_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton never ends the stream, and says why to the next one who asks."""
    monkeypatch.setattr("ltx_trt.triton.client.PATIENCE", 0.2)

    def dies(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
        if not wishes["prompt"]:
            yield refusal(DEAD)
            return
        yield from stuck(wishes, context)

    with serving(dies) as (url, seen):
        assert client(url, tmp_path / "out.mp4") == 2
        assert seen.gone.wait(HANG)
    assert f"{DEAD}; the model's process has died" in one_line(capsys)


def test_silence_of_a_model_at_work_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ltx_trt.triton.client.PATIENCE", 0.1)
    asked = threading.Semaphore(0)

    def works(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
        if not wishes["prompt"]:
            asked.release()
            yield refusal("the prompt is empty")
            return
        for _ in range(3):
            assert asked.acquire(timeout=HANG)
        yield done(b"v")

    with serving(works) as (url, _):
        assert client(url, tmp_path / "out.mp4") == 0


def test_whoever_stops_reading_cancels_at_the_server() -> None:
    with serving(stuck) as (url, seen):
        answers = follow(Call(url, {"prompt": "x"}))
        assert next(answers).event["index"] == 1
        answers.close()
        assert seen.gone.wait(HANG)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_at_the_server_and_leaves_no_file(number: int, tmp_path: Path) -> None:
    started = threading.Event()

    def waiting(wishes: dict[str, Any], context: Any) -> Iterator[Any]:
        started.set()
        yield from stuck(wishes, context)

    with serving(waiting) as (url, seen):
        words = ["client", "--url", url, "--prompt", "x", "-o", str(tmp_path / "out.mp4")]
        process = subprocess.Popen(
            [sys.executable, "-m", "ltx_trt.cli", *words], stderr=subprocess.PIPE, text=True
        )
        assert started.wait(HANG)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=HANG)
        assert process.returncode == 130
        assert seen.gone.wait(HANG)
    assert err == "ltx-trt: interrupted; nothing is half-written\n"
    assert list(tmp_path.iterdir()) == []


def test_nobody_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nobody else's while we have it, and nobody listens
        url = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
        assert client(url, tmp_path / "out.mp4") == 2
    assert f"no Triton server answers at {url}" in one_line(capsys)


@pytest.mark.parametrize(
    "url", ["http://x:8000", "grpc://x", "x:8001", "grpc://x:99999", "grpc://x:1/path", "grpc://:1"]
)
def test_a_url_that_is_none_is_refused(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert client(url, tmp_path / "out.mp4") == 2
    assert "is not like grpc://localhost:8001" in one_line(capsys)


def test_the_output_is_checked_before_anybody_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(clip) as (url, seen):
        assert client(url, tmp_path / "no" / "out.mp4") == 2
        assert client(url, tmp_path / "out.mp4", "--width", 63) == 2
    assert seen.wishes == []
    assert "there is no folder" in capsys.readouterr().err


def test_a_seed_beyond_the_wires_integers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert client("grpc://localhost:1", tmp_path / "out.mp4", "--seed", 2**63) == 2
    assert "seed must be from" in one_line(capsys)


def test_a_call_knows_only_the_models_inputs() -> None:
    with pytest.raises(ValueError, match="no input"):
        Call("grpc://localhost:1", {"prompt": "x", "steps": 3})
