"""Where a clip's frames go as they come: into its file, a contact sheet, and a sum over all."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Self

import numpy as np

from ltx_trt import media

Take = Callable[[media.Frames], None]


@dataclass(frozen=True, slots=True)
class Destination:
    """`tap` is given all frames too, in order."""

    output: media.Output
    frame_rate: float
    frames: int
    contact_sheet: Path | None = None
    tap: Take | None = None


class Delivery:
    """From `with` to its end, which writes the files if all went well."""

    def __init__(self, destination: Destination) -> None:
        self._to = destination
        self._writer = media.Writer(destination.output, destination.frame_rate)
        self._shown = media.shown(destination.frames)
        self._kept: list[media.Frames] = []
        self._hash, self._count = sha256(), 0
        self.seconds = 0.0

    @property
    def sha256(self) -> str:
        """Of the frames' bytes, before any encoding."""
        return self._hash.hexdigest()

    def add(self, frames: media.Frames) -> None:
        """The next ones, [n, height, width, 3]."""
        self._hash.update(np.ascontiguousarray(frames).data)
        if self._to.contact_sheet is not None:
            places = range(self._count, self._count + len(frames))
            chosen = [place - self._count for place in self._shown if place in places]
            self._kept += [frames[place].copy() for place in chosen]
        if self._to.tap is not None:
            self._to.tap(frames)
        started = perf_counter()
        self._writer.write(frames)
        self.seconds += perf_counter() - started
        self._count += len(frames)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        started = perf_counter()
        self._writer.__exit__(kind, error, trace)
        if error is None and self._to.contact_sheet is not None:
            sheet = media.contact_sheet([np.stack(self._kept)])
            media.write_image(self._to.contact_sheet, sheet)
        self.seconds += perf_counter() - started
