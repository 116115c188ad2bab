"""The model `ltx_video` of a Triton server: a request goes in, progress and then the clip come out.

`answer` is the whole of it without Triton; `TritonPythonModel` puts requests and responses into
Triton's words. A request is a thread of the one process that has the weights.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import BoundedSemaphore, Thread
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from ltx_engines.errors import UserError
from ltx_engines.triton_settings import Settings, read
from ltx_ref.checkpoint import CheckpointError
from ltx_trt import media
from ltx_trt.backend import Backend, Choice, Keep
from ltx_trt.job import Report, seconds_by_stage
from ltx_trt.pipeline import (
    Decoded,
    Event,
    PromptEncoded,
    StageOpened,
    StepDone,
    generate,
)
from ltx_trt.session.bundle_stages import OnnxRuntimeStages, Stages
from ltx_trt.session.choice import open_stages
from ltx_trt.triton import backend_words as words
from ltx_trt.triton import requests
from ltx_trt.triton.batching import Limits
from ltx_trt.triton.kept_stages import ExclusiveStages, SharedStages, Studio
from ltx_trt.triton.metrics import Meter
from ltx_trt.triton.requests import Array, Order, Refused, Status

BRANCHES = 3
"""Rows of the transformer's batch that one request has at most."""

GONE = "cancelled by the client"
FAILED = "the server failed at this request; its log says why"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Response:
    """`video` and `frames` are in the last one, of which there is one."""

    event: dict[str, Any]
    video: bytes = b""
    frames: media.Frames = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8))


class Client(Protocol):
    """Whoever asked: gets responses, and may have gone."""

    def send(self, response: Response) -> None: ...

    def gone(self) -> bool: ...


def answer(order: Order, studio: Studio, client: Client, meter: Meter) -> None:
    """Progress while the clip is made, then the clip.

    Raises:
        Refused: the client has gone, or the clip cannot be made.
    """
    for note in order.notes:
        client.send(Response({"event": "note", "text": note}))
    try:
        events = list(_followed(order, studio, client, meter))
    except (UserError, CheckpointError) as error:
        log.error("a request ended: %s", error)
        raise Refused(Status.internal, requests.without_paths(error)) from error
    frames = next(event for event in events if isinstance(event, Decoded)).frames
    started = perf_counter()
    video = media.video_bytes(frames, order.request.frame_rate) if order.form == "mp4" else b""
    seconds = {**seconds_by_stage(events), "write": perf_counter() - started}
    memory = studio.device_memory
    report = Report.of(order.request, frames, order.form, order.planned.sigmas, seconds, memory)
    done = {"event": "done", **asdict(report)}
    if order.form == "mp4":
        client.send(Response(done, video=video))
    else:
        client.send(Response(done, frames=frames))


def _followed(order: Order, studio: Studio, client: Client, meter: Meter) -> Iterator[Event]:
    """Every event, told to the client; no step is begun for a client who has gone."""
    stage = ""
    with (
        studio.turn(order.planned) as open_session,
        closing(generate(order.request, studio.bundle, open_session)) as events,
    ):
        for event in events:
            if client.gone():
                raise Refused(Status.cancelled, GONE)
            if isinstance(event, StageOpened):
                stage = event.stage
            elif isinstance(event, StepDone):
                meter.step(event.seconds)
            elif isinstance(event, PromptEncoded | Decoded):
                meter.stage(stage, event.seconds)
            for told in _told(event):
                client.send(Response(told))
            yield event


def _told(event: Event) -> Iterator[dict[str, Any]]:
    if isinstance(event, StageOpened):
        yield {"event": "stage", "stage": event.stage, "seconds": event.seconds}
    elif isinstance(event, StepDone):
        yield {"event": "step", **asdict(event)}
    elif isinstance(event, PromptEncoded):
        yield from ({"event": "note", "text": note} for note in event.notes)


def open_studio(bundle: Path, settings: Settings, call: Callable[..., Any] | None = None) -> Studio:
    """The stages of a bundle in the layout of the settings; `call` asks another model.

    Raises:
        UserError: no bundle, or it cannot be run here.
    """
    limits = Limits(settings.batch_delay, settings.at_once * BRANCHES)
    if settings.layout == "stages":
        from ltx_trt.triton.called_stages import CalledStages

        if call is None:
            raise ValueError("stages of other models need a way to call them")
        return SharedStages(CalledStages(bundle, call), limits)
    choice = Choice(Backend(settings.backend), settings.threads, Keep.fitting)
    stages: Stages = open_stages(bundle, choice)
    if isinstance(stages, OnnxRuntimeStages):
        return SharedStages(stages, limits)
    return ExclusiveStages(stages)


class TritonPythonModel:
    """What Triton's Python backend makes an instance of."""

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as backend

        logging.basicConfig(format="ltx-trt: %(message)s")
        config = json.loads(args["model_config"])
        self._backend, self._settings = backend, read(words.parameters(config))
        folder = Path(args["model_repository"]) / args["model_version"] / self._settings.bundle
        self._meter = words.meter(backend, args["model_name"])
        studio = open_studio(folder, self._settings, words.caller(backend))
        self._studio = studio.__enter__()
        # Whatever is beyond these places stays in Triton's own queue, where it can time out.
        self._places = BoundedSemaphore(self._settings.at_once)
        self._threads: set[Thread] = set()

    def execute(self, requests_: list[Any]) -> None:
        """Returns when the last request has begun; its responses come from its own thread."""
        for request in requests_:
            client = words.Sender(self._backend, request.get_response_sender())
            # now: the server takes a request's memory back when this returns
            inputs, names = words.inputs(request), words.names(request)
            arrived = perf_counter()
            with self._meter.waiting():
                self._places.acquire()
            self._meter.queued(perf_counter() - arrived)
            self._threads = {thread for thread in self._threads if thread.is_alive()}
            thread = Thread(target=self._answer, args=(client, inputs, names), daemon=True)
            self._threads.add(thread)
            thread.start()

    def finalize(self) -> None:
        for thread in self._threads:
            thread.join()
        self._studio.__exit__(None, None, None)

    def _answer(self, client: words.Sender, inputs: dict[str, Array], names: list[str]) -> None:
        """Whatever happens, the client hears of it, and the place is free again."""
        outcome = "failed"
        try:
            with self._meter.running():
                if client.gone():
                    raise Refused(Status.cancelled, GONE)
                order = requests.read(inputs, names, self._studio.bundle, self._settings)
                answer(order, self._studio, client, self._meter)
            client.end()
            outcome = "done"
        except Refused as refused:
            outcome = "cancelled" if refused.status is Status.cancelled else "failed"
            client.fail(refused)
        except BaseException:
            client.fail(Refused(Status.internal, FAILED))
            raise  # to the server's log, by the thread's hook
        finally:
            self._places.release()
            self._meter.ended(outcome)
