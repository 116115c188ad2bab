"""Tiles cover a clip, their weights sum to one, and what is chosen fits and overlaps."""

from itertools import pairwise
from math import prod

import numpy as np
import pytest

from ltx_trt import tiles
from ltx_trt.tiles import Axes, Grid, Part

SIZES = [(9, 2), (9, 3), (16, 5), (33, 5), (33, 9), (38, 16), (6, 5), (7, 4), (50, 24), (5, 8)]


def sums(parts: tuple[Part, ...], *, of_cells: bool) -> np.ndarray:
    total = np.zeros(parts[-1].cells.stop if of_cells else parts[-1].pixels.stop)
    for part in parts:
        total[part.cells if of_cells else part.pixels] += part.weights
    return total


@pytest.mark.parametrize(("cells", "tile"), SIZES)
def test_the_weights_of_all_tiles_sum_to_one_everywhere(cells: int, tile: int) -> None:
    grid, size = (cells, cells, 3), (tile, tile, 3)
    for axes, of_cells in ((tiles.decoding(grid, size), False), (tiles.encoding(grid, size), True)):
        for parts in (axes.frames, axes.rows, axes.columns):
            assert sums(parts, of_cells=of_cells) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("cells", "tile"), SIZES)
def test_tiles_have_one_size_and_the_wished_overlap(cells: int, tile: int) -> None:
    spans = tiles.cuts(cells, tile)
    assert {span.stop - span.start for span in spans} == {min(cells, tile)}
    assert (spans[0].start, spans[-1].stop, len(spans)) == (0, cells, tiles.count(cells, tile))
    shared = [one.stop - two.start for one, two in pairwise(spans)]
    assert all(cells_shared >= tiles.overlap(tile) for cells_shared in shared)


def test_the_first_frame_of_a_later_tile_is_the_last_of_its_eight() -> None:
    first, second = tiles.decoding((9, 1, 1), (7, 1, 1)).frames
    assert (first.cells, first.pixels) == (slice(0, 7), slice(0, 49))
    assert (second.cells, second.pixels) == (slice(2, 9), slice(16, 65))
    counts = np.flatnonzero((second.weights > 0) & (second.weights < 1)) + second.pixels.start
    assert (counts[0], counts[-1]) == (21, 36), "two cells in the middle of cells 2 to 6"


def test_tiles_take_turns_along_a_straight_line_and_their_ends_count_nothing() -> None:
    one, other = (part.weights for part in tiles.decoding((1, 1, 18), (1, 1, 12)).columns)
    shared = 32 * 6  # one ends at 12 cells, the other begins at 6
    falling, rising = one[-shared:], other[:shared]
    ramp = (rising > 0) & (rising < 1)
    assert ramp.sum() == 32 * tiles.RAMP
    assert np.diff(rising[ramp]) == pytest.approx(1 / (32 * tiles.RAMP), abs=1e-6)
    assert falling + rising == pytest.approx(1, abs=1e-6)
    margin = (shared - 32 * tiles.RAMP) // 2
    assert not rising[:margin].any()
    assert not falling[-margin:].any()


def test_a_causal_encoder_errs_after_a_beginning_so_its_tiles_hand_over_at_the_end() -> None:
    one, other = (part.weights for part in tiles.encoding((18, 1, 1), (12, 1, 1)).frames)
    assert one.tolist() == [1] * 10 + [0.75, 0.25]
    assert other.tolist() == [0] * 4 + [0.25, 0.75] + [1] * 6


def test_a_tile_of_one_cell_is_nobodys_wish() -> None:
    with pytest.raises(ValueError, match="cannot overlap"):
        tiles.decoding((9, 4, 4), (1, 4, 4))


def test_what_is_chosen_fits_overlaps_enough_and_computes_least() -> None:
    grid, most = (16, 22, 38), 16 * 22 * 12

    def fits(tile: Grid) -> bool:
        return prod(tile) <= most

    def computed(tile: Grid) -> int:
        return prod(t * tiles.count(n, t) for n, t in zip(grid, tile, strict=True))

    chosen = tiles.choose(grid, tiles.every(grid), fits)
    assert chosen is not None
    assert fits(chosen)
    enough = [
        tile
        for tile in tiles.every(grid)
        if fits(tile)
        and all(
            t == n or tiles.overlap(t) >= enough
            for n, t, enough in zip(grid, tile, tiles.SEAMLESS, strict=True)
        )
    ]
    assert computed(chosen) == min(map(computed, enough))


def test_little_memory_gives_little_overlap_and_none_gives_no_tiles() -> None:
    grid = (9, 8, 8)
    assert tiles.choose(grid, tiles.every(grid), lambda tile: prod(tile) <= 64) == (4, 4, 4)
    assert tiles.choose(grid, tiles.every(grid), lambda _: False) is None


def test_a_clip_that_is_one_tile_has_weights_of_one() -> None:
    axes: Axes = tiles.decoding((4, 2, 3), (9, 8, 8))
    for parts in (axes.frames, axes.rows, axes.columns):
        (part,) = parts
        assert (part.weights == 1).all()
