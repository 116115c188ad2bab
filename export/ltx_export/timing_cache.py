"""Times that TensorRT has measured of its kernels, kept for the next engine on the same GPU.

One file for each GPU model and version of TensorRT. Several builds may end at once: each adds what
it has measured to what is in the file by then, under a lock.
"""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from platformdirs import user_cache_dir

from ltx_engines import file_lock

log = logging.getLogger(__name__)


def place(version: str, model: str) -> Path:
    """Of the file for this version of TensorRT and this model of GPU."""
    word = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    return Path(user_cache_dir("ltx-trt")) / "timing" / f"tensorrt-{version}-{word}.cache"


def use(config: Any, path: Path) -> None:
    """Let a build begin with what the file knows. One that does not fit is left out and said."""
    if not config.set_timing_cache(config.create_timing_cache(_read(path)), False):
        log.warning("%s is not a timing cache of this GPU; it is made anew", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def save(config: Any, path: Path) -> None:
    """Add what a build has measured to the file."""
    measured = config.get_timing_cache()
    if measured is None:
        return
    with _alone(path.parent):
        known = config.create_timing_cache(_read(path))
        if not known.combine(measured, False):  # the file is of another GPU, or damaged
            known = measured
        partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
        try:
            partial.write_bytes(memoryview(known.serialize()))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with file_lock.alone(folder) as alone:
            if alone:
                yield
                return
        time.sleep(PAUSE)


PAUSE = 0.01
"""Seconds between two attempts: whoever has the lock has it for milliseconds."""
