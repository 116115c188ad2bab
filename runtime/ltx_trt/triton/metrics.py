"""What a server's /metrics say of our requests, by the table of `ltx_engines.triton_model`.

Servers before 24.12 have no histograms for Python models: there the sum and the count of one are
two counters with the names that Prometheus gives them, so that the same queries work.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from ltx_engines.triton_model import METRICS


class Series(Protocol):
    """One line of /metrics."""

    def increment(self, value: float) -> None: ...


MakeSeries = Callable[[str, str, str, Mapping[str, str]], Series]
"""Of a name, a kind (counter or gauge), a text and labels."""

BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Seconds."""


class Meter:
    """Thread-safe as far as the server's series are, which lock."""

    def __init__(self, make: MakeSeries, model: str) -> None:
        self._make, self._model = make, model
        self._rows = {metric.name: metric for metric in METRICS}
        self._series: dict[tuple[str, ...], Series] = {}
        for metric in METRICS:  # so that they are there, with 0, before the first request
            if not metric.labels:
                self._add(metric.name, 0.0)

    def step(self, seconds: float) -> None:
        self._add("ltx_step_seconds", seconds, 1.0)

    def stage(self, stage: str, seconds: float) -> None:
        self._add("ltx_stage_seconds", seconds, 1.0, stage)

    def queued(self, seconds: float) -> None:
        self._add("ltx_queue_seconds", seconds, 1.0)

    def ended(self, how: str) -> None:
        """done, cancelled or failed."""
        self._add(f"ltx_requests_{how}_total", 1.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        self._add("ltx_requests_running", 1.0)
        try:
            yield
        finally:
            self._add("ltx_requests_running", -1.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._add("ltx_requests_waiting", 1.0)
        try:
            yield
        finally:
            self._add("ltx_requests_waiting", -1.0)

    def _add(self, name: str, value: float, count: float = 0.0, *labels: str) -> None:
        metric = self._rows[name]
        if metric.kind != "histogram":
            self._of(name, metric.kind, labels).increment(value)
            return
        self._of(f"{name}_sum", "counter", labels).increment(value)
        self._of(f"{name}_count", "counter", labels).increment(count)

    def _of(self, name: str, kind: str, labels: tuple[str, ...]) -> Series:
        if (name, *labels) not in self._series:
            row = self._rows[name.removesuffix("_sum").removesuffix("_count")]
            named = {"model": self._model, **dict(zip(row.labels, labels, strict=True))}
            self._series[name, *labels] = self._make(name, kind, row.text, named)
        return self._series[name, *labels]
