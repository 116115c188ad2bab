"""A Triton server's gRPC side without Triton: a test tells it what to say, and sees what it got."""

import json
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as services

PACKING = {"INT32": "<i", "INT64": "<q", "FP32": "<f"}

REPORT = {
    "output": "mp4",
    "seed": 7,
    "frames": 2,
    "height": 2,
    "width": 4,
    "frame_rate": 24.0,
    "sampler": "euler",
    "sigmas": [1.0, 0.5, 0.0],
    "seconds": {"transformer": 0.5},
    "sha256": "",
    "device_memory": None,
}


@dataclass
class Seen:
    """What arrived: the wishes of each call, and whether its client went away."""

    wishes: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    gone: threading.Event = field(default_factory=threading.Event)


Script = Callable[[dict[str, Any], grpc.ServicerContext], Iterator[Any]]


def said(event: dict[str, Any], video: bytes = b"", frames: Any = None) -> Any:
    """One response of ltx_video."""
    response = messages.ModelInferResponse(model_name="ltx_video")
    for name, text in (("event", json.dumps(event).encode()), ("video", video)):
        response.outputs.add(name=name, datatype="BYTES", shape=[1])
        response.raw_output_contents.append(struct.pack("<I", len(text)) + text)
    pixels = np.zeros((0, 0, 0, 3), np.uint8) if frames is None else frames
    response.outputs.add(name="frames", datatype="UINT8", shape=pixels.shape)
    response.raw_output_contents.append(pixels.tobytes())
    return messages.ModelStreamInferResponse(infer_response=response)


def done(video: bytes = b"", frames: Any = None, **facts: Any) -> Any:
    return said({"event": "done", **REPORT, **facts}, video, frames)


def step(index: int, total: int = 2) -> Any:
    return said({"event": "step", "index": index, "total": total, "sigma": 0.5, "seconds": 0.1})


def refusal(text: str) -> Any:
    """Of Triton itself, or of a model: it has no status."""
    return messages.ModelStreamInferResponse(error_message=text)


def wishes(request: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        assert list(tensor.shape) == [1]
        if tensor.datatype == "BYTES":
            found[tensor.name] = raw[4:].decode()
        else:
            (found[tensor.name],) = struct.unpack(PACKING[tensor.datatype], raw)
    return found


class _Service(services.GRPCInferenceServiceServicer):  # type: ignore[misc] # no stubs
    def __init__(self, script: Script, seen: Seen) -> None:
        self.script, self.seen = script, seen

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        self.seen.headers = dict(context.invocation_metadata())
        if not context.add_callback(self.seen.gone.set):  # it has ended already
            self.seen.gone.set()
        for request in requests:
            if request.model_name != "ltx_video":
                context.abort(grpc.StatusCode.NOT_FOUND, "Request for unknown model")
            self.seen.wishes.append(wishes(request))
            yield from self.script(self.seen.wishes[-1], context)


@contextmanager
def serving(script: Script) -> Iterator[tuple[str, Seen]]:
    """The URL of a server that answers each request with the script's responses."""
    seen = Seen()
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, options=[("grpc.max_receive_message_length", -1)])
        services.add_GRPCInferenceServiceServicer_to_server(_Service(script, seen), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"grpc://127.0.0.1:{port}", seen
        finally:
            server.stop(grace=None).wait()
