"""Triton's Python backend in our words: `triton_python_backend_utils`, which only a server has."""

import json
from collections.abc import Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_engines.triton_model import ELEMENT_TYPES, Metric
from ltx_trt.session.element_types import to_bfloat16, widened
from ltx_trt.triton import dlpack
from ltx_trt.triton.called_stages import Models
from ltx_trt.triton.metrics import Meter, Series
from ltx_trt.triton.responses import Refused, Response

Array = NDArray[Any]


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """Of a model's configuration, without those that are the backend's own (in capitals)."""
    found = {name: entry["string_value"] for name, entry in config["parameters"].items()}
    return {name: word for name, word in found.items() if name.islower()}


def inputs(request: Any) -> dict[str, Array]:
    """Copies: the server takes a request's memory back when it has begun."""
    return {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}


def names(request: Any) -> list[str]:
    """Of the parameters beside the tensors; ours has none."""
    return list(json.loads(request.parameters() or "{}"))


def element_types(config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Of a model's inputs and outputs, in a bundle's words."""
    ours = {f"TYPE_{word}": dtype for dtype, word in ELEMENT_TYPES.items()}
    inputs, outputs = (
        {row["name"]: ours[row["data_type"]] for row in config[side]}
        for side in ("input", "output")
    )
    return inputs, outputs


def failure(backend: Any, refused: Refused) -> Any:
    code = getattr(backend.TritonError, refused.status.value)
    return backend.InferenceResponse(error=backend.TritonError(refused.line, code))


class Sender:
    """Implements Client. Ends in `end` or `fail`, once.

    Progress is sent by a thread of its own while the next step is computed: a response costs 0.5 to
    1 ms. What that thread cannot send is raised by the next call.
    """

    def __init__(self, backend: Any, sender: Any) -> None:
        self._backend, self._sender = backend, sender
        self._queue: SimpleQueue[Response | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread = Thread(target=self._pump, daemon=True)
        self._thread.start()

    def send(self, response: Response) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(response)

    def gone(self) -> bool:
        found: bool = self._sender.is_cancelled()
        return found

    def end(self) -> None:
        self._drain()
        if self._error is not None:
            raise self._error
        self._sender.send(flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, refused: Refused) -> None:
        self._drain()
        final = self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._sender.send(failure(self._backend, refused), flags=final)

    def _drain(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _pump(self) -> None:
        while (response := self._queue.get()) is not None:
            try:
                self._sender.send(self._response(response))
            except BaseException as error:
                self._error = error
                return

    def _response(self, response: Response) -> Any:
        values = {"event": _words(json.dumps(response.event).encode())}
        if response.video is not None:
            values["video"] = _words(response.video)
        if response.frames is not None:
            values["frames"] = response.frames
        tensors = [self._backend.Tensor(name, array) for name, array in values.items()]
        return self._backend.InferenceResponse(output_tensors=tensors)


def _words(text: bytes) -> Array:
    return np.array([text], np.object_)


def meter(backend: Any, model: str) -> Meter:
    families: dict[str, Any] = {}

    def make(metric: Metric, labels: Mapping[str, str]) -> Series:
        if metric.name not in families:
            families[metric.name] = backend.MetricFamily(
                name=metric.name,
                description=metric.text,
                kind=getattr(backend.MetricFamily, metric.kind.upper()),
            )
        # a family lives as long as somebody has it, which `make` does
        buckets = {"buckets": list(metric.buckets)} if metric.buckets else {}
        series: Series = families[metric.name].Metric(labels=dict(labels), **buckets)
        return series

    return Meter(make, model)


def models(backend: Any) -> Models:
    """Those of the same server: they are called, and what they say is waited for."""

    def call(model: str, feeds: Mapping[str, tuple[Array, str]], wanted: Mapping[str, str]) -> Any:
        request = backend.InferenceRequest(
            model_name=model,
            inputs=[tensor(backend, n, array, dtype) for n, (array, dtype) in feeds.items()],
            requested_output_names=list(wanted),
            preferred_memory=backend.PreferredMemory(backend.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise UserError(f"model {model}: {response.error().message()}")
        return {t.name(): values(t, wanted.get(t.name(), "")) for t in response.output_tensors()}

    return Models(call, backend.is_model_ready)


def tensor(backend: Any, name: str, array: Array, dtype: str) -> Any:
    """Of a float32 or integer array, in the element type of the model's table."""
    if dtype != "bfloat16":
        return backend.Tensor(name, np.ascontiguousarray(array, dtype))
    return backend.Tensor.from_dlpack(name, dlpack.Lender(to_bfloat16(array)))


def values(tensor: Any, dtype: str) -> Array:
    """A copy; floats in float32, as sessions give them."""
    if dtype == "bfloat16":
        return widened(dlpack.words(tensor.to_dlpack()), dtype)
    return widened(np.array(tensor.as_numpy()), dtype)
