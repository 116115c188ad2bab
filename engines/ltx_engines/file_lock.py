"""One process at a time: a lock that the system gives back, however its holder ends.

    alone(folder)     a folder that stays: POSIX locks the folder itself
    beside(target)    whatever has that name, or will have it: the lock is a file beside it, since
                      a lock of the thing itself goes away with it when another takes its place

Windows has locks of files only, so a file in the temporary folder stands for both there.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EROFS
from pathlib import Path

from ltx_engines.errors import UserError

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


@contextmanager
def building(out: Path) -> Iterator[None]:
    """For the one process that makes a bundle there, from first to last.

    Raises:
        UserError: another one does.
    """
    with beside(out) as free:
        if not free:
            raise UserError(f"{out} is being built by another process; wait for it")
        yield


@contextmanager
def beside(target: Path) -> Iterator[bool]:
    """Whether this process has what is at `target`, or will be, for itself until the block ends.

    The lock's file and folders that were made for it are gone afterwards. Where nothing can be
    written there is nothing to be kept apart.
    """
    whole = Path(os.path.realpath(target))
    if sys.platform == "win32":
        with alone(whole) as free:
            yield free
        return
    made = _make(whole.parent)
    place = whole.with_name(f".{whole.name}.lock")
    handle, free = None, True
    try:
        try:
            handle = _held(place)
        except BlockingIOError:
            free = False
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno != EROFS:
                raise
        yield free
    finally:
        if handle is not None:
            with suppress(OSError):
                place.unlink()  # while it is held: whoever has opened it sees that it is gone
            os.close(handle)
        for folder in made:
            with suppress(OSError):  # it is in use by now
                folder.rmdir()


def _make(folder: Path) -> list[Path]:
    """The folders that were not there, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _held(place: Path) -> int:
    """
    Raises:
        BlockingIOError: another process has it.
    """
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
            if _is_at(handle, place):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the one before us has removed it since we opened it


def _is_at(handle: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), place.stat())
    except FileNotFoundError:
        return False
