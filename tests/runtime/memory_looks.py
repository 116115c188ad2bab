"""Counts how often a HostWatch looks, so that a test holds its memory until it has been seen."""

import pytest

from ltx_trt.host_memory import HostWatch
from tests.waiting import until


class Looks:
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
