"""What a server's /metrics say of our requests, by the table of `ltx_engines.triton_model`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from time import monotonic
from typing import Protocol

from ltx_engines.triton_model import METRICS, Metric


class Series(Protocol):
    """One line of /metrics; a histogram's observes, the others increment."""

    def increment(self, value: float) -> None: ...

    def observe(self, value: float) -> None: ...


MakeSeries = Callable[[Metric, Mapping[str, str]], Series]
"""Of a family and the labels of one of its series."""

Key = tuple[str, ...]
"""A family's name, and the values of its labels."""

FLUSH = 1.0
"""Seconds. Words to the server cost time of a step, and more often nobody reads them."""


class Meter:
    """Collects, and tells the server once a second and when a request ends. Thread-safe, which the
    server's series are not: two threads that increment at once end the whole server (24.10)."""

    def __init__(
        self, make: MakeSeries, model: str, clock: Callable[[], float] = monotonic
    ) -> None:
        self._make, self._model, self._clock = make, model, clock
        self._rows = {metric.name: metric for metric in METRICS}
        self._series: dict[Key, Series] = {}
        self._sums: dict[Key, float] = {}
        self._seen: list[tuple[Key, float]] = []
        self._lock = Lock()
        self._flushed = clock()
        for metric in METRICS:  # so that they are there before the first request
            if not metric.labels:
                self._of((metric.name,))

    def step(self, seconds: float) -> None:
        self._observe(seconds, "ltx_step_seconds")

    def stage(self, stage: str, seconds: float) -> None:
        self._observe(seconds, "ltx_stage_seconds", stage)

    def shared(self, requests: int) -> None:
        """A pass of the transformer, for so many requests."""
        self._observe(float(requests), "ltx_pass_requests")

    def queued(self, seconds: float) -> None:
        self._observe(seconds, "ltx_queue_seconds")

    def ended(self, how: str) -> None:
        """done, cancelled or failed."""
        self._add(f"ltx_requests_{how}_total", 1.0)
        self.flush()

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
        self.flush()
        try:
            yield
        finally:
            self._add("ltx_requests_waiting", -1.0)
            self.flush()

    def flush(self) -> None:
        """The ends of requests last: who reads of one, meanwhile too, finds all of it told."""
        with self._lock:
            sums, self._sums = self._sums, {}
            seen, self._seen = self._seen, []
            for key, value in seen:
                self._of(key).observe(value)
            for key in sorted(sums, key=self._is_counted):
                self._of(key).increment(sums[key])
            self._flushed = self._clock()

    def _observe(self, value: float, *key: str) -> None:
        with self._lock:
            self._seen.append((key, value))
        self._flush_in_time()

    def _add(self, name: str, value: float) -> None:
        with self._lock:
            self._sums[name,] = self._sums.get((name,), 0.0) + value
        self._flush_in_time()

    def _flush_in_time(self) -> None:
        if self._clock() - self._flushed > FLUSH:
            self.flush()

    def _is_counted(self, key: Key) -> bool:
        return self._rows[key[0]].kind == "counter"

    def _of(self, key: Key) -> Series:
        if key not in self._series:
            name, *labels = key
            row = self._rows[name]
            named = {"model": self._model, **dict(zip(row.labels, labels, strict=True))}
            self._series[key] = self._make(row, named)
        return self._series[key]
