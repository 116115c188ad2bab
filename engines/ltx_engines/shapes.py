"""Which clip sizes LTX-Video can make, and how large they are for the transformer."""

from dataclasses import dataclass

from ltx_engines.errors import UserError

TIME = 8
"""Frames to one latent frame; the first frame has a latent frame of its own."""

SPACE = 32
"""Pixels to one latent cell, along both sides."""


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
