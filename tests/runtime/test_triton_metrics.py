"""What /metrics say: every series of the table, told once a second and when a request ends."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from ltx_engines.triton_model import METRICS, Metric
from ltx_trt.triton.metrics import Meter


class Board:
    """The server's side; not thread-safe, as the server's is not."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], list[float]] = {}
        self.told: list[str] = []
        self.words = 0
        self.busy = False

    def make(self, metric: Metric, labels: Mapping[str, str]) -> "Line":
        key = (metric.name, *(f"{key}={value}" for key, value in labels.items()))
        assert key not in self.values, "a series is made once"
        self.values[key] = []
        return Line(self, key, metric)

    def sum(self, *key: str) -> float:
        return sum(self.values[key])


class Line:
    def __init__(self, board: Board, key: tuple[str, ...], metric: Metric) -> None:
        self.board, self.key, self.metric = board, key, metric

    def increment(self, value: float) -> None:
        assert self.metric.kind != "histogram"
        self._take(value)

    def observe(self, value: float) -> None:
        assert self.metric.kind == "histogram"
        self._take(value)

    def _take(self, value: float) -> None:
        assert not self.board.busy, "two threads at once end the server"
        self.board.busy = True
        self.board.values[self.key].append(value)
        self.board.told.append(self.key[0])
        self.board.words += 1
        self.board.busy = False


def test_every_series_without_labels_is_there_before_the_first_request() -> None:
    board = Board()
    Meter(board.make, "m")
    assert board.values == {(row.name, "model=m"): [] for row in METRICS if not row.labels}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_histogram_has_classes_in_rising_order_and_nothing_else_has(metric: Metric) -> None:
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_a_request_is_told_when_it_ends_and_its_steps_are_kept_until_then() -> None:
    board = Board()
    meter = Meter(board.make, "m", clock=lambda: 0.0)
    before = board.words
    with meter.running():
        for _ in range(30):
            meter.step(0.5)
        meter.stage("vae_decoder", 0.25)
        meter.shared(4)
    assert board.words == before
    meter.ended("done")
    assert board.values["ltx_step_seconds", "model=m"] == [0.5] * 30
    assert board.values["ltx_stage_seconds", "model=m", "stage=vae_decoder"] == [0.25]
    assert board.values["ltx_pass_requests", "model=m"] == [4.0]
    assert board.sum("ltx_requests_done_total", "model=m") == 1
    assert board.sum("ltx_requests_running", "model=m") == 0


def test_the_end_of_a_request_is_told_after_all_else_of_it() -> None:
    """Also where another's end, of the same kind, has been noted before this one's begin."""
    board = Board()
    meter = Meter(board.make, "m", clock=lambda: 0.0)
    meter._add("ltx_requests_cancelled_total", 1.0)
    with meter.running():
        meter.step(0.5)
        meter.shared(1)
    meter.ended("cancelled")
    assert board.told[-1] == "ltx_requests_cancelled_total"
    assert set(board.told[:-1]) == {
        "ltx_step_seconds",
        "ltx_pass_requests",
        "ltx_requests_running",
    }
    assert board.sum("ltx_requests_cancelled_total", "model=m") == 2


def test_a_long_request_is_told_once_a_second() -> None:
    board, now = Board(), [0.0]
    meter = Meter(board.make, "m", clock=lambda: now[0])
    meter.step(0.1)
    assert board.values["ltx_step_seconds", "model=m"] == []
    now[0] = 1.5
    meter.step(0.1)
    assert board.values["ltx_step_seconds", "model=m"] == [0.1, 0.1]


def test_threads_take_turns_at_the_server() -> None:
    board = Board()
    meter = Meter(board.make, "m")

    def work(_: int) -> None:
        for _ in range(50):
            with meter.running():
                meter.step(1.0)
            meter.ended("done")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert board.sum("ltx_requests_done_total", "model=m") == 400
    assert board.sum("ltx_step_seconds", "model=m") == 400
