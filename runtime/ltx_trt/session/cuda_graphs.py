"""Hundreds of kernels in one launch: what is enqueued again and again becomes a CUDA graph.

A binding's first run is enqueued, since an engine sets itself up in it; the second is captured,
if its runners can be; from then on the graph is launched. TensorRT changes what a captured graph
refers to as soon as other shapes are set (NVIDIA/TensorRT#3798), so a graph lives no longer than
its binding: whoever comes back to an earlier one starts anew.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

from ltx_engines.errors import UserError
from ltx_trt.session.driver import DeviceError, Driver, Graph, Stream
from ltx_trt.session.engine_api import EngineError
from ltx_trt.session.runner import Runner

Enqueue = Callable[[], None]


class Graphs:
    """Of one stream. `close` when it has passed. `runners` are what is enqueued there."""

    def __init__(self, driver: Driver, stream: Stream, runners: Sequence[Runner] = ()) -> None:
        self._driver, self._stream, self._runners = driver, stream, runners
        self._key: object = None
        self._graph: Graph | None = None
        self._stale: list[Graph] = []

    def run(self, key: object, enqueue: Enqueue) -> None:
        """`key` is everything that a graph of what `enqueue` does would hold: shapes, addresses,
        and how often what lies there has moved.

        Raises:
            DeviceError, EngineError: it was not enqueued.
            UserError: it was not captured.
        """
        if key != self._key:
            self._retire()
            enqueue()
            self._key = key
            return
        if self._graph is None:
            if not all(runner.capturable for runner in self._runners):
                enqueue()
                return
            self._graph = self._captured(enqueue)
        self._driver.launch(self._graph, self._stream)

    def close(self) -> None:
        self._retire()
        while self._stale:
            self._driver.close_graph(self._stale.pop())

    def _retire(self) -> None:
        """It may be at work still: it is closed at the end."""
        if self._graph is not None:
            self._stale.append(self._graph)
        self._key = self._graph = None

    def _captured(self, enqueue: Enqueue) -> Graph:
        try:
            self._driver.begin_capture(self._stream)
            try:
                enqueue()
            except BaseException:
                self._abandon()
                raise
            return self._driver.end_capture(self._stream)
        except (DeviceError, EngineError, UserError) as error:
            raise UserError(
                f"the step cannot be captured as a CUDA graph: {error}; "
                "run without one: --no-cuda-graphs"
            ) from error

    def _abandon(self) -> None:
        """Until a capture ends, the stream does nothing else."""
        with suppress(DeviceError):  # it was invalidated, as it should be
            self._driver.close_graph(self._driver.end_capture(self._stream))
