"""Work that is a generator, done at once."""

from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")


def finish(work: Generator[Any, None, T]) -> T:
    """Do all of it without looking at its progress."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
