"""A GPU on host memory: made-up addresses, real numbers, and no mistake of its user overlooked.

What a stream is told waits until the host or another stream waits for it, so work that lacks an
event or overwrites its source too early gives wrong numbers here as it would there. Engines are
ONNX graphs; their plan is a line of JSON (`fake_engines.py` reads it).
"""

import bisect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from threading import RLock
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ltx_trt.session.driver import Address, Bytes, DeviceError, Event, Graph, Stream
from tests.runtime.fake_work import ALIGNMENT, Failure, HostMemory
from tests.runtime.fake_work import MisuseError as MisuseError
from tests.runtime.fake_work import Work as Work
from tests.runtime.fake_work import checked as checked

FIRST, GAP = 0x7F00_0000_0000, 4096
FRESH = 0xCD
"""Memory that nobody has written to; as float32 -4e8, as bfloat16 the same."""

SILENT = ("close_engine", "close_context")  # destructors raise nothing

Call = tuple[Any, ...]
"""The method's name and what it was given, addresses and handles as numbers."""


@dataclass(slots=True)
class _Stream:
    queue: deque[Work] = field(default_factory=deque)
    captured: list[Work] | None = None


P = ParamSpec("P")
R = TypeVar("R")


def _alone(method: Callable[P, R]) -> Callable[P, R]:
    """One thread at a time: weights are loaded in another one, and a call is one thing to do."""

    @wraps(method)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        gpu = args[0]
        assert isinstance(gpu, FakeGpu)
        with gpu.lock:
            return method(*args, **kwargs)

    return locked


class FakeGpu:
    """Implements Driver. `calls` is everything that it was told, in order."""

    def __init__(
        self, *, capability: int = 89, memory: int = 2**30, name: str = "Fake RTX 4090"
    ) -> None:
        self.name, self.capability = name, capability
        self.calls: list[Call] = []
        self.lock = RLock()
        self.closed = False
        self._total, self._weights = memory, 0
        self._blocks: dict[Address, Bytes] = {}
        self._addresses: list[Address] = []
        self._next = FIRST
        self._pinned: dict[int, Bytes] = {}
        self._streams: dict[Stream, _Stream] = {}
        self._events: dict[Event, int] = {}
        self._passed: dict[Event, int] = {}
        self._graphs: dict[Graph, list[Work]] = {}
        self._handles = 0
        self._open: dict[int, str] = {}
        self._failures: dict[str, list[Failure]] = {}
        self._broken: Exception | None = None

    def fail(self, name: str, error: Exception, *, after: int = 0, stays: bool = False) -> None:
        """The call `name` raises, once, when it has succeeded `after` times more; with `stays`
        every call does from then on, as after a kernel's illegal access."""
        self._failures.setdefault(name, []).append(Failure(after, error, stays))

    def count(self, name: str) -> int:
        return len(self.named(name))

    def named(self, name: str) -> list[Call]:
        return [call for call in self.calls if call[0] == name]

    def leaks(self) -> list[str]:
        """What nobody has given back."""
        sizes = [block.nbytes for block in self._blocks.values()]
        rows = {
            f"allocations of {sizes} bytes": len(sizes),
            "pieces of pinned memory": len(self._pinned),
            "streams": len(self._streams),
            "events": len(self._events),
            "graphs": len(self._graphs),
        }
        return [f"{n} {what}" for what, n in rows.items() if n] + list(self._open.values())

    @property
    @_alone
    def used(self) -> int:
        return self._weights + sum(block.nbytes for block in self._blocks.values())

    @_alone
    def bytes_at(self, address: int, size: int) -> Bytes:
        """The very memory, checked to be inside of one live allocation."""
        index = bisect.bisect_right(self._addresses, address) - 1
        start = self._addresses[index] if index >= 0 else None
        if start is None or address + size > start + self._blocks[start].nbytes:
            raise MisuseError(f"{size} bytes at {address:#x} are not inside a live allocation")
        return self._blocks[start][address - start : address - start + size]

    @_alone
    def note(self, *call: Any) -> None:
        """Record a call; raise what was arranged for it."""
        self.calls.append(call)
        if self.closed:
            raise MisuseError(f"{call[0]} after the driver was closed")
        for failure in self._failures.get(call[0], []):
            failure.after -= 1
            if failure.after == -1:
                self._broken = failure.error if failure.stays else None
                raise failure.error
        if self._broken is not None and call[0] not in SILENT:
            raise self._broken

    @_alone
    def opened(self, what: str) -> int:
        """A handle that `leaks` speaks of until `gone`."""
        self._open[handle := self._handle()] = f"1 {what}"
        return handle

    @_alone
    def gone(self, handle: int) -> None:
        if self._open.pop(handle, None) is None:
            raise MisuseError("closed twice")

    @_alone
    def take(self, size: int) -> None:
        """Bytes for an engine's weights; negative to give them back."""
        self._check_room(size)
        self._weights += size

    @_alone
    def submit(self, stream: Stream, work: Work) -> None:
        """
        Raises:
            MisuseError: a context, or a block of activations, is at work on another stream.
        """
        for other, state in self._streams.items():
            for queued in state.queue if other != stream else ():
                if work.owner is not None and queued.owner is work.owner:
                    raise MisuseError("a context is used by two streams at once")
                if range(
                    max(work.block.start, queued.block.start),
                    min(work.block.stop, queued.block.stop),
                ):
                    raise MisuseError("two streams share a block of activations")
        state = self._stream(stream)
        if state.captured is not None:
            state.captured.append(work)
        else:
            state.queue.append(work)

    @_alone
    def capturing(self) -> bool:
        return any(state.captured is not None for state in self._streams.values())

    @_alone
    def memory(self) -> tuple[int, int]:
        self.note("memory")
        return self._total - self.used, self._total

    @_alone
    def allocate(self, size: int) -> Address:
        self.note("allocate", size)
        if size <= 0:
            raise MisuseError(f"an allocation of {size} bytes")
        self._no_capture("allocate")
        self._check_room(size)
        address = Address(self._next)
        self._next += -(-(size + GAP) // ALIGNMENT) * ALIGNMENT
        self._blocks[address] = np.full(size, FRESH, np.uint8)
        self._addresses.append(address)
        return address

    @_alone
    def free(self, address: Address) -> None:
        """Waits for the whole GPU, as CUDA does."""
        self.note("free", address)
        self._no_capture("free")
        if address not in self._blocks:
            raise MisuseError(f"{address:#x} is freed, but is no live allocation")
        for stream in self._streams:
            self._drain(stream)
        del self._blocks[address]
        self._addresses.remove(address)

    @_alone
    def pinned(self, size: int) -> Bytes:
        self.note("pinned", size)
        if size <= 0:
            raise MisuseError(f"{size} bytes of pinned memory")
        memory = np.full(size, FRESH, np.uint8)
        self._pinned[memory.ctypes.data] = memory
        return memory

    @_alone
    def unpin(self, memory: Bytes) -> None:
        self.note("unpin", memory.nbytes)
        for stream in self._streams:
            self._drain(stream)
        if self._pinned.pop(memory.ctypes.data, None) is None:
            raise MisuseError("what is unpinned was not pinned")

    @_alone
    def is_pinned(self, array: NDArray[Any]) -> bool:
        begin, size = array.ctypes.data, array.nbytes
        return any(0 <= begin - at <= m.nbytes - size for at, m in self._pinned.items())

    @_alone
    def stream(self) -> Stream:
        self.note("stream")
        self._streams[stream := Stream(self._handle())] = _Stream()
        return stream

    @_alone
    def close_stream(self, stream: Stream) -> None:
        self.note("close_stream", stream)
        self._drain(stream)
        del self._streams[stream]

    @_alone
    def synchronize(self, stream: Stream) -> None:
        self.note("synchronize", stream)
        if self._stream(stream).captured is not None:
            raise DeviceError("cuStreamSynchronize: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self._drain(stream)

    @_alone
    def upload(self, target: Address, source: NDArray[Any], stream: Stream) -> None:
        self.note("upload", target, source.nbytes, stream, self.is_pinned(source))
        self._check_host(source)
        if self._stream(stream).captured is not None:
            raise MisuseError("an upload from the host inside a capture")
        self.bytes_at(target, source.nbytes)
        host = self._host(source)

        def write() -> None:
            self.bytes_at(target, host.size)[:] = host.bytes()

        self.submit(stream, Work(write))

    @_alone
    def download(self, target: NDArray[Any], source: Address, stream: Stream) -> None:
        self.note("download", source, target.nbytes, stream, self.is_pinned(target))
        self._check_host(target)
        if self._stream(stream).captured is not None:
            raise MisuseError("a download to the host inside a capture")
        self.bytes_at(source, target.nbytes)
        host = self._host(target)

        def read() -> None:
            host.bytes()[:] = self.bytes_at(source, host.size)

        self.submit(stream, Work(read))

    @_alone
    def copy(self, target: Address, source: Address, size: int, stream: Stream) -> None:
        self.note("copy", target, source, size, stream)
        self.bytes_at(target, size)
        self.bytes_at(source, size)

        def move() -> None:
            self.bytes_at(target, size)[:] = self.bytes_at(source, size).copy()

        self.submit(stream, Work(move))

    @_alone
    def fill(self, target: Address, byte: int, size: int, stream: Stream) -> None:
        self.note("fill", target, byte, size, stream)
        self.bytes_at(target, size)
        self.submit(stream, Work(lambda: self.bytes_at(target, size).fill(byte)))

    @_alone
    def event(self) -> Event:
        self.note("event")
        self._events[event := Event(self._handle())] = 0
        return event

    @_alone
    def close_event(self, event: Event) -> None:
        self.note("close_event", event)
        self._ticket(event)
        del self._events[event]

    @_alone
    def record(self, event: Event, stream: Stream) -> None:
        self.note("record", event, stream)
        self._events[event] = ticket = self._ticket(event) + 1

        def passed() -> None:
            self._passed[event] = ticket

        self.submit(stream, Work(passed, event=event, ticket=ticket))

    @_alone
    def wait(self, stream: Stream, event: Event) -> None:
        self.note("wait", stream, event)
        ticket = self._ticket(event)
        self.submit(stream, Work(lambda: self._until(event, ticket)))

    @_alone
    def synchronize_event(self, event: Event) -> None:
        self.note("synchronize_event", event)
        self._until(event, self._ticket(event))

    @_alone
    def elapsed(self, begin: Event, end: Event) -> float:
        self.note("elapsed", begin, end)
        for event in (begin, end):
            if not (ticket := self._ticket(event)) or self._passed.get(event, 0) < ticket:
                raise DeviceError("cuEventElapsedTime: CUDA_ERROR_NOT_READY (device not ready)")
        return 0.001

    @_alone
    def begin_capture(self, stream: Stream) -> None:
        self.note("begin_capture", stream)
        if (state := self._stream(stream)).captured is not None:
            raise MisuseError("a capture inside a capture")
        state.captured = []

    @_alone
    def end_capture(self, stream: Stream) -> Graph:
        self.note("end_capture", stream)
        if (captured := self._stream(stream).captured) is None:
            raise MisuseError("no capture to end")
        self._stream(stream).captured = None
        self._graphs[graph := Graph(self._handle())] = captured
        return graph

    @_alone
    def launch(self, graph: Graph, stream: Stream) -> None:
        self.note("launch", graph, stream)
        if graph not in self._graphs:
            raise MisuseError("the graph is closed")
        for work in self._graphs[graph]:
            self.submit(stream, work)

    @_alone
    def close_graph(self, graph: Graph) -> None:
        self.note("close_graph", graph)
        if graph not in self._graphs:
            raise MisuseError("the graph is closed already")
        for stream in self._streams:
            self._drain(stream)
        del self._graphs[graph]

    @_alone
    def close(self) -> None:
        self.note("close")
        self.closed = True

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def _check_room(self, size: int) -> None:
        if size > self._total - self.used:
            raise DeviceError(
                f"cuMemAlloc of {size} bytes: CUDA_ERROR_OUT_OF_MEMORY (out of memory)"
            )

    def _no_capture(self, name: str) -> None:
        if self.capturing():
            raise MisuseError(f"{name} while a stream is captured")

    def _check_host(self, array: NDArray[Any]) -> None:
        if not array.flags.c_contiguous or not array.nbytes:
            raise MisuseError("a copy takes a contiguous array that is not empty")

    def _stream(self, stream: Stream) -> _Stream:
        if stream not in self._streams:
            raise MisuseError(f"there is no stream {stream}")
        return self._streams[stream]

    def _ticket(self, event: Event) -> int:
        if event not in self._events:
            raise MisuseError(f"there is no event {event}")
        return self._events[event]

    def _host(self, array: NDArray[Any]) -> HostMemory:
        """A piece of pinned memory, or what the caller holds."""
        for start, memory in self._pinned.items():
            if start <= array.ctypes.data < start + memory.nbytes:
                return HostMemory.of(array, partial(self._pinned.get, start))
        return HostMemory.of(array)

    @_alone
    def _drain(self, stream: Stream) -> None:
        queue = self._stream(stream).queue
        while queue:
            self._step(queue)

    def _step(self, queue: deque[Work]) -> None:
        queue.popleft().do()

    @_alone
    def _until(self, event: Event, ticket: int) -> None:
        """Let the stream go on in which the event was recorded, no further than that."""
        if self._passed.get(event, 0) >= ticket:
            return
        for state in list(self._streams.values()):
            if any(w.event == event and w.ticket == ticket for w in state.queue):
                while self._passed.get(event, 0) < ticket:
                    self._step(state.queue)
                return
