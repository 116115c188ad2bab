"""What a clip is conditioned on: images and sequences, each at a frame of its own.

    frame 0             its latents are mixed into the clip's first ones by its strength
    a later image       a latent frame beside the clip's own, with this frame's time: extra tokens,
                        which stand before the clip's and go when it is done
    a later sequence    its first two latent frames like later images, the others like frame 0's,
                        at their own place

A token of strength s is told no noise level above 1 - s. It takes part in a step once the clip has
come down to that level, and is left alone before: one of strength 1 is never denoised.

C latent channels; f h w the latent grid; tokens = f h w; extra the tokens that stand before them
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_engines.shapes import SPACE, TIME, VideoShape, counted
from ltx_trt.coordinates import patchify, token_coordinates
from ltx_trt.noise import Noise

Floats = NDArray[np.float32]

PREFIX = 2
"""Latent frames of a later sequence that become extra tokens: encoded without what precedes them,
they look unlike those in the middle of a clip."""


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """`pixels` [1, 3, frames, height, width] in -1..1 stand at `frame` of the clip; `strength` 1
    keeps them as they are, 0 has no effect. They are resized to whatever clip is made."""

    pixels: Floats
    frame: int = 0
    strength: float = 1.0

    @property
    def frames(self) -> int:
        return int(self.pixels.shape[2])

    @property
    def extra(self) -> int:
        """Latent frames that become extra tokens."""
        return 0 if self.frame == 0 else min(PREFIX, _latent_frames(self.frames))


@dataclass(frozen=True, slots=True)
class Place:
    """Of the clip: how its tokens' times are counted."""

    shape: VideoShape
    frame_rate: float
    causal: bool


@dataclass(frozen=True, slots=True, eq=False)
class Conditioned:
    """`latents` [1, extra + tokens, C]; `coordinates` [1, 3, extra + tokens]; `strengths`
    [1, extra + tokens], None if there is no item. `made` of the clip's own tokens, the first ones,
    are of a window before: clean, and no picture's."""

    latents: Floats
    coordinates: Floats
    strengths: Floats | None
    extra: int
    made: int = 0

    @property
    def settled(self) -> slice:
        """Where those that are `made` stand."""
        return slice(self.extra, self.extra + self.made)


def check(items: Iterable[Item], clip: VideoShape) -> None:
    """
    Raises:
        UserError: one cannot stand where it is to stand in this clip.
    """
    for number, item in enumerate(items, 1):
        said = f"conditioning item {number}"
        if item.pixels.ndim != 5 or item.pixels.shape[:2] != (1, 3):
            raise ValueError(f"{said} is {item.pixels.shape}, not 1 x 3 x frames x height x width")
        if not 0 <= item.strength <= 1:
            raise UserError(f"{said}: its strength must be from 0 to 1, not {item.strength:g}")
        if item.frames % TIME != 1:
            least = (item.frames - 1) // TIME * TIME + 1
            raise UserError(f"{said} has {item.frames} frames, not 8k + 1; cut it to {least}")
        if not 0 <= item.frame <= clip.frames - item.frames:
            last = clip.frames - item.frames
            where = f"from frame 0 to {last}" if last >= 0 else "in a longer clip"
            raise UserError(
                f"{said}: {counted(item.frames)} from frame {item.frame} do not fit into a clip of "
                f"{clip.frames}; let it begin {where}"
            )
        if item.frames > 1 and item.frame % TIME:
            nearest = item.frame // TIME * TIME
            raise UserError(
                f"{said}: a sequence begins at a multiple of {TIME}, not at frame {item.frame}; "
                f"try {nearest} or {nearest + TIME}"
            )


def extra_tokens(items: Iterable[Item], shape: VideoShape) -> int:
    _, rows, columns = shape.latent
    return sum(item.extra for item in items) * rows * columns


def condition(
    latents: Floats, items: Sequence[tuple[Item, Floats]], place: Place, noise: Noise
) -> Conditioned:
    """`latents` [1, C, f, h, w] at the first noise level, and each item with its own latents;
    `noise` is drawn from once for each item with extra tokens, in order."""
    coordinates = token_coordinates(place.shape, place.frame_rate, causal=place.causal)
    if not items:
        return Conditioned(patchify(latents), coordinates, None, 0)
    latents = latents.copy()
    strengths = np.zeros((1, 1, *latents.shape[2:]), np.float32)
    parts: list[Conditioned] = []
    for item, given in items:
        rest, first = given[:, :, item.extra :], item.frame // TIME + item.extra
        taken = slice(first, first + rest.shape[2])
        latents[:, :, taken] = _mixed(latents[:, :, taken], rest, item.strength)
        strengths[:, :, taken] = item.strength
        if item.extra:
            parts.append(_extra(item, given[:, :, : item.extra], place, noise))
    parts.append(Conditioned(patchify(latents), coordinates, patchify(strengths)[..., 0], 0))
    return Conditioned(
        np.concatenate([part.latents for part in parts], axis=1),
        np.concatenate([part.coordinates for part in parts], axis=2),
        np.concatenate([part.strengths for part in parts if part.strengths is not None], axis=1),
        sum(part.extra for part in parts),
    )


def _extra(item: Item, given: Floats, place: Place, noise: Noise) -> Conditioned:
    mixed = _mixed(noise.normal(given.shape), given, item.strength)
    _, _, frames, rows, columns = given.shape
    shape = VideoShape(TIME * (frames - 1) + 1, SPACE * rows, SPACE * columns)
    coordinates = token_coordinates(shape, place.frame_rate, causal=place.causal, first=item.frame)
    strengths = np.full((1, shape.tokens), item.strength, np.float32)
    return Conditioned(patchify(mixed), coordinates, strengths, shape.tokens)


def _mixed(noise: Floats, given: Floats, strength: float) -> Floats:
    share = np.float32(strength)
    return noise * (1 - share) + given * share


def _latent_frames(frames: int) -> int:
    return (frames - 1) // TIME + 1
