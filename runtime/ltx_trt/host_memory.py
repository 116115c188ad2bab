"""How much of the host's memory a clip took, as far as the system says so.

What is resident holds pages of files, such as mapped weights, which the system takes back when
somebody else wants the room. What is anonymous is the process' own, and nobody can take it back.
"""

import os
import re
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

INTERVAL = 0.02
"""Seconds. What comes and goes in less is not seen, but for the peak that the system counts."""

PROCESS = Path("/proc/self")

RESET = b"5"
"""Written to clear_refs, sets the peak that the system counts to what is there now (proc(5))."""


class HostWatch:
    """From `with` to its end: the most that the process had meanwhile, whatever it had before; None
    where the system does not say. One at a time, for the system counts one peak."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self._interval, self._done = interval, Event()
        self._thread = Thread(target=self._look_on, name="host memory", daemon=True)
        self._counted = False
        self.resident: int | None = None
        self.anonymous: int | None = None

    def look(self) -> None:
        if (now := in_memory()) is not None:
            self.resident = max(now[0], self.resident or 0)
            self.anonymous = max(now[1], self.anonymous or 0)

    def _look_on(self) -> None:
        while not self._done.wait(self._interval):
            self.look()

    def __enter__(self) -> Self:
        self._counted = reset_peak()
        self.look()
        if self.anonymous is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self.look()
        if self._counted and (peak := peak_resident()) is not None:
            self.resident = max(peak, self.resident or 0)


def in_memory() -> tuple[int, int] | None:
    """Bytes now: all pages, and those that are neither a file's nor shared."""
    try:
        _, resident, shared, *_ = map(int, (PROCESS / "statm").read_text().split())
    except OSError:
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    return resident * page, (resident - shared) * page


def reset_peak() -> bool:
    """Whether `peak_resident` counts from now on."""
    try:  # only to be written, and not to be made where there is no such file
        file = os.open(PROCESS / "clear_refs", os.O_WRONLY)
    except OSError:
        return False
    try:
        return os.write(file, RESET) == len(RESET)
    except OSError:
        return False
    finally:
        os.close(file)


def peak_resident() -> int | None:
    """Bytes at most, since `reset_peak` or the process began."""
    try:
        status = (PROCESS / "status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None
