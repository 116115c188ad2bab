"""What a process costs: its seconds, from start to end, and the most memory it ever held.

The kernel counts the parent's memory into a child that has not yet become another program, so
whoever measures with this module imports nothing heavy.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Self

INTERVAL = 0.01
"""Seconds between two looks at a process's memory."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds and bytes. Resident memory counts mapped files' pages, anonymous memory does not."""

    wall_s: float
    cpu_s: float
    peak_rss: int
    peak_anon: int

    def row(self) -> dict[str, Any]:
        return {key: round(value, 2) for key, value in asdict(self).items()}


class ChildError(Exception):
    """A child that ended with another code than 0; the text ends with what it said."""


class AnonWatch:
    """Samples a process's anonymous memory while the `with` lasts; `peak` in bytes."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self.peak = max((self.peak, *map(anonymous, self._watched())))
            if self._done.wait(INTERVAL):
                return

    def _watched(self) -> list[int]:
        return [self._pid]


class ChildrenWatch(AnonWatch):
    """As AnonWatch, of the processes that the process has started, each for itself."""

    def _watched(self) -> list[int]:
        try:
            words = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return []
        return list(map(int, words.split()))


def anonymous(pid: int) -> int:
    """RssAnon in bytes; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def run(command: Sequence[str | Path], watched: type[AnonWatch] = AnonWatch) -> tuple[Cost, str]:
    """Run to the end. The cost, and what it wrote to stdout.

    Raises:
        ChildError: the exit code is not 0.
    """
    words = [str(word) for word in command]
    with TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(words, stdout=out, stderr=errors)
        try:
            with watched(process.pid) as watch:
                _, status, usage = os.wait4(process.pid, 0)
                seconds = time.perf_counter() - start
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        said, complaint = _text(out), _text(errors)
    if process.returncode:
        tail = " | ".join(complaint.strip().splitlines()[-3:])
        raise ChildError(f"{' '.join(words)} ended with {process.returncode}: {tail}")
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(seconds, cpu, usage.ru_maxrss * 1024, watch.peak), said


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
