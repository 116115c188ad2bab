"""The small world of ltx-tiny: one coloured shape that moves over one colour.

A `Scene` is what a caption can say; `draw` makes the pixels, with everything a caption does not
say (where exactly) taken from a random generator. One scene in ten is held out: `sample` never
returns it, so that the evaluation asks for combinations the model has not seen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 210, 40),
    "cyan": (50, 200, 215),
    "purple": (150, 50, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "diamond")
DIRECTIONS: dict[str, tuple[int, int]] = {  # columns, rows; rows grow downwards
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
SPEEDS = {"slow": 45.0, "normal": 68.0, "fast": 88.0}  # pixels per second
SIZES = {"small": 12.0, "normal": 15.0, "large": 18.0}  # radius of a circle of the same area
REACH = {"circle": 1.0, "square": 0.89, "triangle": 1.56, "diamond": 1.26}  # in radii
HELD_OUT_IN = 10  # one combination of shape, colours and direction in this many is never drawn
MARGIN = 2.0  # pixels between the path of a shape and the edge of the picture
WANDER = 0.12  # how far, in sides of the picture, the middle of a path may lie from the middle


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption can say about a clip."""

    shape: str
    colour: str
    background: str
    direction: str
    speed: str = "normal"
    size: str = "normal"

    @property
    def held_out(self) -> bool:
        """Whether training must never show this combination, at any speed and size."""
        name = "/".join(astuple(self)[:4])
        return hashlib.sha256(name.encode()).digest()[0] * HELD_OUT_IN < 256


@dataclass(frozen=True, slots=True)
class Format:
    """The outer measures of a clip."""

    frames: int
    height: int
    width: int
    frame_rate: float


def scenes() -> Iterator[Scene]:
    """Every combination of shape, colours and direction at normal speed and size."""
    for shape, colour, background, direction in product(SHAPES, PALETTE, PALETTE, DIRECTIONS):
        if colour != background:
            yield Scene(shape, colour, background, direction)


def sample(rng: np.random.Generator) -> Scene:
    """A random scene for training: never a held-out one."""
    colours, directions = tuple(PALETTE), tuple(DIRECTIONS)
    while True:
        colour, background = rng.choice(len(colours), 2, replace=False)
        scene = Scene(
            shape=SHAPES[rng.integers(len(SHAPES))],
            colour=colours[colour],
            background=colours[background],
            direction=directions[rng.integers(len(directions))],
            speed=("slow", "normal", "normal", "fast")[rng.integers(4)],
            size=("small", "normal", "normal", "large")[rng.integers(4)],
        )
        if not scene.held_out:
            return scene


def distance(
    shape: str, radius: float, x: NDArray[np.float32], y: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Signed distance to the outline, negative inside; all shapes have the area of the circle."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - np.float32(radius)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - np.float32(radius * math.sqrt(math.pi) / 2)
    if shape == "diamond":
        side = np.float32(radius * math.sqrt(math.pi / 2))
        return (abs(x) + abs(y) - side) * np.float32(math.sqrt(0.5))
    if shape == "triangle":
        inner = np.float32(radius * math.sqrt(math.pi / (3 * math.sqrt(3))))
        slope = np.float32(math.sqrt(0.75)) * abs(x) - np.float32(0.5) * y
        return np.maximum(slope, y) - inner
    raise ValueError(f"no such shape: {shape}; known: {', '.join(SHAPES)}")


def path(scene: Scene, form: Format, rng: np.random.Generator) -> NDArray[np.float64]:
    """The middle of the shape in each frame, as [frames, (column, row)], wholly in the picture."""
    sides = np.array([form.width, form.height], dtype=np.float64)
    heading = np.array(DIRECTIONS[scene.direction], dtype=np.float64)
    heading /= np.linalg.norm(heading)
    reach = REACH[scene.shape] * SIZES[scene.size] + MARGIN
    seconds = (form.frames - 1) / form.frame_rate
    room = np.maximum(sides - 2 * reach, 0)
    length = min(SPEEDS[scene.speed] * seconds, *(room / np.maximum(abs(heading), 1e-6)))
    free = np.minimum((room - length * abs(heading)) / 2, WANDER * sides)
    middle = sides / 2 + rng.uniform(-1, 1, 2) * free
    steps = np.linspace(-0.5, 0.5, form.frames)[:, None]
    return np.asarray(middle - 0.5 + steps * length * heading)


def draw(scene: Scene, form: Format, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Pixels [frames, height, width, 3], edges smoothed over one pixel."""
    background, colour = (
        np.array(PALETTE[name], dtype=np.float32) for name in (scene.background, scene.colour)
    )
    clip = np.empty((form.frames, form.height, form.width, 3), dtype=np.uint8)
    clip[:] = background.astype(np.uint8)
    radius = SIZES[scene.size]
    half = math.ceil(1.6 * radius) + 1
    for frame, (column, row) in zip(clip, path(scene, form, rng), strict=True):
        top, left = max(int(row) - half, 0), max(int(column) - half, 0)
        window = frame[top : int(row) + half + 2, left : int(column) + half + 2]
        y = np.arange(top, top + window.shape[0], dtype=np.float32)[:, None] - np.float32(row)
        x = np.arange(left, left + window.shape[1], dtype=np.float32)[None] - np.float32(column)
        cover = np.clip(0.5 - distance(scene.shape, radius, x, y), 0, 1)[..., None]
        window[:] = np.rint(background + cover * (colour - background)).astype(np.uint8)
    return clip
