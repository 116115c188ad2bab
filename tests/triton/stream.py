"""One request to the video model, with tritonclient alone: what a stranger's client would do."""

import json
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import numpy as np

from ltx_engines.triton_model import INPUTS, VIDEO
from tests.waiting import HANG

PROMPTS = (
    "a red circle moves right on a blue background",
    "a green diamond moves up on a black background",
    "a yellow square moves left on a purple background",
    "a white triangle moves down on a red background",
)

ELEMENTS: dict[str, Any] = {
    "BYTES": np.object_,
    "INT64": np.int64,
    "INT32": np.int32,
    "FP32": np.float32,
}


@dataclass(slots=True)
class Heard:
    """What came back, in order; `times` are when."""

    events: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    video: bytes = b""
    frames: Any = None
    status: str = ""
    message: str = ""

    @property
    def steps(self) -> list[int]:
        return [event["index"] for event in self.events if event["event"] == "step"]

    @property
    def report(self) -> dict[str, Any]:
        assert not self.message, self.message
        assert self.events[-1]["event"] == "done"
        return self.events[-1]


def ask(
    port: int,
    *,
    cancel_at: int = 0,
    parameters: Any = None,
    **values: Any,
) -> Heard:
    """Everything up to the end of the request, or up to step `cancel_at`, where it is cancelled."""
    import tritonclient.grpc as grpc

    answers: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
    heard = Heard()
    with grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        client.start_stream(
            lambda result, error: answers.put((result, error)),
        )
        client.async_stream_infer(
            VIDEO,
            [_input(grpc, name, value) for name, value in values.items()],
            enable_empty_final_response=True,
            parameters=parameters,
        )
        while _take(heard, *answers.get(timeout=HANG)):
            if cancel_at and heard.steps and heard.steps[-1] >= cancel_at:
                client.stop_stream(cancel_requests=True)
                break
    return heard


def _take(heard: Heard, result: Any, error: Any) -> bool:
    """Whether more is to come."""
    if error is not None:
        heard.status, heard.message = str(error.status()), error.message()
        return False
    response = result.get_response()
    found = {output.name: result.as_numpy(output.name) for output in response.outputs}
    if "event" in found:
        heard.events.append(json.loads(found["event"][0]))
        heard.times.append(perf_counter())
    heard.video = found.get("video", [heard.video])[0]
    heard.frames = found.get("frames", heard.frames)
    return not response.parameters["triton_final_response"].bool_param


def _input(grpc: Any, name: str, value: Any) -> Any:
    dtype = next((wire.dtype for wire in INPUTS if wire.name == name), "INT32")
    array = np.array([value.encode() if isinstance(value, str) else value], ELEMENTS[dtype])
    made = grpc.InferInput(name, [1], dtype)
    made.set_data_from_numpy(array)
    return made
