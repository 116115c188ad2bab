"""A decoder that is opened as a clip needs it: whole, or as one that goes on where it was."""

from collections.abc import Callable
from functools import partial
from math import prod
from threading import Lock
from types import TracebackType
from typing import Self

import numpy as np

from ltx_engines.bundle import StageEntry, TensorEntry
from ltx_engines.stages import NEXT, PAST, STREAM
from ltx_trt.decoder import Streaming
from ltx_trt.session import Array, Feeds, Session, sizes
from ltx_trt.session.closing import close_all
from ltx_trt.tiles import Cut, Grid, Streamed


class DecoderSession:
    """Implements Session, Tiling and Streaming. `open_stage` is given the stage that is needed, and
    gives what is open from then on; the choice of a clip's cut opens it."""

    def __init__(
        self,
        stages: tuple[str, StageEntry],
        open_stage: Callable[[str], Session],
        choose: Callable[[Grid], Cut],
    ) -> None:
        """`stages`: that of the whole decoder, and the entry of the one that goes on."""
        self._stage, self._entry = stages
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
        return (
            session.begin() if isinstance(session, Streaming) else HostStream(session, self._entry)
        )

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


class HostStream:
    """What a session gives as `next_0` and so on, it is given as `past_0` at the next call. The
    session belongs to somebody else."""

    def __init__(self, session: Session, entry: StageEntry) -> None:
        self._session, self._entry = session, entry
        self._past: dict[str, Array] = {}

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        if not self._past:
            self._past = begun(self._entry, feeds["latents"].shape[2:])
        made = self._session({**feeds, **self._past})
        self._past = {
            name.replace(NEXT, PAST, 1): made.pop(name)
            for name in list(made)
            if name.startswith(NEXT)
        }
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


def begun(entry: StageEntry, grid: tuple[int, ...]) -> dict[str, Array]:
    """What was kept before the first call: nothing that is read."""
    past = (tensor for tensor in entry.inputs if tensor.name.startswith(PAST))
    return {tensor.name: np.zeros(shape(tensor, grid), np.float32) for tensor in past}


def kept_bytes(tensor: TensorEntry, grid: Grid) -> int:
    """Of one input, if it is of what is kept; in float32, as it comes back to the host."""
    return 4 * prod(shape(tensor, grid)) if tensor.name.startswith(PAST) else 0


def shape(tensor: TensorEntry, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor of a stream, for one clip on this latent grid."""
    known = sizes.of_grid(grid) | {"batch": 1}
    return tuple(axis if isinstance(axis, int) else known[axis] for axis in tensor.axes)
