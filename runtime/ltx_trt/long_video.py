"""Clips longer than the model sees at once: window after window, each held to the end of the last.

    latent frames  0 1 2 3 4 5 6 7 8 9 ...
    first window   [- - - -]
    second               [= - - -]            = is held: made before, told to be free of noise
    third                      [= - - -]

The windows meet in latents. What is held are the very latents of the window before, at the times
that they have there, so nothing is decoded and encoded between, each stage is opened once, and the
decoder sees one clip without joins. (Tried on ltx-tiny and left: the last frames, encoded anew as
in the original's video extension. At the joins frames then differ 3.0 to 3.5 times as much as
within a window, on average; of latents it is 0.7 to 0.9 times. See benchmarks/long_video.py.)

The model never sees a window's place in the clip: times are counted as if it were the second latent
frame that it begins with, for the very first stands for one frame, and all others for eight.

C latent channels; f h w the latent grid of a window; F latent frames of the clip
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_engines.shapes import SPACE, TIME, VideoShape
from ltx_trt.conditioning import Conditioned, Item, Place, condition
from ltx_trt.coordinates import patchify
from ltx_trt.noise import Noise

Floats = NDArray[np.float32]

LONGEST = 20.0
"""Seconds: the model's positions are shares of these (positional_embedding_max_pos)."""

SHARE = 5
"""One in so many latent frames of a window is held."""

NEAR = 3
"""Times that a message names at most."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """`frames` of each window, and its latent frames that are `held`. `prompts`: from this frame
    on the clip shows that; before the first of them what the request says."""

    frames: int
    held: int = 1
    prompts: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        latent = VideoShape(self.frames, SPACE, SPACE).latent[0]
        if not 1 <= self.held < latent:
            raise ValueError(f"{self.held} of {latent} latent frames cannot be held")
        if any(a >= b for (a, _), (b, _) in pairwise(((0, ""), *self.prompts))):
            raise ValueError(f"prompts must begin one after the other: {self.prompts}")


@dataclass(frozen=True, slots=True)
class Window:
    """Latent frames `first` to `end` of a clip; the `held` first ones are there already."""

    first: int
    held: int
    end: int

    @property
    def all(self) -> slice:
        return slice(self.first, self.end)

    @property
    def new(self) -> slice:
        return slice(self.first + self.held, self.end)

    @property
    def first_new_frame(self) -> int:
        return max((self.first + self.held - 1) * TIME + 1, 0)

    def makes(self, frame: int) -> bool:
        """Whether this frame of the clip is among the new ones."""
        return self.first + self.held <= -(-frame // TIME) < self.end


def windows(latent_frames: int, chunks: Chunks | None) -> tuple[Window, ...]:
    """All of one length, so that the last may be held to more of what was made before; a clip in
    one piece is one window."""
    if chunks is None or (length := (chunks.frames - 1) // TIME + 1) >= latent_frames:
        return (Window(0, 0, latent_frames),)
    found = [Window(0, 0, length)]
    while (made := found[-1].end) < latent_frames:
        first = min(made - chunks.held, latent_frames - length)
        found.append(Window(first, made - first, first + length))
    return tuple(found)


def chunked(seconds: float | None, frames: int, frame_rate: float, usual: int) -> Chunks | None:
    """How a clip of so many frames is made: in windows of `seconds`, or in the `usual` number of
    frames if it is too long for the model otherwise.

    Raises:
        UserError: such windows cannot be.
    """
    least = (TIME + 1) / frame_rate
    if seconds is None:
        if frames <= LONGEST * frame_rate + 1:
            return None
        seconds = min(max(usual / frame_rate, least), LONGEST)
    if not least <= seconds <= LONGEST:
        raise UserError(
            f"--chunk must be from {least:.3g} to {LONGEST:g} seconds (the model's window) at "
            f"{frame_rate:g} frames a second, not {seconds:g}"
        )
    latent = max(1, round((seconds * frame_rate - 1) / TIME))
    latent = min(latent, int((LONGEST * frame_rate - 1) // TIME))
    if latent * TIME + 1 >= frames:
        return None
    return Chunks(latent * TIME + 1, max(1, (latent + 1) // SHARE))


def parse_prompts(
    words: Sequence[str], frames: int, frame_rate: float
) -> tuple[tuple[int, str], ...]:
    """SECONDS:TEXT, in any order, as frames and texts.

    Raises:
        UserError: a time is none, or not within the clip, or said twice, or nothing is said.
    """
    found: dict[int, str] = {}
    for word in words:
        time, _, text = word.partition(":")
        try:
            frame = round(float(time) * frame_rate)
        except (ValueError, OverflowError):
            raise UserError(
                f"--prompt-at is SECONDS:TEXT, such as 2.5:TEXT, not {word!r}"
            ) from None
        if not 0 < frame < frames:
            raise UserError(
                f"--prompt-at {word!r}: the clip goes from 0 to {frames / frame_rate:.4g} seconds; "
                "choose a time between"
            )
        if not text.strip():
            raise UserError(f"--prompt-at {word!r} says nothing; write SECONDS:TEXT")
        if frame in found:
            raise UserError(f"--prompt-at {word!r}: there is a text for this time; leave one out")
        found[frame] = text.strip()
    return tuple(sorted(found.items()))


def prompts(first: str, chunks: Chunks | None, parts: Sequence[Window]) -> tuple[str, ...]:
    """Of each window: what is said last before its first new frame."""
    changes = () if chunks is None else chunks.prompts
    said = [(0, first), *changes]
    return tuple(
        [text for frame, text in said if frame <= part.first_new_frame][-1] for part in parts
    )


def check_prompts(
    chunks: Chunks | None, parts: Sequence[Window], frame_rate: float
) -> tuple[str, ...]:
    """A note on texts that come later than they are wished: a chunk shows one.

    Raises:
        UserError: a text would not be shown at all.
    """
    changes = () if chunks is None else chunks.prompts
    begun = [part.first_new_frame for part in parts[1:]]
    shown = [next((start for start in begun if start >= frame), None) for frame, _ in changes]
    late = []
    for (frame, text), start, following in zip(changes, shown, [*shown, None][1:], strict=True):
        wished = _seconds(frame, frame_rate)
        if start is None or start == following:
            near = sorted(sorted(begun, key=lambda first: abs(first - frame))[:NEAR])
            times = ", ".join(_seconds(first, frame_rate) for first in near)
            raise UserError(
                f"--prompt-at {wished}:{text}: no chunk shows this text: each shows the last one "
                f"said by its begin; those near it begin at {times} seconds"
            )
        if start != frame:
            late.append(f"{wished} at {_seconds(start, frame_rate)}")
    if not late:
        return ()
    more = f" and {len(late) - NEAR} more" if len(late) > NEAR else ""
    said = ", ".join(late[:NEAR])
    return (f"--prompt-at counts where the next chunk begins: {said} seconds{more}",)


def _seconds(frame: int, frame_rate: float) -> str:
    """To be said again: exact to less than half a frame."""
    return f"{round(frame / frame_rate, 3):g}"


def by_windows(
    latents: Floats, parts: Sequence[Window], work: Callable[[Floats], Floats]
) -> Floats:
    """`work` of each window, of which the new latent frames are taken; it leaves their number as
    it is."""
    return np.concatenate(
        [work(latents[:, :, part.all])[:, :, part.held :] for part in parts], axis=2
    )


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What a whole clip is held to: latents [1, C, F, h, w], as much as there is of them beside the
    share [1, 1, F, h, w] of noise; their strengths, of the same shape; and items beside the clip's
    own latents, each with those of its own. Where items overlap, a later one is mixed into what the
    ones before have left, as in a clip of one piece."""

    latents: Floats
    noise: Floats
    strengths: Floats
    beside: tuple[tuple[Item, Floats], ...]

    @classmethod
    def of(cls, items: Sequence[tuple[Item, Floats]], size: tuple[int, ...]) -> "Scene":
        """`size` is that of the clip's latents."""
        latents = np.zeros(size, np.float32)
        strengths = np.zeros((1, 1, *size[2:]), np.float32)
        noise = np.ones_like(strengths)
        for item, given in items:
            first, rest = item.frame // TIME + item.extra, given[:, :, item.extra :]
            taken, share = slice(first, first + rest.shape[2]), np.float32(item.strength)
            latents[:, :, taken] = latents[:, :, taken] * (1 - share) + rest * share
            noise[:, :, taken] *= 1 - share
            strengths[:, :, taken] = share
        beside = tuple((item, given[:, :, : item.extra]) for item, given in items if item.extra)
        return cls(latents, noise, strengths, beside)

    def condition(
        self, latents: Floats, part: Window, made: Floats, place: Place, noise: Noise
    ) -> Conditioned:
        """`latents` [1, C, f, h, w] of the window at the first noise level; `made` [1, C, F, h, w]
        is the clip as far as it is made; `place` is the window's."""
        strengths = self.strengths[:, :, part.all].copy()
        latents = latents * self.noise[:, :, part.all] + self.latents[:, :, part.all]
        latents[:, :, : part.held] = made[:, :, part.first : part.first + part.held]
        strengths[:, :, : part.held] = 1
        beside = [
            (replace(item, frame=item.frame - _origin(part)), given)
            for item, given in self.beside
            if part.makes(item.frame)
        ]
        found = _within(latents, beside, part, place, noise)
        _, rows, columns = place.shape.latent
        found = replace(found, made=part.held * rows * columns)
        if found.strengths is None:
            return replace(found, strengths=patchify(strengths)[..., 0])
        parts = (found.strengths[:, : found.extra], patchify(strengths)[..., 0])
        return replace(found, strengths=np.concatenate(parts, axis=1))


def _origin(part: Window) -> int:
    """The frame of the clip that the window counts from."""
    return max(part.first - 1, 0) * TIME


def _within(
    latents: Floats,
    beside: Sequence[tuple[Item, Floats]],
    part: Window,
    place: Place,
    noise: Noise,
) -> Conditioned:
    """As of a clip that begins one latent frame earlier, without that one."""
    if part.first == 0:
        return condition(latents, beside, place, noise)
    longer = replace(place.shape, frames=place.shape.frames + TIME)
    before = np.zeros_like(latents[:, :, :1])
    found = condition(
        np.concatenate([before, latents], axis=2), beside, replace(place, shape=longer), noise
    )
    _, rows, columns = place.shape.latent
    gone = slice(found.extra, found.extra + rows * columns)
    strengths = found.strengths
    return Conditioned(
        np.delete(found.latents, gone, axis=1),
        np.delete(found.coordinates, gone, axis=2),
        None if strengths is None else np.delete(strengths, gone, axis=1),
        found.extra,
    )
