"""A stage whose blocks are in several engines: they run in order, and those that do not fit on the
card come while others run and go when their work is done.

Tensors between parts stay on the device, each in its place: what one part writes the next ones
read. A part writes where nobody reads any more, so the hidden states go to and fro between two
buffers; what all parts share (positions, text, modulation) is written once.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from typing import Protocol, runtime_checkable

from ltx_engines.bundle import TensorEntry
from ltx_engines.errors import UserError
from ltx_trt.session.closing import close_all
from ltx_trt.session.driver import Address, DeviceError, Driver, Event, Stream
from ltx_trt.session.element_types import stored
from ltx_trt.session.engine_api import EngineError, EngineTensor, Shape
from ltx_trt.session.memory import Buffers
from ltx_trt.session.residency import Rotation
from ltx_trt.session.runner import Runner

log = logging.getLogger(__name__)

AGAIN = "build it again (ltx-export build-engine)"


class Table(Protocol):
    """What an engine reads and writes, as the manifest has it."""

    @property
    def inputs(self) -> tuple[TensorEntry, ...]: ...

    @property
    def outputs(self) -> tuple[TensorEntry, ...]: ...


@runtime_checkable
class Sleeps(Protocol):
    """A runner whose weights can leave the card while its contexts stay as they are (TensorRT-RTX
    from 1.7); others are closed and loaded again."""

    def sleep(self) -> bool:
        """False if this one cannot. Its work has been waited for."""
        ...

    def wake(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Link:
    """One part: what it reads and writes, and how its weights come to the card.

    `load` is called in another thread when weights are streamed.
    """

    name: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    load: Callable[[], Runner]


@dataclass(frozen=True, slots=True)
class Binding:
    """Of every tensor of every part."""

    shapes: Mapping[str, Shape]
    addresses: Mapping[str, Address]


@dataclass(slots=True)
class Loaded:
    """A part on the card, and what it was bound to."""

    runner: Runner
    binding: Binding | None = None


class ChainRunner:
    """Implements Runner. `rotation` says how many parts are on the card at once."""

    def __init__(self, driver: Driver, links: Sequence[Link], rotation: Rotation) -> None:
        self._driver, self._links, self._rotation = driver, tuple(links), rotation
        self._slots = slots(self._links)
        self._tensors = ends(self._links)
        self._buffers = Buffers(driver)
        self._streams = rotation.places < len(links)
        self._loader = ThreadPoolExecutor(1, "weights") if self._streams else None
        self._done: list[Event] = []
        self._loaded: dict[int, Future[Loaded]] = {}
        self._asleep: dict[int, Loaded] = {}
        self._leaving: list[Loaded] = []
        self._told: set[int] = set()
        self._binding: Binding | None = None
        self._stream: Stream | None = None
        self._seen: set[int] = set()
        try:
            for _ in links if self._streams else ():
                self._done.append(driver.event())
            for part in sorted(rotation.held):
                self._loaded[part] = at_hand(self._load(part))
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> Mapping[str, EngineTensor]:
        return self._tensors

    @property
    def capturable(self) -> bool:
        here = (future.result().runner for future in self._loaded.values())
        return not self._streams and all(runner.capturable for runner in here)

    def bind(self, shapes: Mapping[str, Shape], addresses: Mapping[str, Address]) -> None:
        self._settle()
        sizes = self._axes(shapes)
        every = {t.name: t for link in self._links for t in (*link.inputs, *link.outputs)}
        whole = {
            name: tuple(a if isinstance(a, int) else sizes[a] for a in tensor.axes)
            for name, tensor in every.items()
        }
        places = {
            name: self._buffers.get(slot, prod(whole[name]) * stored(every[name].dtype).itemsize)
            for name, slot in self._slots.items()
        }
        binding = Binding(whole, {**addresses, **places})
        if binding != self._binding:
            self._binding = binding
            self._seen.clear()
        for part in sorted(self._loaded):
            self._ready(part)

    def enqueue(self, stream: Stream) -> None:
        if self._binding is None:
            raise ValueError("a chain is bound before it is enqueued")
        self._stream = stream
        last = len(self._links) - 1
        self._fetch(0, last)  # while the last pass ends: before, it may not be needed any more
        for part in range(len(self._links)):
            runner = self._ready(part)
            with told(self._links[part].name):
                runner.enqueue(stream)
            if self._streams:
                self._driver.record(self._done[part], stream)
                if part < last:
                    self._fetch(part + 1, part)

    def close(self) -> None:
        """Waits for a part that is being loaded, and for the work of all of them."""
        if self._loader is not None:
            self._loader.shutdown()
        awake = [f.result() for f in self._loaded.values() if f.exception() is None]
        for part, future in self._loaded.items():
            if (error := future.exception()) is not None and part not in self._told:
                log.warning("nobody waited for it, but: %s", error)
        steps: list[Callable[[], None]] = []
        if self._stream is not None:
            steps.append(partial(self._driver.synchronize, self._stream))
        steps += [partial(self._driver.close_event, event) for event in self._done]
        idle = *awake, *self._asleep.values(), *self._leaving
        steps += [loaded.runner.close for loaded in idle]
        steps.append(self._buffers.close)
        self._done, self._loaded, self._asleep, self._leaving = [], {}, {}, []
        self._loader = self._stream = None
        close_all(steps)

    def _fetch(self, wanted: int, running: int) -> None:
        """Have the next part loaded, in the place of the one that is needed last."""
        if swap := self._rotation.toward(wanted, running):
            last, _ = swap
            assert self._loader is not None
            going = self._loaded.pop(last)
            self._loaded[wanted] = self._loader.submit(self._swap, last, going, wanted)

    def _swap(self, last: int, going: Future[Loaded], wanted: int) -> Loaded:
        """In the loader's thread. What was loaded before may still be at work."""
        old = going.result()
        try:
            self._driver.synchronize_event(self._done[last])
            stays = isinstance(old.runner, Sleeps) and old.runner.sleep()
        except BaseException:
            self._leaving.append(old)  # its work may be queued still
            raise
        if stays:
            self._asleep[last] = old
        else:
            old.runner.close()
        return self._load(wanted)

    def _load(self, part: int) -> Loaded:
        """A part that was bound to this before finds the arena large enough, so it is bound here;
        where it may have to grow, `_ready` does it, between the work that uses it."""
        link, loaded = self._links[part], self._asleep.pop(part, None)
        with told(link.name):
            if fresh := loaded is None:
                loaded = Loaded(link.load())
            try:
                if fresh:
                    check(link, loaded.runner.tensors)
                elif isinstance(loaded.runner, Sleeps):
                    loaded.runner.wake()
                if part in self._seen:
                    self._bind(part, loaded)
            except BaseException:
                loaded.runner.close()
                raise
        return loaded

    def _ready(self, part: int) -> Runner:
        """The part, loaded and bound; errors of its loading come from here."""
        loaded = self._result(part)
        with told(self._links[part].name):
            self._bind(part, loaded)
        self._seen.add(part)
        return loaded.runner

    def _bind(self, part: int, loaded: Loaded) -> None:
        """Unless it is bound as it should be."""
        link, binding = self._links[part], self._binding
        if binding is None or loaded.binding is binding:
            return
        loaded.runner.bind(
            {tensor.name: binding.shapes[tensor.name] for tensor in link.inputs},
            {t.name: binding.addresses[t.name] for t in (*link.inputs, *link.outputs)},
        )
        loaded.binding = binding

    def _settle(self) -> None:
        """Nothing is being loaded, and no work reads the buffers between the parts."""
        for part in self._loaded:
            self._result(part)
        if self._stream is not None:
            self._driver.synchronize(self._stream)

    def _result(self, part: int) -> Loaded:
        try:
            return self._loaded[part].result()
        except Exception:  # not Ctrl-C, which is no word of the part's
            self._told.add(part)
            raise

    def _axes(self, shapes: Mapping[str, Shape]) -> dict[str, int]:
        if (wanted := {t.name for t in self._tensors.values() if t.is_input}) != shapes.keys():
            raise ValueError(f"shapes of {sorted(shapes)}, wanted of {sorted(wanted)}")
        sizes: dict[str, int] = {}
        for tensor in chain.from_iterable(link.inputs for link in self._links):
            if tensor.name in shapes:
                for axis, size in zip(tensor.axes, shapes[tensor.name], strict=True):
                    if sizes.setdefault(str(axis), size) != size:
                        raise ValueError(f"{tensor.name}: {axis} is {size} and {sizes[str(axis)]}")
        return sizes


def ends(links: Sequence[Link]) -> dict[str, EngineTensor]:
    """The tensors of the whole chain: what no part writes, and what no part reads.

    Raises:
        UserError: a part reads what only a later one writes, two write the same, or one does not
            read what was written as it is.
    """
    first: dict[str, TensorEntry] = {}
    for tensor in (t for link in links for t in (*link.outputs, *link.inputs)):
        if (other := first.setdefault(tensor.name, tensor)) != tensor:
            found = f"{_said(other)} in one part and {_said(tensor)} in another"
            raise UserError(f"{tensor.name} is {found}; {AGAIN}")
    read = {tensor.name: tensor for link in links for tensor in link.inputs}
    written: set[str] = set()
    for link in links:
        names = {tensor.name for tensor in link.outputs}
        later = {t.name for other in links for t in other.outputs} - written
        if twice := sorted(names & written):
            raise UserError(f"{link.name} writes {', '.join(twice)} again; {AGAIN}")
        if early := sorted({tensor.name for tensor in link.inputs} & later):
            raise UserError(f"{link.name} reads {', '.join(early)}, written later; {AGAIN}")
        written |= names
    inputs = [tensor for name, tensor in read.items() if name not in written]
    known = {axis for tensor in inputs for axis in tensor.axes}
    for tensor in (t for link in links for t in link.outputs):
        if unknown := [axis for axis in tensor.axes if isinstance(axis, str) and axis not in known]:
            raise UserError(f"{tensor.name} has an axis {unknown[0]} that no input has; {AGAIN}")
    outputs = [t for link in links for t in link.outputs if t.name not in read]
    return {
        tensor.name: engine_tensor(tensor, is_input)
        for tensors, is_input in ((inputs, True), (outputs, False))
        for tensor in tensors
    }


def _said(tensor: TensorEntry) -> str:
    return f"{tensor.dtype} {' x '.join(map(str, tensor.axes))}"


def slots(links: Sequence[Table]) -> dict[str, str]:
    """A buffer's name for each tensor between parts.

    Two tensors of one shape share it if the part that writes the second comes after all that read
    the first.
    """
    last = {tensor.name: part for part, link in enumerate(links) for tensor in link.inputs}
    free_after: dict[str, int] = {}
    found: dict[str, str] = {}
    for part, link in enumerate(links):
        for tensor in link.outputs:
            if tensor.name not in last:
                continue
            names = (f"{_said(tensor)}, buffer {number}" for number in range(len(found) + 1))
            found[tensor.name] = name = next(n for n in names if free_after.get(n, -1) < part)
            free_after[name] = last[tensor.name]
    return found


def engine_tensor(tensor: TensorEntry, is_input: bool) -> EngineTensor:
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in tensor.axes)
    return EngineTensor(tensor.name, tensor.dtype, shape, is_input)


def check(link: Link, found: Mapping[str, EngineTensor]) -> None:
    """The engine that was loaded is the one that the manifest speaks of: buffers are made by it."""
    wanted = {t.name: t.dtype for t in (*link.inputs, *link.outputs)}
    if (has := {name: tensor.dtype for name, tensor in found.items()}) != wanted:
        differ = sorted(name for name, _ in wanted.items() ^ has.items())
        raise UserError(f"the manifest and the engine differ in {', '.join(differ)}; {AGAIN}")


def at_hand(loaded: Loaded) -> Future[Loaded]:
    future: Future[Loaded] = Future()
    future.set_result(loaded)
    return future


@contextmanager
def told(part: str) -> Iterator[None]:
    """Errors name the part, in whatever thread they came up."""
    try:
        yield
    except (DeviceError, EngineError, UserError) as error:
        raise type(error)(f"{part}: {error}") from error
