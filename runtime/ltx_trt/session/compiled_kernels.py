"""Kernels that TensorRT-RTX has compiled on this machine, kept in files for the next start.

The library checks a file against GPU, driver and its own version before it uses it; the name is
made of the first two, so that no two machines that share a home take turns in one file.
"""

import logging
import os
import re
from pathlib import Path
from uuid import uuid4

from platformdirs import user_cache_dir

from ltx_engines.file_lock import alone

log = logging.getLogger(__name__)


def place(engine: str, gpu: str, version: str) -> Path:
    """Of the file for an engine, known by its sha256, on a model of GPU."""
    model = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    name = f"{engine[:32]}.{model}.{version}.cache"
    return Path(user_cache_dir("ltx-trt")) / "kernels" / name


def read(path: Path) -> bytes:
    """Nothing if there is none, or none that can be read: kernels can be compiled again."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        log.warning("compiled kernels are not read: %s", error)
        return b""


def write(path: Path, data: bytes) -> None:
    """In one rename: whoever starts meanwhile reads the old file or the new one. Another process
    that is writing here knows the same kernels, or writes ours at its next end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    with alone(path.parent) as free:
        if not free:
            return
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
