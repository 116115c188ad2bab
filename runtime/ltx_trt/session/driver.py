"""What the runtime asks of a GPU: memory, copies, streams, events and graphs, by plain numbers.

`cuda_driver.py` answers with cuda-python; the tests answer with memory of their own, in which they
check every address. Addresses and sizes are in bytes; a stream, an event and a graph are handles.
"""

from typing import Any, NewType, Protocol

import numpy as np
from numpy.typing import NDArray

Address = NewType("Address", int)
Stream = NewType("Stream", int)
Event = NewType("Event", int)
Graph = NewType("Graph", int)

Bytes = NDArray[np.uint8]


class DeviceError(Exception):
    """A call that the GPU refused: what was asked, the code's name and its words."""


class Driver(Protocol):
    """One GPU and its primary context. Every method raises DeviceError when the GPU refuses."""

    @property
    def name(self) -> str: ...

    @property
    def capability(self) -> int:
        """89 for SM89."""
        ...

    def memory(self) -> tuple[int, int]:
        """What is free now, and all there is."""
        ...

    def allocate(self, size: int) -> Address:
        """Aligned to 256 bytes; `size` is above 0."""
        ...

    def free(self, address: Address) -> None: ...

    def pinned(self, size: int) -> Bytes:
        """Host memory that copies reach without a detour, until `unpin`."""
        ...

    def unpin(self, memory: Bytes) -> None: ...

    def stream(self) -> Stream: ...

    def close_stream(self, stream: Stream) -> None: ...

    def synchronize(self, stream: Stream) -> None: ...

    def upload(self, target: Address, source: NDArray[Any], stream: Stream) -> None:
        """A contiguous array; the caller keeps it until the stream has passed."""
        ...

    def download(self, target: NDArray[Any], source: Address, stream: Stream) -> None: ...

    def copy(self, target: Address, source: Address, size: int, stream: Stream) -> None:
        """From device to device."""
        ...

    def fill(self, target: Address, byte: int, size: int, stream: Stream) -> None: ...

    def event(self) -> Event: ...

    def close_event(self, event: Event) -> None: ...

    def record(self, event: Event, stream: Stream) -> None: ...

    def wait(self, stream: Stream, event: Event) -> None:
        """What comes next on the stream waits for the event; the host does not."""
        ...

    def synchronize_event(self, event: Event) -> None:
        """The host waits."""
        ...

    def elapsed(self, begin: Event, end: Event) -> float:
        """Seconds between two events that have passed."""
        ...

    def begin_capture(self, stream: Stream) -> None: ...

    def end_capture(self, stream: Stream) -> Graph: ...

    def launch(self, graph: Graph, stream: Stream) -> None: ...

    def close_graph(self, graph: Graph) -> None: ...

    def close(self) -> None: ...
