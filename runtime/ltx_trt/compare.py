"""How far one clip is from another, frame by frame: two files in, rows of measures out."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from ltx_engines import metrics
from ltx_engines.errors import UserError
from ltx_engines.metrics import WINDOW, FrameMeasures, Measures, Meter
from ltx_engines.perceptual import Lpips
from ltx_trt.clips import Clip
from ltx_trt.media_files import Picture

GAP = 8
"""Pixels between two clips that are shown side by side."""


@dataclass(frozen=True, slots=True)
class Row:
    """`index` counts from 0. `lpips` is None where it was not measured."""

    index: int
    measures: FrameMeasures
    lpips: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two clips of one size, of which the first `frames` are compared; `common`: also if one of
    them has more."""

    a: Clip
    b: Clip
    frames: int
    common: bool = False
    notes: tuple[str, ...] = ()

    @property
    def beside(self) -> tuple[int, int]:
        """Height and width of both in one picture, even numbers."""
        return -(-self.a.height // 2) * 2, -(-(2 * self.a.width + GAP) // 2) * 2


def pair(a: Clip, b: Clip, *, common: bool = False) -> Pair:
    """`common`: what the longer one has beyond the other is left out.

    Raises:
        UserError: they cannot be compared.
    """
    if (a.height, a.width) != (b.height, b.width):
        raise UserError(
            f"{a.path} is {a.width} x {a.height}, {b.path} is {b.width} x {b.height}; compare "
            "clips of one size"
        )
    if min(a.height, a.width) < WINDOW:
        raise UserError(
            f"{a.path} is {a.width} x {a.height}, and SSIM looks at {WINDOW} x {WINDOW} pixels at "
            "once; compare larger clips"
        )
    notes = []
    if a.frames != b.frames:
        if not common:
            raise UserError(
                f"{a.path} has {a.frames} frames, {b.path} has {b.frames}; add --common-frames to "
                f"compare the first {min(a.frames, b.frames)}"
            )
        notes.append(f"of {a.frames} and {b.frames} frames, the first {min(a.frames, b.frames)}")
    rates = {clip.frame_rate for clip in (a, b)} - {None}
    if len(rates) > 1:
        notes.append(f"{a.frame_rate:g} and {b.frame_rate:g} frames a second, compared one by one")
    return Pair(a, b, min(a.frames, b.frames), common, tuple(notes))


def compare(
    found: Pair, lpips: Lpips, show: Callable[[Picture], None] | None = None
) -> Generator[Row, None, None]:
    """`show` is given both in one picture, for each frame."""
    with closing(found.a.pictures()) as first, closing(found.b.pictures()) as second:
        meter = Meter()
        for index, (x, y) in enumerate(_together(first, second, found)):
            distance = None if lpips.distance is None else lpips.distance(x[None], y[None])
            if show is not None:
                show(beside(x, y, found.beside))
            yield Row(index, meter(x, y), distance)


def overall(rows: list[Row]) -> Measures:
    """Of the whole clip, LPIPS among it if it was measured."""
    found = metrics.overall([row.measures for row in rows])
    distances = [row.lpips for row in rows if row.lpips is not None]
    if not distances:
        return found
    return Measures(found.psnr, found.ssim, found.ms_ssim, found.flicker, float(np.mean(distances)))


def beside(x: Picture, y: Picture, size: tuple[int, int]) -> Picture:
    """[height, width, 3] of each -> both in one of `size`, with black between and at the edges."""
    height, width, _ = x.shape
    picture = np.zeros((*size, 3), np.uint8)
    picture[:height, :width] = x
    picture[:height, width + GAP : 2 * width + GAP] = y
    return picture


def _together(
    first: Iterator[Picture], second: Iterator[Picture], found: Pair
) -> Iterator[tuple[Picture, Picture]]:
    for index, (x, y) in enumerate(zip_longest(first, second)):
        if x is None or y is None:
            if found.common:
                return
            short, long = (found.a, found.b) if x is None else (found.b, found.a)
            raise UserError(
                f"{short.path} ends after {index} frames, {long.path} goes on; add --common-frames"
            )
        yield x, y
