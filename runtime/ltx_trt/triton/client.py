"""A clip from a Triton server: answers as they come, progress, a file that is whole or not there.

Whoever stops reading the answers, by Ctrl-C or otherwise, cancels the request at the server. The
header `triton_grpc_error`, which gives a refusal a status, is not sent: such a refusal may end the
whole server (24.10: 8 times of 2,400, signal 11). Without it a refusal has a text and no status.
"""

import json
import struct
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np

from ltx_engines.errors import UserError
from ltx_engines.triton_model import INPUTS, VIDEO
from ltx_trt import media
from ltx_trt.job import Report, Voice

SCHEMES = {"grpc": False, "grpcs": True}
"""Whether the connection is encrypted."""

NUMBERS: dict[str, Any] = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}

PATIENCE = 30.0
"""Seconds of silence until the server is asked whether the model's process is alive."""

RESTART = "the model's process has died: its operator has to start the server again"

Value = str | int | float


@dataclass(frozen=True, slots=True)
class Call:
    """`wishes` are by the names of INPUTS; what is left out is the server's to choose. `timeout` is
    in seconds, of the whole call."""

    url: str
    wishes: Mapping[str, Value]
    model: str = VIDEO
    timeout: float | None = None

    def __post_init__(self) -> None:
        known = {wire.name for wire in INPUTS}
        if unknown := sorted(self.wishes.keys() - known):
            raise ValueError(f"{VIDEO} has no input {unknown}, only {sorted(known)}")
        for wire in INPUTS:
            if wire.dtype in ("INT32", "INT64") and wire.name in self.wishes:
                _check_range(wire.name, wire.dtype, int(self.wishes[wire.name]))


@dataclass(frozen=True, slots=True)
class Answer:
    """`video` is empty in all answers but the last, and there too if frames were asked for."""

    event: dict[str, Any]
    video: bytes = b""
    frames: media.Frames | None = None


def execute(call: Call, output: Path) -> Report:
    """Ask, show how far it is, write the clip."""
    target = check_output(call, output)
    wishes = {**call.wishes, "format": "mp4" if target.kind == "mp4" else "frames"}
    voice = Voice()
    last = _watched(Call(call.url, wishes, call.model, call.timeout), voice)
    report = _report(call.url, last.event, output)
    started = perf_counter()
    _write(target, last, report)
    report.seconds["write"] = round(perf_counter() - started, 4)
    return report


def check_output(call: Call, output: Path) -> media.Output:
    """Before anybody works for it. Sizes that were not wished are the server's, and even."""
    wished = {name: int(call.wishes.get(name, 2)) for name in ("num_frames", "height", "width")}
    return media.check(
        output, count=wished["num_frames"], height=wished["height"], width=wished["width"]
    )


def follow(call: Call) -> Generator[Answer, None, None]:
    """Every answer, the last of which is `done`; closing it earlier cancels the request.

    Raises:
        UserError: no server, no such model, or a request that it refuses.
    """
    grpc, messages, services = _library()
    address, encrypted = _address(call.url)
    request, done = _request(messages, call), False
    with _channel(grpc, address, encrypted=encrypted) as channel:
        ask = services.GRPCInferenceServiceStub(channel).ModelStreamInfer
        responses = ask(iter([request]), timeout=call.timeout)
        probe = _request(messages, Call(call.url, {"prompt": ""}, call.model))
        try:
            with _Watch(responses, lambda: _dead(grpc, ask, probe)) as watch:
                for response in responses:
                    watch.heard()
                    answer = _answer(call, response)
                    done = answer.event["event"] == "done"
                    yield answer
        except grpc.RpcError as error:
            if watch.found:
                raise UserError(f"{call.url}: {watch.found}; {RESTART}") from None
            raise _refused(call, error.code().name, error.details()) from None
    if not done:
        raise UserError(f"{call.url} ended the request without a clip; look into the server's log")


class _Watch:
    """While a server is silent for long, asks it why; cancels the call when there is a reason.

    Triton never ends a stream whose model's process has died (2.51), but says so to the next one
    who asks.
    """

    def __init__(self, responses: Any, question: Callable[[], str]) -> None:
        self.found = ""
        self._responses, self._question = responses, question
        self._heard, self._over = Event(), Event()
        self._thread = Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._heard.set()

    def heard(self) -> None:
        self._heard.set()

    def _look(self) -> None:
        while not self._over.is_set():
            if self._heard.wait(PATIENCE):
                self._heard.clear()
            elif found := self._question():
                self.found = found
                self._responses.cancel()
                return


def _dead(grpc: Any, ask: Any, probe: Any) -> str:
    """What is said to somebody who asks for nothing, if it is that nobody is there."""
    try:
        said = [response.error_message for response in ask(iter([probe]), timeout=PATIENCE)]
    except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed meanwhile
        said = [error.details() or ""] if isinstance(error, grpc.RpcError) else []
    return next((text for text in said if "is not healthy" in text), "")


def _channel(grpc: Any, address: str, *, encrypted: bool) -> Any:
    """Closing it cancels what is under way. A clip may be larger than gRPC takes by default."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    if encrypted:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(), options)
    return grpc.insecure_channel(address, options)


def _request(messages: Any, call: Call) -> Any:
    request = messages.ModelInferRequest(model_name=call.model)
    for wire in INPUTS:
        if (wish := call.wishes.get(wire.name)) is None:
            continue
        request.inputs.add(name=wire.name, datatype=wire.dtype, shape=wire.dims)
        request.raw_input_contents.append(_packed(wire.dtype, wish))
    return request


def _packed(dtype: str, wish: Value) -> bytes:
    """Little-endian, a text after its length, as Triton packs a tensor of one element."""
    if dtype in NUMBERS:
        return np.array([wish], NUMBERS[dtype]).tobytes()
    text = str(wish).encode()
    return struct.pack("<I", len(text)) + text


def _answer(call: Call, response: Any) -> Answer:
    if response.error_message:
        raise _refused(call, "", response.error_message)
    found = response.infer_response
    raw = {
        output.name: (bytes(content), tuple(output.shape))
        for output, content in zip(found.outputs, found.raw_output_contents, strict=True)
    }
    try:
        event = json.loads(_text(raw["event"][0]))
        event["event"]
        video = _text(raw["video"][0]) if "video" in raw else b""
    except (KeyError, TypeError, ValueError, struct.error):
        raise UserError(
            f"{call.url}: {call.model} says what this client does not understand; "
            "is it the ltx_video of a repository from ltx-export triton?"
        ) from None
    frames = None
    if "frames" in raw and raw["frames"][0]:
        frames = np.frombuffer(raw["frames"][0], np.uint8).reshape(raw["frames"][1])
    return Answer(event, video, frames)


def _text(raw: bytes) -> bytes:
    """The first element of a BYTES tensor."""
    (length,) = struct.unpack_from("<I", raw)
    if len(raw) < 4 + length:
        raise ValueError(f"a text of {length} bytes in {len(raw)}")
    return raw[4 : 4 + length]


def _watched(call: Call, voice: Voice) -> Answer:
    """The last answer; the others are shown while they come."""
    with (
        voice.progress() as progress,
        closing(follow(call)) as answers,
    ):
        task = progress.add_task("waiting", total=None)
        for answer in answers:
            event, last = answer.event, answer
            voice.say(*event.get("notes", ()))
            if event["event"] == "stage":
                progress.update(task, description=event["stage"])
            elif event["event"] == "step":
                progress.update(task, total=event["total"], completed=event["index"])
    return last


def _report(url: str, event: Mapping[str, Any], output: Path) -> Report:
    known = {field.name for field in fields(Report)}
    facts = {key: value for key, value in event.items() if key in known - {"output"}}
    try:
        return Report(output=str(output), **facts)
    except TypeError as error:
        raise UserError(f"{url} sent an incomplete report ({error}); update the server") from None


def _write(target: media.Output, last: Answer, report: Report) -> None:
    if target.kind == "mp4":
        if not last.video:
            raise UserError("the server sent no video; look into its log")
        with media.replacing(target.path) as temporary:
            temporary.write_bytes(last.video)
        return
    if last.frames is None or sha256(last.frames.tobytes()).hexdigest() != report.sha256:
        raise UserError("the frames that arrived are not those of the server's report; ask again")
    media.write(target, last.frames, report.frame_rate)


def _check_range(name: str, dtype: str, number: int) -> None:
    least, most = np.iinfo(NUMBERS[dtype]).min, np.iinfo(NUMBERS[dtype]).max
    if not least <= number <= most:
        raise UserError(f"{name} must be from {least} to {most} in Triton, not {number}")


def _address(url: str) -> tuple[str, bool]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    plain = not (parts.path.strip("/") or parts.query or parts.username)
    if parts.scheme not in SCHEMES or not parts.hostname or port is None or not plain:
        raise UserError(f"--url {url} is not like grpc://localhost:8001 (grpcs:// if encrypted)")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{port}", SCHEMES[parts.scheme]


def _refused(call: Call, status: str, text: str | None) -> UserError:
    """The server's words, and what to do where they do not say it. By the words, for in a stream
    Triton's own refusals have no status (2.51)."""
    said = " ".join((text or status).split())
    if "is not healthy" in said:
        return UserError(f"{call.url}: {said}; {RESTART}")
    if "maximum queue size" in said or "Request timeout expired" in said:
        return UserError(f"{call.url} has too many requests ({said}); ask again later")
    if status == "NOT_FOUND" or "unknown model" in said:
        return UserError(f"{call.url} has no model {call.model} ({said}); give another --url")
    if status == "UNAVAILABLE":
        return UserError(
            f"no Triton server answers at {call.url} ({said}); start it, or give its --url"
        )
    if status == "DEADLINE_EXCEEDED" and call.timeout is not None:
        return UserError(f"{call.url} took longer than --timeout {call.timeout:g}; give it more")
    return UserError(f"{call.url}: {said}")


def _library() -> tuple[Any, Any, Any]:
    """gRPC, and Triton's messages and services in it."""
    try:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc
    except ImportError as error:
        raise UserError(
            f"ltx-trt client needs tritonclient ({error}); pip install 'ltx-trt[triton]'"
        ) from None
    return grpc, service_pb2, service_pb2_grpc
