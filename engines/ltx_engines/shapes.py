"""Which clip sizes LTX-Video can make, and how large they are for the transformer."""

import re
from dataclasses import dataclass

from ltx_engines.errors import UserError

TIME = 8
"""Frames to one latent frame; the first frame has a latent frame of its own."""

SPACE = 32
"""Pixels to one latent cell, along both sides."""

ENLARGES = 2
"""What a spatial upsampler does to height and width."""


@dataclass(frozen=True, slots=True)
class VideoShape:
    """A clip in pixels. Frames come as one, then groups of eight: 1, 9, 17, ..."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % TIME != 1:  # -7 % 8 is 1 too
            nearest = max(1, round((self.frames - 1) / TIME) * TIME + 1)
            raise UserError(f"frames must be {TIME}k + 1, not {self.frames}; try {nearest}")
        for side, pixels in (("height", self.height), ("width", self.width)):
            if pixels < SPACE or pixels % SPACE:
                nearest = max(SPACE, round(pixels / SPACE) * SPACE)
                raise UserError(
                    f"{side} must be a multiple of {SPACE}, not {pixels}; try {nearest}"
                )

    @property
    def latent(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latent grid."""
        return (self.frames - 1) // TIME + 1, self.height // SPACE, self.width // SPACE

    @property
    def tokens(self) -> int:
        """Positions the transformer sees: one for each latent cell."""
        frames, rows, columns = self.latent
        return frames * rows * columns


def parse(word: str) -> VideoShape:
    """
    Raises:
        UserError: it is not `WxHxF`, or not a clip that the model can make.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", word.strip(), re.ASCII)
    if not match:
        raise UserError(f"shape {word!r} is not WIDTHxHEIGHTxFRAMES; an example is 1216x704x121")
    width, height, frames = map(int, match.groups())
    return VideoShape(frames, height, width)


def counted(frames: int) -> str:
    """In words."""
    return f"{frames} frame{'s' * (frames != 1)}"


def snap(frames: int, height: int, width: int) -> VideoShape:
    """The smallest legal clip that holds the wished one; the caller crops what is too much."""
    for name, wish in (("frames", frames), ("height", height), ("width", width)):
        if wish < 1:
            raise UserError(f"{name} must be at least 1, not {wish}")
    return VideoShape(
        frames=((frames - 2) // TIME + 1) * TIME + 1,
        height=((height - 1) // SPACE + 1) * SPACE,
        width=((width - 1) // SPACE + 1) * SPACE,
    )


def first_size(height: int, width: int, factor: float) -> tuple[int, int]:
    """Of the first of two passes, for a clip of legal size; the second's is ENLARGES times that.

    Raises:
        UserError: nothing would be left.
    """
    rows, columns = (int(size * factor) // SPACE * SPACE for size in (height, width))
    if not rows or not columns:
        raise UserError(
            f"a first pass at {factor:g} of {height} x {width} (height x width) would be empty; "
            f"make both at least {_wished(SPACE, factor)}"
        )
    return rows, columns


def wished_size(height: int, width: int, factor: float) -> tuple[int, int]:
    """The smallest size of a clip whose second pass has this one."""
    rows, columns = (_wished(size // ENLARGES, factor) for size in (height, width))
    return rows, columns


def _wished(first: int, factor: float) -> int:
    least = int(first / factor) // SPACE * SPACE
    return next(size for size in (least, least + SPACE) if int(size * factor) >= first)
