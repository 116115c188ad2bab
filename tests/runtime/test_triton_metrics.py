"""What /metrics say: every series of the table, sums and counts, told once a second."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from ltx_engines.triton_model import METRICS
from ltx_trt.triton.metrics import Meter


class Board:
    """The server's side; not thread-safe, as the server's is not."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self.kinds: dict[str, str] = {}
        self.words = 0
        self.busy = False

    def make(self, name: str, kind: str, text: str, labels: Mapping[str, str]) -> "Line":
        assert text
        self.kinds[name] = kind
        key = (name, *(f"{key}={value}" for key, value in labels.items()))
        assert key not in self.values, "a series is made once"
        self.values[key] = 0.0
        return Line(self, key)


class Line:
    def __init__(self, board: Board, key: tuple[str, ...]) -> None:
        self.board, self.key = board, key

    def increment(self, value: float) -> None:
        assert not self.board.busy, "two threads at once end the server"
        self.board.busy = True
        self.board.values[self.key] += value
        self.board.words += 1
        self.board.busy = False


def test_every_series_without_labels_is_there_before_the_first_request() -> None:
    board = Board()
    Meter(board.make, "ltx_video")
    names = {name for name, *_ in board.values}
    for metric in METRICS:
        if not metric.labels:
            parts = ("_sum", "_count") if metric.kind == "histogram" else ("",)
            assert {metric.name + part for part in parts} <= names
    assert set(board.values.values()) == {0.0}
    assert board.kinds["ltx_requests_running"] == "gauge"
    assert board.kinds["ltx_step_seconds_sum"] == "counter"


def test_a_request_is_told_when_it_ends_and_steps_are_summed_until_then() -> None:
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
    assert board.values["ltx_step_seconds_sum", "model=m"] == 15.0
    assert board.values["ltx_step_seconds_count", "model=m"] == 30.0
    assert board.values["ltx_stage_seconds_sum", "model=m", "stage=vae_decoder"] == 0.25
    assert board.values["ltx_pass_requests_sum", "model=m"] == 4.0
    assert board.values["ltx_requests_done_total", "model=m"] == 1.0
    assert board.values["ltx_requests_running", "model=m"] == 0.0
    assert board.words - before < 12


def test_a_long_request_is_told_once_a_second() -> None:
    board, now = Board(), [0.0]
    meter = Meter(board.make, "m", clock=lambda: now[0])
    meter.step(0.1)
    assert board.values["ltx_step_seconds_count", "model=m"] == 0.0
    now[0] = 1.5
    meter.step(0.1)
    assert board.values["ltx_step_seconds_count", "model=m"] == 2.0


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
    assert board.values["ltx_requests_done_total", "model=m"] == 400.0
    assert board.values["ltx_step_seconds_sum", "model=m"] == 400.0
