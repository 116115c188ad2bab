"""Waiting for what must come, on a machine of any speed and however busy."""

import time
from collections.abc import Callable

HANG = 300.0
"""Seconds after which nothing more is hoped for; no measure of speed."""


def until(seen: Callable[[], object], what: str) -> None:
    """`what` is said when it does not come."""
    deadline = time.monotonic() + HANG
    while not seen():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {HANG:g} s: {what}")
        time.sleep(0.005)
