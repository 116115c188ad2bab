"""Memory of the GPU that is held for the whole run: one block of activations, and named buffers.

Both only grow, so that addresses stay what a captured graph has noted; `revision` says when they
did not. Before a block goes, the streams whose work lies in it are waited for.
"""

import logging
from collections.abc import Iterable
from threading import RLock
from types import TracebackType
from typing import Self

from ltx_engines import byte_sizes
from ltx_engines.errors import UserError
from ltx_trt.session.driver import Address, DeviceError, Driver, Stream

log = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes. What `Driver.allocate` promises, and TensorRT wants of every address."""


class Arena:
    """One block of activations for all runners of a device, of which one runs at a time.

    `streams` are those on which that work is enqueued.
    """

    def __init__(self, driver: Driver, *streams: Stream) -> None:
        self._blocks = Buffers(driver, *streams)

    @property
    def size(self) -> int:
        """Bytes that are reserved now."""
        return self._blocks.size("activations")

    @property
    def revision(self) -> int:
        """Counts how often the block moved: whatever was captured before is stale."""
        return self._blocks.revision

    def reserve(self, size: int) -> Address:
        """A block of at least `size` bytes, from now on at this address.

        Raises:
            UserError: the GPU has not that much.
        """
        return self._blocks.get("activations", size)

    def close(self) -> None:
        self._blocks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Buffers:
    """Device buffers by name, for several threads. What was in one is lost when it grows."""

    def __init__(self, driver: Driver, *streams: Stream) -> None:
        self._driver, self._streams = driver, streams
        self._lock = RLock()
        self._blocks: dict[str, tuple[Address, int]] = {}
        self._revision = 0

    @property
    def revision(self) -> int:
        """Counts how often a buffer moved: whatever was captured before is stale."""
        return self._revision

    @property
    def total(self) -> int:
        return sum(size for _, size in self._blocks.values())

    def size(self, name: str) -> int:
        return self._blocks[name][1] if name in self._blocks else 0

    def get(self, name: str, size: int) -> Address:
        """The buffer of that name, of at least `size` bytes.

        Raises:
            UserError: the GPU has not that much.
        """
        with self._lock:
            if name in self._blocks and size <= self._blocks[name][1]:
                return self._blocks[name][0]
            self._free([name])
            address = allocate(self._driver, rounded := aligned(size), name)
            self._blocks[name] = (address, rounded)
            return address

    def close(self) -> None:
        with self._lock:
            self._free(list(self._blocks))

    def _free(self, names: Iterable[str]) -> None:
        """The old block goes before the new one comes: both might not fit."""
        names = [name for name in names if name in self._blocks]
        if not names:
            return
        for stream in self._streams:
            self._driver.synchronize(stream)
        self._revision += 1
        for name in names:
            address, _ = self._blocks.pop(name)
            self._driver.free(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Watch:
    """How much of the card was in use at most, by whoever, where somebody looked."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._before = self._least = driver.memory()[0]

    def look(self) -> None:
        """A gauge only: a GPU that has failed says so at the next call that does something."""
        try:
            self._least = min(self._least, self._driver.memory()[0])
        except DeviceError as error:
            log.debug("the GPU's memory cannot be read: %s", error)

    @property
    def peak(self) -> int:
        """Bytes beside those that were in use when the watch began."""
        return self._before - self._least


def aligned(size: int) -> int:
    """The next multiple of the alignment, never 0."""
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


def allocate(driver: Driver, size: int, what: str) -> Address:
    """
    Raises:
        UserError: the GPU has not that much.
        DeviceError: it refused for another reason.
    """
    try:
        return driver.allocate(size)
    except DeviceError as error:
        if "OUT_OF_MEMORY" not in str(error):
            raise
        raise out_of_memory(driver, size, what) from error


def out_of_memory(driver: Driver, size: int, what: str) -> UserError:
    free, total = driver.memory()
    return UserError(
        f"{driver.name} has no room for {what}: wanted {byte_sizes.said(size)}, free are "
        f"{byte_sizes.said(free)} of {byte_sizes.said(total)}; make the clip smaller or shorter, "
        "have one stage there at a time (--memory staged), or let weights be streamed with a "
        "smaller --device-memory"
    )
