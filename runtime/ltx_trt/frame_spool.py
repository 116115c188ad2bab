"""A clip's frames on the disk while it is made: two of them are compared in little memory."""

from tempfile import TemporaryFile
from typing import Self

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


class FrameSpool:
    """From `with` to its end, when the file is gone."""

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._size: tuple[int, ...] = ()
        self._count = 0

    def add(self, frames: Frames) -> None:
        """The next ones, [n, H, W, 3]."""
        self._file.write(np.ascontiguousarray(frames).data)
        self._size, self._count = frames.shape[1:], self._count + len(frames)

    def clip(self) -> Frames:
        """All so far, mapped: read where they are looked at."""
        self._file.flush()
        return np.memmap(self._file, np.uint8, mode="r", shape=(self._count, *self._size))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
