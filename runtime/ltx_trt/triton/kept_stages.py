"""The stages of a bundle for many requests at once: opened once, when the server starts.

Graphs of ONNX Runtime and calls to other models are shared by all threads, and the transformer's
passes by all requests of one shape. Engines have one stream and one loop on the GPU, whose latents
never leave it: there a request has them for itself.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from types import TracebackType
from typing import Self

from ltx_engines.bundle import Bundle
from ltx_trt.pipeline import Planned
from ltx_trt.session import Opened, Session
from ltx_trt.session.bundle_stages import TRANSFORMER, Stages
from ltx_trt.session.choice import USED
from ltx_trt.triton.batching import Batcher, Limits


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
    def device_memory(self) -> int | None:
        return None if self._stages.watch is None else self._stages.watch.peak

    @property
    def batcher(self) -> Batcher:
        if self._batcher is None:
            raise ValueError("stages are used from `with` to its end")
        return self._batcher

    @contextmanager
    def turn(self, planned: Planned) -> Iterator[Callable[[str], Opened]]:
        """What a request opens its stages with, from its first to its last."""
        self._stages.prepare(planned)
        yield self._stage

    def _stage(self, stage: str) -> Opened:
        if stage == TRANSFORMER:
            return self.batcher.lane()
        return _lent(self._open[stage])

    def __enter__(self) -> Self:
        with ExitStack() as held:
            held.enter_context(self._stages)
            for stage in USED:
                self._open[stage] = held.enter_context(self._stages(stage))
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
    """One request at a time. What stays open between two is the stages' own matter (`Keep`)."""

    def __init__(self, stages: Stages) -> None:
        self._stages, self._turn = stages, Lock()

    @property
    def bundle(self) -> Bundle:
        return self._stages.bundle

    @property
    def device_memory(self) -> int | None:
        """Bytes that were taken at most, by the request that took most."""
        return None if self._stages.watch is None else self._stages.watch.peak

    @contextmanager
    def turn(self, planned: Planned) -> Iterator[Callable[[str], Opened]]:
        with self._turn:
            self._stages.prepare(planned)
            yield self._stages

    def __enter__(self) -> Self:
        self._stages.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stages.__exit__(kind, error, trace)


Studio = SharedStages | ExclusiveStages


@contextmanager
def _lent(session: Session) -> Iterator[Session]:
    yield session
