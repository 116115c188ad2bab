"""A client that says anything to a Triton server, also what ours would not, and what it saw."""

import json
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as services

from ltx_engines.triton_model import INPUTS
from tests.triton.held_steps import Hold
from tests.triton.server import Server
from tests.waiting import HANG, until

TYPES = {wire.name: wire.dtype for wire in INPUTS}
NUMPY = {"INT32": "<i4", "INT64": "<i8", "FP32": "<f4", "FP64": "<f8"}


@dataclass
class Outcome:
    """`status` is OK when the stream ended well; `seconds` are from the question to its end."""

    status: str = "OK"
    text: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    video: bytes = b""
    seconds: float = 0.0

    @property
    def steps(self) -> list[int]:
        return [event["index"] for event in self.events if event["event"] == "step"]

    @property
    def report(self) -> dict[str, Any]:
        return self.events[-1]


@dataclass(frozen=True)
class Question:
    """`types` are for inputs that shall be sent as others than they are; the client leaves after
    `leave_after` events."""

    wishes: Mapping[str, Any]
    types: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    leave_after: int | None = None
    model: str = "ltx_video"


def ask(
    address: str,
    question: Question,
    timeout: float = HANG,
    began: Callable[[grpc.Call], object] = bool,
) -> Outcome:
    """`began` gets the call, which ends by `cancel`."""
    outcome, start = Outcome(), time.perf_counter()
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options) as channel:
        stream = services.GRPCInferenceServiceStub(channel).ModelStreamInfer(
            iter([_request(question)]), timeout=timeout
        )
        began(stream)
        try:
            for response in stream:
                _hear(outcome, response)
                if len(outcome.events) == question.leave_after:
                    stream.cancel()
        except grpc.RpcError as error:
            outcome.status, outcome.text = error.code().name, error.details()
    outcome.seconds = time.perf_counter() - start
    return outcome


@contextmanager
def busy(server: Server, hold: Hold) -> Iterator[Future[Outcome]]:
    """A server that holds a step of such a clip, until its client leaves at the end."""
    calls = SimpleQueue[grpc.Call]()
    address, question = f"127.0.0.1:{server.grpc}", Question(hold.wishes)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, address, question, began=calls.put)
        try:
            until_held(server, hold, asked.done)
            yield asked
        finally:
            calls.get(timeout=HANG).cancel()
    assert asked.result().status == "CANCELLED"


def until_held(server: Server, hold: Hold, ended: Callable[[], bool]) -> None:
    """`ended` is whether whoever asked for it waits no more."""
    until(lambda: ended() or hold.said() in server.said(), hold.said())
    assert not ended(), f"ended, and was to be {hold.said()}"


def _hear(outcome: Outcome, response: Any) -> None:
    if response.error_message:
        outcome.status, outcome.text = "(in the stream)", response.error_message
        return
    found = response.infer_response
    raw = {o.name: r for o, r in zip(found.outputs, found.raw_output_contents, strict=True)}
    if "event" in raw:
        outcome.events.append(json.loads(raw["event"][4:]))
        outcome.video = bytes(raw["video"][4:]) if "video" in raw else b""


def _request(question: Question) -> Any:
    request = messages.ModelInferRequest(model_name=question.model)
    for name, wish in question.wishes.items():
        dtype = question.types.get(name, TYPES.get(name, "BYTES"))
        shape = question.shapes.get(name, (1,))
        request.inputs.add(name=name, datatype=dtype, shape=shape)
        request.raw_input_contents.append(_packed(dtype, wish))
    for name, word in question.parameters.items():
        request.parameters[name].string_param = word
    return request


def _packed(dtype: str, wish: Any) -> bytes:
    if dtype != "BYTES":
        return np.array(wish, NUMPY[dtype]).tobytes()
    text = wish if isinstance(wish, bytes) else str(wish).encode()
    return struct.pack("<I", len(text)) + text


def metric(text: str, name: str) -> float:
    """The sum of a family's series in what /metrics says."""
    values = [float(line.split()[-1]) for line in text.splitlines() if _is_of(line, name)]
    if not values:
        raise AssertionError(f"/metrics has no {name}")
    return sum(values)


def _is_of(line: str, name: str) -> bool:
    return line.startswith((f"{name}{{", f"{name} "))


def names(lines: Iterable[str]) -> set[str]:
    """The families of /metrics."""
    return {line.split()[2] for line in lines if line.startswith("# TYPE ")}
