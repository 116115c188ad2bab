"""One process at a time: a lock that the system gives back, however its holder ends.

POSIX locks the folder itself. Windows has locks of files only, so a file in the temporary folder
stands for it there.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _open(folder: Path) -> int:
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        return os.open(Path(tempfile.gettempdir()) / f"ltx-{name}.lock", os.O_RDWR | os.O_CREAT)

    def _lock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _open(folder: Path) -> int:
        return os.open(folder, os.O_RDONLY)

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder for itself now, until the block ends."""
    handle = _open(folder)
    try:
        try:
            _lock(handle)
        except OSError:  # BlockingIOError of POSIX, PermissionError of Windows
            yield False
        else:
            yield True
    finally:
        os.close(handle)
