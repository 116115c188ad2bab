"""Steps of different requests share one pass of the transformer, where their shapes are equal.

    lane A  --feeds-->  |                      |
    lane B  --feeds-->  |  rows of A, B, C  -> | one call -> each lane gets its own rows back
    lane C  --feeds-->  |                      |

Rows are put together along the axis that the tensor table calls `batch`; sigmas and prompts may
differ. A lane that is alone never waits. With others of its shape it waits for them until the delay
is over; whoever is there then goes. There is one pass at a time.

A product over more rows may be divided otherwise among threads, and then rounds otherwise: which
sizes do is known to nobody but the library (ONNX Runtime's CPU, 2 threads: 64 rows and 128). Where
it matters that a clip does not depend on who else asked, the first pass of each size and number is
computed both ways; from then on only those go together whose bits were the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from time import monotonic
from types import TracebackType
from typing import Self

import numpy as np

from ltx_engines.bundle import StageEntry, TensorEntry
from ltx_engines.triton_settings import Batching
from ltx_trt.session import Array, Feeds, Session

BATCH = "batch"

Key = tuple[tuple[str, tuple[int, ...]], ...]
"""What must be equal: every size but the batch's."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`delay` in seconds; `rows` of one pass at most, though one lane's own rows always go."""

    delay: float
    rows: int
    batching: Batching = "any"

    @property
    def most(self) -> int:
        """Rows of one pass of several lanes."""
        return 0 if self.batching == "none" else self.rows


Together = tuple[Key, tuple[int, ...]]
"""Of a pass: what is equal in its lanes, and the rows of each."""

KNOWN = 4096
"""Sizes and numbers that are remembered: clients choose them."""


@dataclass(slots=True)
class _Call:
    """Mutable: filled by whoever runs the pass."""

    key: Key
    feeds: Feeds
    rows: int
    deadline: float
    result: dict[str, Array] | None = None
    error: BaseException | None = None
    taken: bool = False

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None


class Batcher:
    """One session for many lanes. Thread-safe; the session is called by one thread at a time."""

    def __init__(
        self,
        session: Session,
        entry: StageEntry,
        limits: Limits,
        heard: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`heard` is told how many requests shared a pass, before any of them goes on."""
        self._session, self._limits, self._heard = session, limits, heard
        self._inputs = {t.name: t.axes.index(BATCH) for t in entry.inputs if BATCH in t.axes}
        self._outputs = {t.name: _axis(t) for t in entry.outputs}
        self._turn = Condition()
        self._waiting: list[_Call] = []
        self._lanes: dict[int, Key | None] = {}
        self._running = False
        self._exact: dict[Together, bool] = {}

    @contextmanager
    def lane(self) -> Iterator["Lane"]:
        """One request's way to the session, open from its first step to its last."""
        lane = Lane(self)
        with self._turn:
            self._lanes[id(lane)] = None
        try:
            yield lane
        finally:
            with self._turn:
                del self._lanes[id(lane)]
                self._turn.notify_all()

    def call(self, lane: "Lane", feeds: Feeds) -> dict[str, Array]:
        key = _key(feeds, self._inputs)
        name, axis = next(iter(self._inputs.items()))
        deadline = monotonic() + self._limits.delay
        call = _Call(key, feeds, feeds[name].shape[axis], deadline)
        with self._turn:
            self._lanes[id(lane)] = key
            self._waiting.append(call)
            self._turn.notify_all()
            together = self._wait(call)
        if together:
            self._run(together)
        if call.error is not None:
            raise call.error
        if call.result is None:
            raise AssertionError("a pass ended without a result")
        return call.result

    def _wait(self, call: _Call) -> list[_Call]:
        """Until another's pass has done this call, or it is this one's turn: then who goes."""
        while not call.done:
            if not self._running and not call.taken and self._next() == call.key:
                return self._take(call)
            left = call.deadline - monotonic()
            # what else makes it a turn, an end, an arrival or a leaving, is notified
            self._turn.wait(None if self._running or call.taken or left <= 0 else left)
        return []

    def _next(self) -> Key | None:
        """The shape whose turn it is: of the calls that may go, the oldest one's."""
        now = monotonic()
        for call in self._waiting:
            if call.deadline <= now or self._complete(call.key):
                return call.key
        return None

    def _complete(self, key: Key) -> bool:
        """Nobody else of this shape could come, or no more rows would go."""
        alike = [call for call in self._waiting if call.key == key]
        lanes = sum(found == key for found in self._lanes.values())
        rows = tuple(call.rows for call in alike)
        full = sum(rows) >= self._limits.most
        return full or len(alike) >= lanes or not self._allowed((key, (*rows, rows[0])))

    def _allowed(self, together: Together) -> bool:
        """What is not known may go, and is known then."""
        return self._exact.get(together, True)

    def _take(self, first: _Call) -> list[_Call]:
        """The oldest of its shape, itself among them."""
        taken, rows = [first], first.rows
        for call in self._waiting:
            fits = call.key == first.key and rows + call.rows <= self._limits.most
            if call is not first and fits:
                taken.append(call)
                rows += call.rows
        while len(taken) > 1 and not self._allowed(_together(taken)):
            taken.pop()
        for call in taken:
            call.taken = True
        self._waiting = [call for call in self._waiting if not call.taken]
        self._running = True
        return taken

    def _run(self, calls: list[_Call]) -> None:
        """Outside the lock. An error is everybody's: nobody's rows are to blame alone."""
        results: Iterable[dict[str, Array]] = ()
        error: BaseException | None = None
        try:
            try:
                results = self._pass(calls)
            finally:
                self._heard(len(calls))
        except BaseException as raised:
            error = raised
        with self._turn:
            for call in calls:
                call.error = error
            for call, result in zip(calls, results, strict=False):
                call.result = result
            self._running = False
            self._turn.notify_all()

    def _pass(self, calls: list[_Call]) -> list[dict[str, Array]]:
        if len(calls) == 1:
            return [self._session(calls[0].feeds)]
        made, together = self._put_together(calls), _together(calls)
        if self._limits.batching == "any" or together in self._exact:
            return made
        alone = [self._session(call.feeds) for call in calls]
        if len(self._exact) >= KNOWN:
            self._exact.clear()
        self._exact[together] = all(map(_same_bits, made, alone))
        return alone

    def _put_together(self, calls: list[_Call]) -> list[dict[str, Array]]:
        feeds = {
            name: np.concatenate([call.feeds[name] for call in calls], self._inputs[name])
            for name in calls[0].feeds
        }
        whole = self._session(feeds)
        ends = np.cumsum([call.rows for call in calls])[:-1]
        split = {name: np.split(whole[name], ends, axis) for name, axis in self._outputs.items()}
        return [{name: parts[i] for name, parts in split.items()} for i in range(len(calls))]


class Lane:
    """Implements Session. Of one request."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        return self._batcher.call(self, feeds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def _together(calls: Sequence[_Call]) -> Together:
    return calls[0].key, tuple(call.rows for call in calls)


def _same_bits(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return all(array.tobytes() == other[name].tobytes() for name, array in one.items())


def _axis(tensor: TensorEntry) -> int:
    return tensor.axes.index(BATCH)


def _key(feeds: Feeds, axes: dict[str, int]) -> Key:
    return tuple(
        (name, tuple(size for axis, size in enumerate(feed.shape) if axis != axes[name]))
        for name, feed in sorted(feeds.items())
    )
