"""What a server's /metrics say of our requests, by the table of `ltx_engines.triton_model`.

Servers before 24.12 have no histograms for Python models: there the sum and the count of one are
two counters with the names that Prometheus gives them, so that the same queries work.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from time import monotonic
from typing import Protocol

from ltx_engines.triton_model import METRICS, Metric


class Series(Protocol):
    """One line of /metrics."""

    def increment(self, value: float) -> None: ...


MakeSeries = Callable[[str, str, str, Mapping[str, str]], Series]
"""Of a name, a kind (counter or gauge), a text and labels."""

FLUSH = 1.0
"""Seconds. Each word to the server costs 0.2 ms of a step; more often nobody reads them."""


class Meter:
    """Adds up, and tells the server once a second and when a request ends. Thread-safe, which the
    server's series are not: two threads that increment at once end the whole server (24.10)."""

    def __init__(
        self, make: MakeSeries, model: str, clock: Callable[[], float] = monotonic
    ) -> None:
        self._make, self._model, self._clock = make, model, clock
        self._rows = {metric.name: metric for metric in METRICS}
        self._series: dict[tuple[str, ...], Series] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        self._lock = Lock()
        self._flushed = clock()
        for metric in METRICS:  # so that they are there, with 0, before the first request
            if not metric.labels:
                for series in _series(metric):
                    self._add({(series,): 0.0})
        self.flush()

    def step(self, seconds: float) -> None:
        self._observe("ltx_step_seconds", seconds)

    def stage(self, stage: str, seconds: float) -> None:
        self._observe("ltx_stage_seconds", seconds, stage)

    def shared(self, requests: int) -> None:
        """A pass of the transformer, for so many requests."""
        self._observe("ltx_pass_requests", float(requests))

    def queued(self, seconds: float) -> None:
        self._observe("ltx_queue_seconds", seconds)

    def ended(self, how: str) -> None:
        """done, cancelled or failed."""
        self._add({(f"ltx_requests_{how}_total",): 1.0})
        self.flush()

    @contextmanager
    def running(self) -> Iterator[None]:
        self._add({("ltx_requests_running",): 1.0})
        try:
            yield
        finally:
            self._add({("ltx_requests_running",): -1.0})

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._add({("ltx_requests_waiting",): 1.0})
        self.flush()
        try:
            yield
        finally:
            self._add({("ltx_requests_waiting",): -1.0})
            self.flush()

    def flush(self) -> None:
        with self._lock:
            sums, self._sums = self._sums, {}
            for (name, *labels), value in sums.items():
                self._of(name, tuple(labels)).increment(value)
            self._flushed = self._clock()

    def _observe(self, name: str, value: float, *labels: str) -> None:
        total, count = _series(self._rows[name])
        self._add({(total, *labels): value, (count, *labels): 1.0})

    def _add(self, values: Mapping[tuple[str, ...], float]) -> None:
        with self._lock:
            for key, value in values.items():
                self._sums[key] = self._sums.get(key, 0.0) + value
            late = self._clock() - self._flushed > FLUSH
        if late:
            self.flush()

    def _of(self, name: str, labels: tuple[str, ...]) -> Series:
        if (name, *labels) not in self._series:
            row = self._rows[name.removesuffix("_sum").removesuffix("_count")]
            kind = "gauge" if row.kind == "gauge" else "counter"
            named = {"model": self._model, **dict(zip(row.labels, labels, strict=True))}
            self._series[name, *labels] = self._make(name, kind, row.text, named)
        return self._series[name, *labels]


def _series(metric: Metric) -> tuple[str, ...]:
    """What is counted for it."""
    if metric.kind == "histogram":
        return f"{metric.name}_sum", f"{metric.name}_count"
    return (metric.name,)
