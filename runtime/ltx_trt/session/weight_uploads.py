"""Weights on their way to the card: all of them once, or those of the next block while one runs.

Three events keep the order:

    copied    of a piece of pinned memory: what was in it is on the card
    arrived   of a buffer: its block may run
    passed    of a buffer: its block has run, so it may be overwritten
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod

from ltx_engines import weight_inputs
from ltx_engines.engine_entry import EngineEntry
from ltx_trt.session.checkpoint_weights import CheckpointWeights
from ltx_trt.session.driver import Address, Bytes, Driver, Event, Stream
from ltx_trt.session.engine_api import EngineTensor
from ltx_trt.session.memory import aligned, allocate
from ltx_trt.session.residency import Rotation

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8e4m3fn": 1, "int8": 1}
"""Of one element of a weight."""

STAGING = 2
"""Pieces of pinned memory: one is filled while the other is copied."""

Patch = Callable[[str, Bytes], Bytes]
"""A tensor's name and its bytes in the checkpoint -> the bytes that are used (LoRA)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The buffer with an engine's weights: for each input the tensor that it takes, where it
    begins, and how many bytes it has."""

    places: Mapping[str, tuple[str, int, int]]
    size: int

    @classmethod
    def of(cls, entry: EngineEntry) -> "Layout":
        places, end = {}, 0
        for tensor in entry.inputs:
            if tensor.name in entry.bound:
                size = prod(int(axis) for axis in tensor.axes) * BYTES[tensor.dtype]
                places[tensor.name] = entry.bound[tensor.name], end, size
                end += aligned(size)
        return cls(places, end)

    def addresses(self, begin: Address) -> dict[str, Address]:
        return {name: Address(begin + at) for name, (_, at, _) in self.places.items()}


def check(source: CheckpointWeights, entry: EngineEntry) -> None:
    """
    Raises:
        UserError: a weight is not in the checkpoint, or of another type or shape.
    """
    tensors = {tensor.name: tensor for tensor in entry.inputs}
    for block in entry.blocks or (None,):
        for name, pattern in entry.bound.items():
            shape = tuple(int(axis) for axis in tensors[name].axes)
            wanted = EngineTensor(name, tensors[name].dtype, shape, True)
            source.check(weight_inputs.weight(pattern, block), wanted)


@dataclass(frozen=True, slots=True)
class _Staging:
    memory: Bytes
    copied: Event


class Uploads:
    """Copies weights on a stream of its own, by way of pinned memory."""

    def __init__(self, driver: Driver, source: CheckpointWeights, largest: int) -> None:
        self.driver, self._source = driver, source
        self.patch: Patch | None = None
        self._open, self._count = ExitStack(), 0
        try:
            self.stream = driver.stream()
            self._open.callback(driver.close_stream, self.stream)
            self._staging = [self._staged(largest) for _ in range(STAGING)]
        except BaseException:
            self._open.close()
            raise

    def copy(self, layout: Layout, block: int | None, target: Address) -> None:
        """The host waits only for what it is going to overwrite."""
        staging = self._staging[self._count % STAGING]
        self._count += 1
        self.driver.synchronize_event(staging.copied)
        for pattern, at, size in layout.places.values():
            name = weight_inputs.weight(pattern, block)
            stored = self._source(name)
            staging.memory[at : at + size] = (
                stored if self.patch is None else self.patch(name, stored)
            )
        self.driver.upload(target, staging.memory[: layout.size], self.stream)
        self.driver.record(staging.copied, self.stream)

    def close(self) -> None:
        self._open.callback(self.driver.synchronize, self.stream)
        self._open.close()

    def _staged(self, size: int) -> _Staging:
        memory = self.driver.pinned(size)
        self._open.callback(self.driver.unpin, memory)
        copied = self.driver.event()
        self._open.callback(self.driver.close_event, copied)
        return _Staging(memory, copied)


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Room for the weights of any block."""

    address: Address
    arrived: Event
    passed: Event


class BlockWeights:
    """The weights of as many blocks as `rotation` has places for; it says which gives way."""

    def __init__(self, uploads: Uploads, layouts: Sequence[Layout], rotation: Rotation) -> None:
        if rotation.parts != len(layouts):
            raise ValueError(f"{len(layouts)} blocks, a rotation of {rotation.parts}")
        self._uploads, self._layouts, self._rotation = uploads, layouts, rotation
        self._held: dict[int, _Buffer] = {}
        self._open = ExitStack()
        room = max(layout.size for layout in layouts)
        try:
            for block in sorted(rotation.held):
                size = room if self.streamed else layouts[block].size
                self._held[block] = self._buffer(size)
        except BaseException:
            self._open.close()
            raise

    @property
    def streamed(self) -> bool:
        return self._rotation.places < len(self._layouts)

    def load(self) -> None:
        """Whatever has a place now, anew."""
        for block in sorted(self._held):
            self._bring(block)

    def take(self, block: int, stream: Stream) -> dict[str, Address]:
        """Where they are, or will be when the stream comes to what is enqueued next."""
        buffer = self._held[block]
        if self.streamed:
            self._uploads.driver.wait(stream, buffer.arrived)
        return self._layouts[block].addresses(buffer.address)

    def release(self, block: int, stream: Stream) -> None:
        """The block is enqueued; the next one's weights come while it runs. After the last one
        the first is not needed any more, unless there is another pass."""
        if self.streamed:
            self._uploads.driver.record(self._held[block].passed, stream)
            if block + 1 < len(self._layouts):
                self.fetch(block + 1, block)

    def fetch(self, wanted: int, running: int) -> None:
        if swap := self._rotation.toward(wanted, running):
            last, _ = swap
            self._held[wanted] = self._held.pop(last)
            self._bring(wanted)

    def close(self) -> None:
        self._open.close()

    def _bring(self, block: int) -> None:
        uploads, buffer = self._uploads, self._held[block]
        uploads.driver.wait(uploads.stream, buffer.passed)
        uploads.copy(self._layouts[block], block, buffer.address)
        uploads.driver.record(buffer.arrived, uploads.stream)

    def _buffer(self, size: int) -> _Buffer:
        driver = self._uploads.driver
        address = allocate(driver, size, "the weights of a block")
        self._open.callback(driver.free, address)
        return _Buffer(address, self._event(), self._event())

    def _event(self) -> Event:
        event = self._uploads.driver.event()
        self._open.callback(self._uploads.driver.close_event, event)
        return event
