"""Latents become frames, a chunk of them after the other, so that a long clip needs no more memory.

A session that says so (`Tiling`) is given a clip in tiles. All tiles of one stretch of time are put
together, then the next stretch; where two stretches overlap, the first waits for the second. Or it
goes on where it was (`Streaming`): that takes as little memory, and gives the untiled clip.

f h w the latent grid; n frames; H W rows and columns of pixels
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ltx_engines.manifest import ModelFacts
from ltx_engines.shapes import TIME, VideoShape
from ltx_trt import tiles
from ltx_trt.denoising import check_finite
from ltx_trt.multi_scale import tone_map
from ltx_trt.noise import Noise
from ltx_trt.resampling import resize
from ltx_trt.session import Session
from ltx_trt.tiles import Axes, Part, Streamed, Tiling

Floats = NDArray[np.float32]
Frames = NDArray[np.uint8]


class Size(Protocol):
    """Of a frame."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Decoding:
    """`timestep` and `noise_scale` are for decoders with timestep conditioning: the noise level
    that the latents are told to have, and the share of noise that they are given. A
    `tone_map_compression_ratio` of 0 leaves the latents as they are."""

    model: ModelFacts
    timestep: float = 0.05
    noise_scale: float = 0.025
    tone_map_compression_ratio: float = 0.0


def ready(session: Session, latents: Floats) -> None:
    """One that is opened as a clip needs it is open now."""
    if isinstance(session, Tiling):
        session.tile(latents.shape[2:])


def decode(
    session: Session, latents: Floats, decoding: Decoding, noise: Noise
) -> Generator[Floats, None, None]:
    """Pixels [1, 3, n, H, W] from about -1 to 1, in order, of latents [1, C, f, h, w]."""
    feeds = _feeds(latents, decoding, noise)
    grid = latents.shape[2:]
    tile = session.tile(grid) if isinstance(session, Tiling) else None
    if tile is None:
        yield _decoded(session, feeds)
        return
    if isinstance(tile, Streamed):
        if not isinstance(session, Streaming):
            raise ValueError("this decoder cannot go on where it was")
        delay = decoding.model.stream_delay
        yield from _streamed(session.begin(), feeds, Piece(tile.frames, delay))
        return
    scales = {block.name: block.scale for block in decoding.model.noise_blocks}
    yield from _Tiles(session, feeds, scales).decode(tiles.decoding(grid, tile))


@runtime_checkable
class Streaming(Protocol):
    """A decoder's session that can go on where it was."""

    def begin(self) -> Session:
        """For one clip: given some latent frames and their `place`, the pixels of as many, late.
        What its convolutions keep, it keeps."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Of a stream: latent frames, and by how many frames its pixels are late."""

    latents: int
    delay: int


def _streamed(
    stream: Session, feeds: dict[str, Floats], piece: Piece
) -> Generator[Floats, None, None]:
    """The clip's end comes out when as much has gone in behind it as the decoder is late."""
    latents, total = feeds["latents"], feeds["latents"].shape[2]
    frames = TIME * (total - 1) + 1
    for first in range(0, ceil((frames + piece.delay) / TIME), piece.latents):
        number = np.minimum(np.arange(first, first + piece.latents), total - 1)
        place = np.array([first, total], np.int64)
        pixels: Floats = stream({**feeds, "latents": latents[:, :, number], "place": place})[
            "pixels"
        ]
        begin = TIME * first - piece.delay
        made = pixels[:, :, max(0, -begin) : max(0, frames - begin)]
        if made.shape[2]:
            check_finite(made, "the decoder's pixels")
            yield made


def _feeds(latents: Floats, decoding: Decoding, noise: Noise) -> dict[str, Floats]:
    """Of the whole clip: noise is drawn once, whatever the tiles."""
    model, feeds = decoding.model, {"latents": latents}
    if model.timestep_conditioning:
        scale = np.float32(decoding.noise_scale)
        fresh = noise.normal(latents.shape)
        feeds["latents"] = latents * (1 - scale) + fresh * scale
        feeds["timestep"] = np.full(1, decoding.timestep, np.float32)
    if ratio := decoding.tone_map_compression_ratio:
        feeds["latents"] = tone_map(feeds["latents"], ratio)
    rows, columns = latents.shape[3:]
    for block in model.noise_blocks:
        size = (block.maps, rows * block.scale, columns * block.scale)
        feeds[block.name] = noise.normal(size)
    return feeds


def _decoded(session: Session, feeds: dict[str, Floats]) -> Floats:
    pixels: Floats = session(feeds)["pixels"]
    check_finite(pixels, "the decoder's pixels")
    return pixels


@dataclass(frozen=True, slots=True)
class _Tiles:
    """`feeds` are of the whole clip; `scales` say how much finer than the latents a noise is."""

    session: Session
    feeds: dict[str, Floats]
    scales: dict[str, int]

    def decode(self, axes: Axes) -> Generator[Floats, None, None]:
        """What no later tile touches, as soon as that is so."""
        waiting = None
        following = [*(part.pixels.start for part in axes.frames[1:]), axes.frames[-1].pixels.stop]
        for part, end in zip(axes.frames, following, strict=True):
            canvas = self._stretch(part, axes)
            if waiting is not None:
                canvas[:, :, : waiting.shape[2]] += waiting
            done = end - part.pixels.start
            yield canvas[:, :, :done]
            waiting = canvas[:, :, done:].copy()
            del canvas  # before the next is made

    def _stretch(self, time: Part, axes: Axes) -> Floats:
        """All tiles of these frames, each times its weights."""
        if len(axes.rows) == len(axes.columns) == 1:
            whole = _decoded(self.session, dict(self._cut(time, axes.rows[0], axes.columns[0])))
            return _weighed(whole, time.weights)
        height, width = axes.rows[-1].pixels.stop, axes.columns[-1].pixels.stop
        canvas = np.zeros((1, 3, len(time.weights), height, width), np.float32)
        for rows in axes.rows:
            for columns in axes.columns:
                tile = _decoded(self.session, dict(self._cut(time, rows, columns)))
                weights = rows.weights[:, None] * columns.weights
                for frame, weight in enumerate(time.weights):
                    part = canvas[0, :, frame, rows.pixels, columns.pixels]
                    part += tile[0, :, frame] * (weight * weights)
        return canvas

    def _cut(self, time: Part, rows: Part, columns: Part) -> Iterator[tuple[str, Floats]]:
        for name, feed in self.feeds.items():
            if name == "latents":
                cells = feed[:, :, time.cells, rows.cells, columns.cells]
                yield name, np.ascontiguousarray(cells)
            elif name in self.scales:
                finer = (_times(part.cells, self.scales[name]) for part in (rows, columns))
                yield name, np.ascontiguousarray(feed[(slice(None), *finer)])
            else:
                yield name, feed


def _weighed(pixels: Floats, weights: Floats) -> Floats:
    """Where they are, if they may be changed there."""
    if not pixels.flags.writeable:
        pixels = pixels.copy()
    for frame in np.flatnonzero(weights != 1):
        pixels[:, :, frame] *= weights[frame]
    return pixels


def _times(cells: slice, scale: int) -> slice:
    return slice(scale * cells.start, scale * cells.stop)


def finished(pixels: Floats, made: VideoShape, wished: Size, most: int) -> Frames:
    """The first `most` frames of a chunk, in the size of the clip that is `made`, of which the
    wished part is cut out."""
    chunk = np.empty((min(most, pixels.shape[2]), wished.height, wished.width, 3), np.uint8)
    for index in range(len(chunk)):  # one at a time, for the sake of memory
        frame = np.clip(pixels[:, :, index : index + 1], -1, 1)
        sized = to_frames(resize(frame, made.height, made.width))
        chunk[index] = crop(sized, 1, wished.height, wished.width)[0]
    return chunk


def to_frames(pixels: Floats) -> Frames:
    """[1, 3, frames, height, width] in -1..1 -> [frames, height, width, 3]; truncates, as the
    original does."""
    unit = np.clip(pixels[0] / np.float32(2) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray((unit * np.float32(255)).astype(np.uint8).transpose(1, 2, 3, 0))


def crop(frames: Frames, count: int, height: int, width: int) -> Frames:
    """The first `count` frames, cut out of the middle; an odd pixel is cut at bottom and right."""
    top, left = ((frames.shape[axis] - size) // 2 for axis, size in ((1, height), (2, width)))
    return np.ascontiguousarray(frames[:count, top : top + height, left : left + width])
