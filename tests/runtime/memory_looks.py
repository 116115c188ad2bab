"""Memory that is seen: a test holds it until a HostWatch has looked."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ltx_trt.host_memory import HostWatch
from tests.waiting import until


@contextmanager
def taken(size: int) -> Iterator[None]:
    """The system's own pages, given back to it at the end: what malloc keeps of other tests, and
    gives again, would not be seen."""
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        yield


class Looks:
    """Counts those of all watches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._count = 0
        look = HostWatch.look

        def counted(watch: HostWatch) -> None:
            look(watch)
            self._count += 1

        monkeypatch.setattr(HostWatch, "look", counted)

    def wait(self) -> None:
        """Until one has begun from now on, and ended: the next to end may have begun before."""
        before = self._count
        until(lambda: self._count >= before + 2, "two looks at the memory")
