"""The model `ltx_video` of a Triton server: a request goes in, progress and then the clip come out.

`answer` is the whole of it without Triton; `TritonPythonModel` puts requests and responses into
Triton's words. A request is a thread of the one process that has the weights.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from threading import BoundedSemaphore, Thread
from time import perf_counter
from typing import Any

from ltx_engines.errors import UserError
from ltx_engines.stages import BRANCHES
from ltx_engines.triton_settings import Settings, read
from ltx_ref.checkpoint import CheckpointError
from ltx_trt import media
from ltx_trt.backend import Backend, Choice, Memory
from ltx_trt.job import Frames, Report, seconds_by_stage
from ltx_trt.pipeline import (
    Decoded,
    Event,
    PromptEncoded,
    StageOpened,
    StepDone,
    Upsampled,
    frames_of,
    generate,
)
from ltx_trt.session.bundle_stages import USED, EngineStages
from ltx_trt.session.choice import open_stages
from ltx_trt.triton import backend_words as words
from ltx_trt.triton import requests
from ltx_trt.triton.batching import Limits
from ltx_trt.triton.called_stages import CalledStages, Models
from ltx_trt.triton.kept_stages import ExclusiveStages, SharedStages, Studio
from ltx_trt.triton.metrics import Meter
from ltx_trt.triton.requests import Array, Order
from ltx_trt.triton.responses import Client, Refused, Response, Status

GONE = "cancelled by the client"
FAILED = "the server failed at this request; its log says why"

log = logging.getLogger(__name__)


def answer(order: Order, studio: Studio, client: Client, meter: Meter) -> None:
    """Progress while the clip is made, then the clip.

    Raises:
        Refused: the client has gone, or the clip cannot be made.
    """
    steps = len(order.planned.batches)
    client.send(Response({"event": "planned", "steps": steps, "notes": order.notes}))
    try:
        events = list(_followed(order, studio, client, meter))
    except (UserError, CheckpointError) as error:
        log.error("a request ended: %s", error)
        raise Refused(Status.internal, requests.without_paths(error)) from error
    frames = frames_of(events)
    started = perf_counter()
    video = media.video_bytes(frames, order.request.frame_rate) if order.form == "mp4" else None
    seconds = {**seconds_by_stage(events), "write": perf_counter() - started}
    memory = None if studio.watch is None else studio.watch.peak
    made = Frames("", sha256(frames.data).hexdigest())
    report = Report.of(order.request, made, order.planned, seconds, memory)
    done = {"event": "done", **asdict(report)}
    del done["output"]  # a file of the client's
    client.send(Response(done, video, frames if video is None else None))


def _followed(order: Order, studio: Studio, client: Client, meter: Meter) -> Iterator[Event]:
    """Every event, told to the client; no step is begun for a client who has gone."""
    stage, decoding = "", 0.0
    with (
        studio.turn(order.planned) as open_session,
        closing(generate(order.request, studio.bundle, open_session)) as events,
    ):
        for event in events:
            if studio.watch is not None:
                studio.watch.look()
            if client.gone():
                raise Refused(Status.cancelled, GONE)
            if isinstance(event, StageOpened):
                stage = event.stage
            elif isinstance(event, StepDone):
                meter.step(event.seconds)
            elif isinstance(event, PromptEncoded | Upsampled):
                meter.stage(stage, event.seconds)
            elif isinstance(event, Decoded):
                decoding += event.seconds
                if event.first + len(event.frames) == event.total:
                    meter.stage(stage, decoding)
            for told in _told(event):
                client.send(Response(told))
            yield event


def _told(event: Event) -> Iterator[dict[str, Any]]:
    if isinstance(event, StageOpened):
        yield {"event": "stage", "stage": event.stage, "seconds": event.seconds}
    elif isinstance(event, StepDone):
        yield {"event": "step", **asdict(event)}
    elif isinstance(event, PromptEncoded):
        yield {"event": "prompt", "tokens": event.tokens, "notes": event.notes}


def open_studio(bundle: Path, settings: Settings, models: Models, meter: Meter) -> Studio:
    """The stages of a bundle in the layout of the settings, here or as `models`.

    Raises:
        UserError: no bundle, or it cannot be run here.
    """
    rows = settings.at_once * len(BRANCHES)
    limits = Limits(settings.batch_delay, rows, settings.batching)
    if settings.layout == "stages":
        return SharedStages(CalledStages(bundle, models), limits, meter.shared)
    choice = Choice(Backend(settings.backend), settings.threads, Memory.auto)
    stages = open_stages(bundle, choice)
    if isinstance(stages, EngineStages):
        return ExclusiveStages(stages)
    return SharedStages(stages, limits, meter.shared)


def check_stages(repository: Path) -> None:
    """Whether they load is not known yet, but Triton says nothing of a model that is not there.

    Raises:
        UserError: a stage has no model, and the server must not say that it is ready.
    """
    if missing := [stage for stage in USED if not (repository / stage).is_dir()]:
        raise UserError(
            f"{repository} has no model {', '.join(missing)}; write it again: ltx-export triton "
            "BUNDLE --layout stages --out REPO"
        )


class TritonPythonModel:
    """What Triton's Python backend makes an instance of."""

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as backend

        logging.basicConfig(format="ltx-trt: %(message)s")
        config = json.loads(args["model_config"])
        self._backend, self._settings = backend, read(words.parameters(config))
        home = Path(args["model_repository"])
        if self._settings.layout == "stages":
            check_stages(home.parent)
        folder = home / args["model_version"] / self._settings.bundle
        self._meter = words.meter(backend, args["model_name"])
        studio = open_studio(folder, self._settings, words.models(backend), self._meter)
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
            if not self._places.acquire(blocking=False):
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
        try:
            with self._meter.running():
                refused = self._make(client, inputs, names)
            # before the client hears of the end: it may look at the figures then
            self._meter.ended(_word(refused))
            if refused is None:
                client.end()
            else:
                client.fail(refused)
        finally:
            self._places.release()

    def _make(
        self, client: words.Sender, inputs: dict[str, Array], names: list[str]
    ) -> Refused | None:
        """Why there is no clip, or None if the client has it."""
        try:
            if client.gone():
                raise Refused(Status.cancelled, GONE)
            order = requests.read(inputs, names, self._studio.bundle, self._settings)
            answer(order, self._studio, client, self._meter)
        except Refused as refused:
            return refused
        except Exception:  # a bug: its story is for the log, and others' requests go on
            log.exception("a request failed")
            return Refused(Status.internal, FAILED)
        return None


def _word(refused: Refused | None) -> str:
    """Of the metrics."""
    if refused is None:
        return "done"
    return "cancelled" if refused.status is Status.cancelled else "failed"
