"""What the machine has left: memory that a process can take, and room on a disk."""

import os
import shutil
from pathlib import Path

MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")
"""Of the container's own limits, in the second version of control groups."""


def free_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say."""
    found = [size for size in (_of_system(), _of_group()) if size is not None]
    return min(found, default=None)


def free_disk(folder: Path) -> int:
    """Bytes on the disk of a folder that there is, or of the nearest one above it."""
    place = Path(os.path.realpath(folder))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _of_system() -> int | None:
    try:
        lines = MEMORY.read_text().splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1024 if kilobytes else None


def _of_group() -> int | None:
    """A limit, less what is used of it; pages of files that nobody uses are given back."""
    try:
        limit = (GROUP / "memory.max").read_text().strip()
        used = int((GROUP / "memory.current").read_text())
        lines = (GROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return None
    files = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return None if limit == "max" else max(int(limit) - used + files, 0)
