"""Say what a clip shows by measuring it: no model, so nothing to fool the evaluation.

Background: the palette colour nearest to the median of the border. Shape: the pixels that differ
from it, their median colour, the way of their middle from first to last frame, and which outline of
the same area covers them best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiny.clips import DIRECTIONS, PALETTE, SHAPES, distance

DIFFERS = 0.5  # of the largest difference in colour: beyond it a pixel belongs to the shape
FAINT = 40.0  # of 441; no pixel differs by more than this: there is no shape
LEAST_AREA = 30.0  # pixels in a frame
LEAST_WAY = 4.0  # pixels from first to last frame
NONE = "none"


@dataclass(frozen=True, slots=True)
class Seen:
    """What the detector saw; "none" where there is nothing to be seen."""

    shape: str
    colour: str
    background: str
    direction: str


def detect(clip: NDArray[np.uint8]) -> Seen:
    """Read a clip [frames, height, width, 3]."""
    pixels = clip.astype(np.float32)
    edges = (pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:])
    background = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    difference = np.linalg.norm(pixels - background, axis=-1)
    strongest = np.quantile(difference, 0.99)
    mask = difference > DIFFERS * strongest
    areas = mask.sum((1, 2))
    if strongest < FAINT or areas[[0, -1]].min() < LEAST_AREA:
        return Seen(NONE, NONE, nearest_colour(background), NONE)
    return Seen(
        shape=_shape(mask),
        colour=nearest_colour(np.median(pixels[mask], axis=0)),
        background=nearest_colour(background),
        direction=_direction(mask),
    )


def nearest_colour(colour: NDArray[np.floating]) -> str:
    away = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in PALETTE.items()}
    return min(away, key=away.__getitem__)


def _middle(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Column and row of the middle of the pixels that are set."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def _direction(mask: NDArray[np.bool_]) -> str:
    way = _middle(mask[-1]) - _middle(mask[0])
    if np.linalg.norm(way) < LEAST_WAY:
        return NONE
    along = {
        name: float(way @ heading / np.linalg.norm(heading)) for name, heading in DIRECTIONS.items()
    }
    return max(along, key=along.__getitem__)


def _shape(mask: NDArray[np.bool_]) -> str:
    """The outline whose overlap with the mask is best, over all frames that show enough of it."""
    overlap = dict.fromkeys(SHAPES, 0.0)
    rows, columns = np.indices(mask.shape[1:], dtype=np.float32)
    for frame in mask:
        area = float(frame.sum())
        if area < LEAST_AREA:
            continue
        column, row = _middle(frame)
        for shape in SHAPES:
            # The middle of a triangle's area is the origin of `distance`, as for the other shapes.
            inside = distance(shape, (area / np.pi) ** 0.5, columns - column, rows - row) < 0
            overlap[shape] += float((inside & frame).sum() / (inside | frame).sum())
    return max(overlap, key=overlap.__getitem__)
