r"""A clip in tiles that overlap: where each begins and ends, and how much it counts where.

The VAE's tiles are cut in the latent grid. At an edge that is not the clip's, a tile lacks what its
convolutions read beyond it, and the error fades towards its middle. So the outer parts of an
overlap belong to one of the two tiles alone; in its middle, their weights take turns along a
straight line. They sum to one.

    one    ========\
    other       ----========    of the overlap, a ramp in the middle
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil, prod
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ltx_engines.shapes import SPACE, TIME

Floats = NDArray[np.float32]
Grid = tuple[int, int, int]
"""Latent frames, rows and columns."""

OVERLAP, SMALL = 12, 4
"""Latent cells that neighbours share: half of a tile, but at most so many, and in small tiles up to
as many as the second says. The convolutions of a released decoder reach 22 cells (VAE 0.9.5), 24
(0.9) or 30 (0.9.1) in all (`ltx_ref/ltx_video/reach.py`), most of them at the latents' own level.
What comes from so far fades: with 8 cells random weights of true widths are 39 to 46 dB from the
untiled decode, with 12 cells 50 to 64 dB, and ltx-tiny's, which are trained, are exact with 6
(`benchmarks/vae_tiles.py`)."""

SEAMLESS: Grid = (4, 6, 6)
"""Latent frames, rows and columns of overlap with which clips of one colour differ by 0.04 of 255
levels from untiled ones (ltx-tiny); with less, by 1 to 2 levels. Tiles that share less are chosen
only where no others fit."""

NEAR: Grid = (OVERLAP, OVERLAP, OVERLAP)
"""The same, for whatever weights: 50 dB and more from the untiled decode."""

LEAST, MANY = 2, 33
"""Cells of a tile that overlaps, and of the longest that `every` tries beside the whole."""

RAMP = 2
"""Latent cells of an overlap in which both count, or half of it: as wide as needed for no seam to
be seen, since what lies further out is worse."""

MIDDLE, END = 0.5, 1.0
"""Where in an overlap the ramp is. A causal model errs only after a tile's beginning."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """A clip that is decoded so many latent frames at a time, exactly."""

    frames: int


Cut = Grid | Streamed | None
"""The tile; None if a clip may be given whole."""


@runtime_checkable
class Tiling(Protocol):
    """A session of the VAE that is not to be given more of a clip at once."""

    def tile(self, grid: Grid) -> Cut: ...


@dataclass(frozen=True, slots=True)
class Part:
    """Of one axis: latent cells, and the pixels (or frames) that they stand for. `weights` are of
    what comes out: of pixels for a decoder, of cells for an encoder."""

    cells: slice
    pixels: slice
    weights: Floats


@dataclass(frozen=True, slots=True)
class Axes:
    """The tiles of a clip: each part in time with each of the rows and each of the columns."""

    frames: tuple[Part, ...]
    rows: tuple[Part, ...]
    columns: tuple[Part, ...]


def decoding(grid: Grid, tile: Grid) -> Axes:
    """Weights of frames, rows and columns."""
    return Axes(*(_decoded(a, *pair) for a, pair in enumerate(zip(grid, tile, strict=True))))


def encoding(grid: Grid, tile: Grid) -> Axes:
    """Weights of latent frames, rows and columns. An encoder is causal: in time, a tile errs only
    near its beginning."""
    return Axes(*(_encoded(a, *pair) for a, pair in enumerate(zip(grid, tile, strict=True))))


def _decoded(axis: int, cells: int, tile: int) -> tuple[Part, ...]:
    spans = cuts(cells, tile)
    points = [_points(axis, span) for span in spans]
    ramp = Ramp(RAMP * TIME, lead=TIME - 1) if axis == 0 else Ramp(RAMP * SPACE)
    return tuple(map(Part, spans, points, weights(points, ramp)))


def _encoded(axis: int, cells: int, tile: int) -> tuple[Part, ...]:
    spans = cuts(cells, tile)
    points = [_points(axis, span) for span in spans]
    ramp = Ramp(RAMP, END if axis == 0 else MIDDLE)
    return tuple(map(Part, spans, points, weights(spans, ramp)))


def _points(axis: int, cells: slice) -> slice:
    """Frames, rows or columns of latent cells. The first latent frame of a tile stands for one
    frame, as the clip's does: the last of the eight that it stands for in the clip."""
    if axis == 0:
        return slice(TIME * cells.start, TIME * (cells.stop - 1) + 1)
    return slice(SPACE * cells.start, SPACE * cells.stop)


def cuts(cells: int, tile: int) -> list[slice]:
    """Tiles of one size at equal distances; one that is as long as the axis if that fits."""
    if (number := count(cells, tile)) == 1:
        return [slice(0, cells)]
    starts = (round(index * (cells - tile) / (number - 1)) for index in range(number))
    return [slice(start, start + tile) for start in starts]


def count(cells: int, tile: int) -> int:
    """How many tiles there are along an axis."""
    if tile >= cells:
        return 1
    if tile < LEAST:
        raise ValueError("tiles of one cell cannot overlap")
    return ceil((cells - overlap(tile)) / (tile - overlap(tile)))


def overlap(tile: int) -> int:
    """Latent cells, at least, that a tile of so many shares with the next."""
    return min(OVERLAP, max(tile // 2, min(SMALL, tile - LEAST)))


@dataclass(frozen=True, slots=True)
class Ramp:
    """Its length in points, and where it lies in an overlap. The first cell of a tile lacks `lead`
    of its points."""

    length: int
    where: float = MIDDLE
    lead: int = 0


def weights(spans: Sequence[slice], ramp: Ramp) -> list[Floats]:
    """For each span one number for each of its points; they sum to one in each point.

    Spans begin and end later than the one before.
    """
    rises: list[tuple[float, float]] = []
    for one, other in pairwise(spans):
        shared = one.stop - other.start + ramp.lead
        length = min(ramp.length, shared / 2)
        high = one.stop - (1 - ramp.where) * (shared - length)
        low = max(high - length, other.start, rises[-1][1] if rises else 0.0)
        rises.append((low, max(low, high)))
    found = []
    for index, span in enumerate(spans):
        points = np.arange(span.start, span.stop) + 0.5
        weight = np.ones(len(points))
        if index > 0:
            weight *= _risen(points, rises[index - 1])
        if index < len(rises):
            weight *= 1 - _risen(points, rises[index])
        found.append(weight.astype(np.float32))
    return found


def choose(
    grid: Grid, sizes: Iterable[Grid], fits: Callable[[Grid], bool], enough: Grid = SEAMLESS
) -> Grid | None:
    """Of the tiles that fit one of those with enough overlap, and of these the one with which the
    fewest cells are computed."""

    def worth(tile: Grid) -> tuple[float, int, int]:
        return _shared(grid, tile, enough), -computed(grid, tile), prod(tile)

    return max(filter(fits, sizes), key=worth, default=None)


def computed(grid: Grid, tile: Grid) -> int:
    """Cells of all tiles together."""
    return prod(t * count(n, t) for n, t in zip(grid, tile, strict=True))


def shares(grid: Grid, tile: Grid, enough: Grid) -> bool:
    """Whether neighbours share so much, along each axis that is cut."""
    return _shared(grid, tile, enough) >= 1


def _shared(grid: Grid, tile: Grid, enough: Grid) -> float:
    """Of what is enough, along the axis where it is least."""
    axes = zip(grid, tile, enough, strict=True)
    return min((1.0, *(overlap(t) / wanted for n, t, wanted in axes if t < n)))


def every(grid: Grid) -> Iterable[Grid]:
    """All tiles of a clip, with less choice where there is much."""
    return product(*(sorted({*range(LEAST, min(n, MANY)), n}) for n in grid))


def _risen(points: NDArray[np.float64], rise: tuple[float, float]) -> NDArray[np.float64]:
    low, high = rise
    if high <= low:
        return (points > low).astype(np.float64)
    return np.clip((points - low) / (high - low), 0, 1)
