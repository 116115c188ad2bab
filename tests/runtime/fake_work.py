"""What waits in a stream of the fake GPU, and what it says of mistakes."""

import ctypes
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ltx_trt.session.driver import Event

ALIGNMENT = 256


class MisuseError(AssertionError):
    """What would be silent garbage, or the process's end, on a GPU."""


@dataclass(slots=True)
class Failure:
    """Of a call, when it has succeeded `after` times more; with `stays` of every call since."""

    after: int
    error: Exception
    stays: bool


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Where a copy reads or writes, without holding on to it: a GPU does not either."""

    address: int
    size: int
    alive: Callable[[], object]

    @classmethod
    def of(cls, array: NDArray[Any], alive: Callable[[], object] | None = None) -> Self:
        """`alive` gives None when it is freed; else that is when nobody has the array any more, or
        what it is a view of."""
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return cls(array.ctypes.data, array.nbytes, alive or weakref.ref(owner))

    def bytes(self) -> NDArray[np.uint8]:
        if self.alive() is None:
            raise MisuseError("a copy from or to the host's memory, which is freed")
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.address))


@dataclass(slots=True)
class Work:
    """What a stream will do. `owner` is the context that does it, `block` its activations."""

    do: Callable[[], None]
    owner: object = None
    block: range = range(0)
    event: Event | None = None
    ticket: int = 0


def checked(addresses: Iterable[int]) -> None:
    for address in addresses:
        if address % ALIGNMENT:
            raise MisuseError(f"{address:#x} is not a multiple of {ALIGNMENT}")
