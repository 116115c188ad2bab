"""What waits in a stream of the fake GPU, and what it says of mistakes."""

from collections.abc import Callable
from dataclasses import dataclass

from ltx_trt.session.driver import Event


class MisuseError(AssertionError):
    """What would be silent garbage, or the process's end, on a GPU."""


@dataclass(slots=True)
class Work:
    """What a stream will do. `owner` is the context that does it, `block` its activations."""

    do: Callable[[], None]
    owner: object = None
    block: range = range(0)
    event: Event | None = None
    ticket: int = 0
