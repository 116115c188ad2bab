"""Lanes of one shape share passes, get their own rows back, and wait for nobody when alone."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import pytest

from ltx_engines.bundle import StageEntry, tensor_entries
from ltx_engines.stages import Stage, Tensor
from ltx_trt.triton.batching import Batcher, Limits
from tests.waiting import HANG, until

LONG = HANG
"""Seconds of delay that no lane but one that waits in vain ever sees the end of."""

STAGE = Stage(
    "transformer",
    inputs=(
        Tensor("latents", "float32", ("batch", "tokens", 2)),
        Tensor("mask", "float32", (3, "batch")),
    ),
    outputs=(Tensor("velocity", "float32", ("batch", "tokens", 2)),),
)
ENTRY = StageEntry(
    file="transformer.onnx",
    inputs=tensor_entries(STAGE.inputs, "float32"),
    outputs=tensor_entries(STAGE.outputs, "float32"),
)


class Doubler:
    """velocity = 2 latents + the sum of the row's mask; notes the rows and tokens of each pass,
    before which `begin` is called."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.begin: Callable[[Any], object] = bool
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self.seconds = seconds
        self.inside = 0
        self.most_inside = 0
        self.error: Exception | None = None

    def __call__(self, feeds: Any) -> dict[str, Any]:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.begin(feeds)
        time.sleep(self.seconds)
        self.rows.append(len(feeds["latents"]))
        self.tokens.append(feeds["latents"].shape[1])
        self.inside -= 1
        if self.error is not None:
            raise self.error
        return {"velocity": 2 * feeds["latents"] + feeds["mask"].sum(0)[:, None, None]}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def feeds(value: float, rows: int = 2, tokens: int = 5) -> dict[str, Any]:
    """Each row has a mask of its own, along another axis than the latents' rows."""
    masks = np.arange(3 * rows, dtype=np.float32).reshape(3, rows)
    return {"latents": np.full((rows, tokens, 2), value, np.float32), "mask": masks + value}


def expected(given: dict[str, Any]) -> Any:
    return 2 * given["latents"] + given["mask"].sum(0)[:, None, None]


@pytest.fixture
def session() -> Doubler:
    return Doubler(seconds=0.002)


@pytest.fixture
def in_vain(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """How long they were to last, the waits that nobody ended before their time was over."""
    found: list[float | None] = []

    class Turn(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            if not (notified := super().wait(timeout)):
                found.append(timeout)
            return notified

    monkeypatch.setattr("ltx_trt.triton.batching.Condition", Turn)
    return found


def meet(session: Doubler, batcher: Batcher, lanes: int) -> None:
    """The first pass ends when so many lanes are there: one in it, the others waiting."""

    def begin(_: object) -> None:
        if not session.rows:
            until(lambda: len(batcher._waiting) == lanes - 1, f"{lanes} lanes")

    session.begin = begin


def together(batcher: Batcher, given: list[list[dict[str, Any]]]) -> list[list[Any]]:
    """A thread for each lane, which calls once for each of its feeds."""
    begin = threading.Barrier(len(given))

    def run(calls: list[dict[str, Any]]) -> list[Any]:
        with batcher.lane() as lane:
            begin.wait()
            return [lane(call)["velocity"] for call in calls]

    with ThreadPoolExecutor(len(given)) as pool:
        return list(pool.map(run, given))


def test_lanes_of_one_shape_share_passes_and_get_their_own_rows(session: Doubler) -> None:
    batcher = Batcher(session, ENTRY, Limits(delay=LONG, rows=100))
    meet(session, batcher, 6)
    given = [[feeds(10 * lane + step, rows=1 + lane % 3) for step in range(4)] for lane in range(6)]
    for calls, made in zip(given, together(batcher, given), strict=True):
        for call, velocity in zip(calls, made, strict=True):
            np.testing.assert_array_equal(velocity, expected(call))
    assert sum(session.rows) == 4 * (1 + 2 + 3) * 2
    assert len(session.rows) == 1 + 4, "one alone, then all together, and the last without it"
    assert session.most_inside == 1


def test_a_lone_lane_never_waits(session: Doubler, in_vain: list[float | None]) -> None:
    batcher = Batcher(session, ENTRY, Limits(delay=LONG, rows=100))
    with batcher.lane() as lane:
        for _ in range(5):
            lane(feeds(1.0))
    assert in_vain == []
    assert session.rows == [2] * 5


def test_lanes_of_another_shape_are_not_waited_for(
    session: Doubler, in_vain: list[float | None]
) -> None:
    batcher = Batcher(session, ENTRY, Limits(delay=LONG, rows=100))
    made = together(batcher, [[feeds(1.0, tokens=3)] * 3, [feeds(2.0, tokens=4)] * 3])
    assert in_vain == []
    assert [part.shape for parts in made for part in parts] == [(2, 3, 2)] * 3 + [(2, 4, 2)] * 3
    assert session.rows == [2] * 6


def test_who_is_late_is_not_waited_for_beyond_the_delay(
    session: Doubler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which nothing takes time but waiting."""
    now, waits = [0.0], list[float | None]()

    class Turn(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None, "nobody would ever end it"
            waits.append(timeout)
            now[0] += timeout
            return False

    monkeypatch.setattr("ltx_trt.triton.batching.Condition", Turn)
    monkeypatch.setattr("ltx_trt.triton.batching.monotonic", lambda: now[0])
    batcher = Batcher(session, ENTRY, Limits(delay=0.05, rows=100))
    with batcher.lane() as first, batcher.lane() as second:
        second(feeds(1.0))  # it has a shape now, and computes something else
        assert waits == []
        first(feeds(1.0))
    assert waits == [0.05]


def test_a_lane_that_ends_is_no_longer_waited_for(session: Doubler) -> None:
    batcher = Batcher(session, ENTRY, Limits(delay=HANG, rows=100))
    held = ExitStack()
    leaver = held.enter_context(batcher.lane())
    leaver(feeds(1.0))
    with batcher.lane() as stayer, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stayer, feeds(2.0))
        until(lambda: batcher._waiting, "the lane that stays")
        time.sleep(0.05)
        assert not waiting.done()
        held.close()
        np.testing.assert_array_equal(waiting.result(HANG / 2)["velocity"], expected(feeds(2.0)))


def test_no_pass_has_more_rows_than_the_limit(session: Doubler) -> None:
    batcher = Batcher(session, ENTRY, Limits(delay=0.5, rows=5))
    given = [[feeds(lane)] * 3 for lane in range(6)]
    for calls, made in zip(given, together(batcher, given), strict=True):
        for call, velocity in zip(calls, made, strict=True):
            np.testing.assert_array_equal(velocity, expected(call))
    assert max(session.rows) <= 5


def test_one_lanes_own_rows_always_go(session: Doubler) -> None:
    batcher = Batcher(session, ENTRY, Limits(delay=0.0, rows=1))
    with batcher.lane() as lane:
        assert len(lane(feeds(1.0, rows=3))["velocity"]) == 3


def test_an_error_reaches_every_lane_of_the_pass_and_the_next_pass_goes_on(
    session: Doubler,
) -> None:
    batcher = Batcher(session, ENTRY, Limits(delay=0.5, rows=100))
    session.error = RuntimeError("no memory")

    def run(_: int) -> str:
        with batcher.lane() as lane:
            try:
                lane(feeds(1.0))
            except RuntimeError as error:
                return str(error)
            return "none"

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == ["no memory"] * 3
    session.error = None
    assert run(0) == "none"


def test_whoever_listens_hears_how_many_shared_each_pass(session: Doubler) -> None:
    heard: list[int] = []
    batcher = Batcher(session, ENTRY, Limits(delay=LONG, rows=100), heard.append)
    meet(session, batcher, 3)
    together(batcher, [[feeds(1.0)] * 4] * 3)
    assert sorted(heard) == [1, 2, 3, 3, 3]


def test_who_has_its_rows_finds_the_pass_counted() -> None:
    """Also who has not run it: a request that ends then is told of with all its passes."""
    session, heard = Doubler(), list[int]()

    def hear(count: int) -> None:
        time.sleep(0.05)  # whoever does not wait for it is sooner
        heard.append(count)

    batcher = Batcher(session, ENTRY, Limits(delay=LONG, rows=100), hear)
    meet(session, batcher, 3)
    counts: list[list[int]] = []

    def run(_: int) -> None:
        with batcher.lane() as lane:
            lane(feeds(1.0))
            counts.append(list(heard))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    assert sorted(counts) == [[1], [1, 2], [1, 2]]


def test_a_pass_that_fails_is_counted_before_its_requests_end(session: Doubler) -> None:
    heard: list[int] = []
    batcher = Batcher(session, ENTRY, Limits(delay=LONG, rows=100), heard.append)
    session.error = RuntimeError("no memory")
    with batcher.lane() as lane, pytest.raises(RuntimeError, match="no memory"):
        lane(feeds(1.0))
    assert heard == [1]


def test_a_lone_lane_is_overtaken_by_no_more_than_the_pass_under_way(session: Doubler) -> None:
    """However busy those of another shape are."""
    batcher = Batcher(session, ENTRY, Limits(delay=LONG, rows=100))
    meet(session, batcher, 3)
    others_meet, alone = session.begin, threading.Event()

    def begin(found: Any) -> None:
        others_meet(found)
        if found["latents"].shape[1] == 3 and session.rows:
            until(lambda: alone.is_set() or is_waiting(batcher, tokens=9), "the lone lane")

    session.begin = begin
    busy = [[feeds(lane, tokens=3)] * 40 for lane in range(3)]
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(together, batcher, busy)
        until(lambda: session.rows, "the others")
        with batcher.lane() as lane:
            for _ in range(8):
                lane(feeds(1.0, tokens=9))
        alone.set()
        others.result()
    # the first pass was over before it came
    order = "".join("x" if tokens == 9 else "." for tokens in session.tokens[1:])
    assert order.count("x") == 8
    assert max(map(len, order.rstrip(".").split("x"))) <= 1, order


def is_waiting(batcher: Batcher, tokens: int) -> bool:
    return any(call.feeds["latents"].shape[1] == tokens for call in batcher._waiting)


@pytest.mark.parametrize("delay", [0.0, 0.001])
def test_many_lanes_of_many_shapes_come_and_go(delay: float, session: Doubler) -> None:
    session.seconds = 0.0
    batcher = Batcher(session, ENTRY, Limits(delay=delay, rows=7))
    generator = np.random.default_rng(0)
    given = [
        [
            feeds(float(lane), rows=int(r), tokens=int(t))
            for r, t in generator.integers(1, 4, (9, 2))
        ]
        for lane in range(8)
    ]
    for calls, made in zip(given, together(batcher, given), strict=True):
        for call, velocity in zip(calls, made, strict=True):
            np.testing.assert_array_equal(velocity, expected(call))


class Rounder(Doubler):
    """Adds what no request has: with `odd` lanes' rows or more together, it rounds otherwise."""

    def __init__(self, odd: int) -> None:
        super().__init__(seconds=0.001)
        self.odd = odd

    def __call__(self, feeds: Any) -> dict[str, Any]:
        made = super().__call__(feeds)
        error = np.float32(1e-6 if len(feeds["latents"]) >= self.odd else 0)
        return {name: array + error for name, array in made.items()}


@pytest.mark.parametrize(("odd", "most"), [(4, 2), (6, 4), (100, 8)])
def test_who_shares_a_pass_is_seen_in_no_bit(odd: int, most: int) -> None:
    """What rounds otherwise together goes together once; what does not, from then on."""
    session = Rounder(odd)
    batcher = Batcher(session, ENTRY, Limits(delay=LONG, rows=8, batching="exact"))
    meet(session, batcher, 4)
    given = [[feeds(0.1 * lane + step) for step in range(12)] for lane in range(4)]
    for calls, made in zip(given, together(batcher, given), strict=True):
        for call, velocity in zip(calls, made, strict=True):
            np.testing.assert_array_equal(velocity, expected(call))
    assert max(session.rows[len(session.rows) // 2 :]) == most


def test_lanes_that_cannot_go_together_do_not_wait_for_each_other(
    in_vain: list[float | None],
) -> None:
    session = Rounder(3)
    batcher = Batcher(session, ENTRY, Limits(delay=LONG, rows=8, batching="exact"))
    meet(session, batcher, 2)
    together(batcher, [[feeds(float(lane))] * 6 for lane in range(2)])
    with batcher.lane() as first, batcher.lane() as second:
        second(feeds(1.0))
        first(feeds(1.0))
    assert in_vain == []


def test_without_batching_every_pass_has_the_rows_of_one_lane(
    session: Doubler, in_vain: list[float | None]
) -> None:
    batcher = Batcher(session, ENTRY, Limits(delay=LONG, rows=100, batching="none"))
    together(batcher, [[feeds(float(lane))] * 4 for lane in range(3)])
    assert session.rows == [2] * 12
    assert in_vain == []


def test_sizes_that_clients_choose_do_not_fill_the_memory(
    session: Doubler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ltx_trt.triton.batching.KNOWN", 3)
    batcher = Batcher(session, ENTRY, Limits(delay=0.5, rows=8, batching="exact"))
    for tokens in range(1, 12):
        together(batcher, [[feeds(1.0, tokens=tokens)] * 2] * 2)
        assert len(batcher._exact) <= 3
