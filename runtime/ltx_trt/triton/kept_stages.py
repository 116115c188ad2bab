"""The stages of a bundle for many requests at once: opened once, when the server starts.

Graphs of ONNX Runtime and calls to other models are shared by all threads, and the transformer's
passes by all requests of one shape. Engines have one stream and one loop on the GPU, whose latents
never leave it: there a request has them for itself.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import Lock
from types import TracebackType
from typing import Self

from ltx_engines.bundle import Bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape, wished_size
from ltx_engines.triton_model import served
from ltx_trt.pipeline import Planned, generate, plan
from ltx_trt.request import Request, Wishes, resolve
from ltx_trt.session import Opened, OpenSession, Session
from ltx_trt.session.bundle_stages import TRANSFORMER, EngineStages, Stages
from ltx_trt.session.memory import Watch
from ltx_trt.session.vae_streams import DecoderSession
from ltx_trt.triton.batching import Batcher, Limits

log = logging.getLogger(__name__)


class SharedStages:
    """All stages stay open; `open_session` gives a session that threads may call together."""

    def __init__(self, stages: Stages, limits: Limits, heard: Callable[[int], None]) -> None:
        """`heard`: see Batcher."""
        self._stages, self._limits, self._heard = stages, limits, heard
        self._held = ExitStack()
        self._open: dict[str, Session] = {}
        self._batcher: Batcher | None = None

    @property
    def bundle(self) -> Bundle:
        return self._stages.bundle

    @property
    def watch(self) -> Watch | None:
        return self._stages.watch

    @property
    def batcher(self) -> Batcher:
        if self._batcher is None:
            raise ValueError("stages are used from `with` to its end")
        return self._batcher

    @contextmanager
    def turn(self, planned: Planned) -> Iterator[OpenSession]:
        """What a request opens its stages with, from its first to its last."""
        self._stages.prepare(planned)  # has nothing to say: these stages take any clip
        yield self._stage

    def _stage(self, stage: str) -> Opened:
        if stage == TRANSFORMER:
            return self.batcher.lane()
        return _lent(self._open[stage])

    def __enter__(self) -> Self:
        with ExitStack() as held:
            held.enter_context(self._stages)
            for stage in served(self.bundle.manifest):
                self._open[stage] = session = held.enter_context(self._stages(stage))
                if isinstance(session, DecoderSession):
                    session.open()
            self._held = held.pop_all()
        entry = self.bundle.stage(TRANSFORMER)
        self._batcher = Batcher(self._open[TRANSFORMER], entry, self._limits, self._heard)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()
        self._held.__exit__(kind, error, trace)


class ExclusiveStages:
    """One request at a time. What stays open between two is the stages' own matter (`Memory`)."""

    def __init__(self, stages: EngineStages) -> None:
        self._stages, self._turn = stages, Lock()
        self._said: set[str] = set()

    @property
    def bundle(self) -> Bundle:
        return self._stages.bundle

    @property
    def watch(self) -> Watch | None:
        return self._stages.watch

    @contextmanager
    def turn(self, planned: Planned) -> Iterator[OpenSession]:
        with self._turn:
            for note in self._stages.prepare(planned):
                if note not in self._said:
                    log.warning("%s", note)
                    self._said.add(note)
            yield self._stages

    def __enter__(self) -> Self:
        with ExitStack() as held:
            held.enter_context(self._stages)
            self._warm_up()
            self._held = held.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def _warm_up(self) -> None:
        """A clip of each size that engines were built for: what cannot be loaded is heard of before
        the server says that it is ready, and graphs are captured."""
        for clip in self._stages.clips():
            request = _shortest(clip, self.bundle)
            with self.turn(plan(request, self.bundle.manifest)) as open_session:
                for _ in generate(request, self.bundle, open_session):
                    pass


Studio = SharedStages | ExclusiveStages


def _shortest(clip: VideoShape, bundle: Bundle) -> Request:
    """In two steps, or in as many as a model that allows no others has. Of two passes, `clip` is
    the second one's."""
    defaults = bundle.manifest.defaults
    height, width = clip.height, clip.width
    if defaults.second is not None:
        height, width = wished_size(height, width, defaults.downscale_factor)
    wishes = Wishes("warm-up", None, width, height, clip.frames, num_inference_steps=2)
    try:
        request, _ = resolve(wishes, bundle)
        plan(request, bundle.manifest)
    except UserError:
        request, _ = resolve(replace(wishes, num_inference_steps=None), bundle)
    return request


@contextmanager
def _lent(session: Session) -> Iterator[Session]:
    yield session
