"""A decoder that is opened as a clip needs it: whole, or as one that goes on where it was."""

from collections.abc import Callable
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from ltx_engines.stages import STREAM
from ltx_trt.decoder import Streaming
from ltx_trt.session import Array, Feeds, Session
from ltx_trt.session.closing import close_all
from ltx_trt.session.kept_frames import Past
from ltx_trt.tiles import Cut, Grid, Streamed


class DecoderSession:
    """Implements Session, Tiling and Streaming. `open_stage` is given the stage that is needed, and
    gives what is open from then on; the choice of a clip's cut opens it."""

    def __init__(
        self,
        stage: str,
        open_stage: Callable[[str], Session],
        choose: Callable[[Grid], Cut],
    ) -> None:
        """`stage` is that of the whole decoder."""
        self._stage = stage
        self._open, self._choose = open_stage, choose
        self._opened: dict[str, Session] = {}
        self._lock = Lock()

    def tile(self, grid: Grid) -> Cut:
        cut = self._choose(grid)
        self._session(STREAM if isinstance(cut, Streamed) else self._stage)
        return cut

    def open(self) -> None:
        """The one for whole clips, before anybody has one: if it cannot be opened, that is heard of
        now."""
        self._session(self._stage)

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        return self._session(self._stage)(feeds)

    def begin(self) -> Session:
        session = self._session(STREAM)
        if isinstance(session, Streaming):
            return session.begin()
        if isinstance(session, GoesOn):
            return HostStream(session)
        raise ValueError(f"a session of {STREAM} that cannot go on")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            opened, self._opened = list(self._opened.values()), {}
        close_all((partial(one.__exit__, kind, error, trace) for one in opened), error)

    def _session(self, stage: str) -> Session:
        with self._lock:  # clips of several users share it
            if stage not in self._opened:
                self._opened[stage] = self._open(stage)
            return self._opened[stage]


@runtime_checkable
class GoesOn(Protocol):
    """A session of a decoder that is given what it kept."""

    def go_on(self, feeds: Feeds, past: Past, /) -> tuple[dict[str, Array], Past]:
        """What it made, and the `past` of the next call; of the first it is empty."""
        ...


class HostStream:
    """Passes on what is kept. The session belongs to somebody else."""

    def __init__(self, session: GoesOn) -> None:
        self._session = session
        self._past: Past = {}

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        made, self._past = self._session.go_on(feeds, self._past)
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._past = {}
