"""How much of a clip a stage of the VAE is given at once: what its engines take, or as there is
memory for. A decoder goes on a few latent frames at a time before a clip is cut into tiles, since
that gives what the whole clip would.

What a graph of the VAE takes of the host was measured with ONNX Runtime 1.31 on the CPU, float32
(`benchmarks/vae_tiles.py`): nearly all of it is at the finest level, which has a sixteenth of the
pixels in as many channels as its weights say.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from types import TracebackType
from typing import NoReturn, Self

from ltx_engines import host
from ltx_engines.bundle import Bundle, Manifest, StageEntry
from ltx_engines.byte_sizes import said
from ltx_engines.cache_key import Profile
from ltx_engines.errors import UserError
from ltx_engines.shapes import SPACE, TIME, VideoShape
from ltx_engines.stages import DECODER, STREAM
from ltx_ref.checkpoint import CheckpointError, read_header
from ltx_trt import tiles
from ltx_trt.backend import Choice, Providers, VaeTile
from ltx_trt.session import Array, Feeds, Session, buckets, sizes
from ltx_trt.session.kept_frames import kept_bytes
from ltx_trt.session.onnxruntime_session import CPU, provider_name
from ltx_trt.tiles import LEAST, Cut, Grid, Streamed

VAE = frozenset({"vae_encoder", DECODER})

Wish = VaeTile | VideoShape
Choose = Callable[[Grid], Cut]
"""For a clip."""

FINEST = {
    "vae_encoder": "vae.encoder.conv_in.conv.weight",
    "vae_decoder": "vae.decoder.conv_out.conv.weight",
}
CHANNELS = 128
"""Of the finest level in every release."""

PER_PIXEL, PER_CHANNEL = 20.0, {"vae_encoder": 2.0, "vae_decoder": 1.8}
"""Bytes for each pixel of a tile, and for each of its pixels and channels of the finest level. They
are above what was measured: a decoder took 38 bytes a pixel with 16 channels and 190 to 236 with
128, an encoder 26 with 8 and 196 to 246 with 128."""

CANVAS = 2 * 3 * 4
"""Bytes for each pixel of the frames that one tile has, in the size of the clip: a stretch that is
put together, and what it shares with the next."""

PIECES = (4, 2, 1)
"""Latent frames at a time of a decoder that goes on. More would save little."""

EDGES = 2
"""Frames of each convolution's input beside those that come out."""

STRETCH = 33
"""Latent frames (257 frames) at once, at most: what is needed does not grow with the clip."""

SHARE = 2
"""One part in so many of the host's free memory is for the VAE. A choice, not a measurement."""


class TileSession:
    """Implements Session and Tiling."""

    def __init__(self, session: Session, choose: Choose) -> None:
        self._session, self.tile = session, choose

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        return self._session(feeds)

    def __enter__(self) -> Self:
        self._session.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.__exit__(kind, error, trace)


@dataclass(frozen=True, slots=True)
class EngineTiles:
    """Such as one of the profiles takes. `streams` are those of a decoder that goes on: if it is
    the only one, `profiles` has none. `scarce`: there is no room for the other, which then is for
    clips that no stream takes."""

    stage: str
    profiles: Sequence[Profile]
    manifest: Manifest
    wish: Wish
    streams: Sequence[Profile] = ()
    scarce: bool = False

    def __call__(self, grid: Grid) -> Cut:
        """
        Raises:
            UserError: what was wished no engine takes, or none takes the clip in any way.
        """
        if isinstance(self.wish, VideoShape):
            return self._checked(_wished(self.wish, grid))
        if self.wish is VaeTile.off:
            self._check_whole()
            return None
        if self.wish is VaeTile.stream and self.stage == DECODER:
            return self._streamed(grid) or self._refuse_stream(grid)
        stream = self._streamed(grid)
        if self.scarce and stream is not None:
            return stream
        if self.profiles and not self.lacks(grid):
            return None
        if stream is not None:
            return stream
        if not self.profiles:
            self._refuse_stream(grid)
        return tiles.choose(grid, self._largest(grid), lambda tile: not self.lacks(tile))

    def lacks(self, tile: Grid) -> str:
        """What the nearest profile takes instead; nothing if it is taken."""
        return buckets.refusal(self.profiles, self._sizes(tile))

    def _sizes(self, grid: Grid) -> dict[str, int]:
        return {**sizes.of_clip(shape(grid), self.manifest), "batch": 1}

    def _check_whole(self) -> None:
        if not self.profiles:
            raise UserError(
                f"no engine of {self.stage} is here, only one of {STREAM}, which takes whole rows "
                f"and columns a few frames at a time; leave out --vae-tile, or build it: "
                f"ltx-export build-engine --stages {self.stage}"
            )

    def _streamed(self, grid: Grid) -> Streamed | None:
        """With the most frames at a time of those profiles that take these rows and columns."""
        pieces = (profile["latent_frames"][2] for profile in self.streams)
        fit = [n for n in pieces if not buckets.refusal(self.streams, self._sizes((n, *grid[1:])))]
        return Streamed(max(fit)) if fit else None

    def _refuse_stream(self, grid: Grid) -> NoReturn:
        one = shape(grid)
        build = f"ltx-export build-engine --vae-stream 16 --shape {one.width}x{one.height}x9"
        if not self.streams:
            raise UserError(
                f"--vae-tile stream: {STREAM} has no engine here; leave the option out, or build "
                f"it: {build}"
            )
        lacks = buckets.refusal(self.streams, dict(zip(sizes.GRID[1:], grid[1:], strict=True)))
        raise UserError(
            f"no engine of {STREAM} takes {one.width}x{one.height}: the nearest takes {lacks}; "
            f"make such a clip, or build it: {build}"
        )

    def _checked(self, tile: Grid | None) -> Grid | None:
        self._check_whole()
        if tile is not None and (lacks := self.lacks(tile)):
            one = shape(tile)
            raise UserError(
                f"no engine of {self.stage} takes tiles of {word(tile)} (height x width x frames): "
                f"the nearest takes {lacks}; leave out --vae-tile, or build it: ltx-export "
                f"build-engine --vae-tile {one.width}x{one.height}x{one.frames}"
            )
        return tile

    def _largest(self, grid: Grid) -> Iterator[Grid]:
        """Of each profile."""
        for profile in self.profiles:
            frames, rows, columns = (
                min(cells, profile[axis][2]) for cells, axis in zip(grid, sizes.GRID, strict=True)
            )
            if _overlaps(tile := (frames, rows, columns), grid):
                yield tile


@dataclass(frozen=True, slots=True)
class HostTiles:
    """As large as fit into `budget` bytes; None: no limit is known. `per_pixel` bytes of memory are
    for each pixel of a tile. `stream` is the graph of a decoder that goes on, if there is one,
    which is `delay` frames late."""

    stage: str
    per_pixel: float
    budget: int | None
    wish: Wish
    stream: StageEntry | None = None
    delay: int = 0

    @classmethod
    def of(cls, stage: str, bundle: Bundle, choice: Choice) -> Self:
        """On a GPU, ONNX Runtime does not say what is free."""
        name = provider_name(None if choice.provider is None else choice.provider.value)
        free = host.free_memory() if name == CPU else None
        need = per_pixel(stage, _channels(stage, bundle))
        stream = bundle.manifest.stages.get(STREAM) if stage == DECODER else None
        budget = None if free is None else free // SHARE
        delay = bundle.manifest.model.stream_delay
        return cls(stage, need, budget, choice.vae_tile, stream, delay)

    def __call__(self, grid: Grid) -> Cut:
        """
        Raises:
            UserError: not even the smallest tiles fit; or a stream is wished of a bundle without.
        """
        if isinstance(self.wish, VideoShape):
            return _wished(self.wish, grid)
        if self.wish is VaeTile.off:
            return None
        if self.wish is VaeTile.stream and self.stage == DECODER:
            if self.stream is None:
                raise UserError(
                    f"--vae-tile stream: this bundle has no stage {STREAM}; export it again with "
                    "ltx-export onnx, or leave the option out"
                )
            return self._streamed(grid) or Streamed(min(PIECES))
        if grid[0] <= STRETCH and self._fits(self.need(grid, grid)):
            return None
        streamed = self._streamed(grid)
        return self._tiled(grid) if streamed is None else self._with_less_work(streamed, grid)

    def _streamed(self, grid: Grid) -> Streamed | None:
        """Of as many latent frames as there is memory for."""
        if self.stream is None:
            return None
        pieces = (piece for piece in PIECES if self._fits(self.piece_need(piece, grid)))
        return next(map(Streamed, pieces), None)

    def _with_less_work(self, streamed: Streamed, grid: Grid) -> Grid | Streamed:
        """Short clips are sooner made in tiles: a stream computes as much again as it is late."""
        number = ceil((shape(grid).frames + self.delay) / TIME / streamed.frames)
        tile = self._tile(grid, tiles.NEAR)
        if tile is None or not tiles.shares(grid, tile, tiles.NEAR):
            return streamed
        less = tiles.computed(grid, tile) < number * streamed.frames * prod(grid[1:])
        return tile if less else streamed

    def _tiled(self, grid: Grid) -> Grid:
        if (tile := self._tile(grid, tiles.SEAMLESS)) is not None:
            return tile
        frames, rows, columns = grid
        least = (min(LEAST, frames), min(LEAST, rows), min(LEAST, columns))
        raise UserError(
            f"{self.stage} needs {said(self.need(least, grid))} of the host's memory for the "
            f"smallest tiles, and may take {said(self.budget or 0)}, half of what is free; make "
            f"the clip smaller, or try it with --vae-tile {word(least)}"
        )

    def _tile(self, grid: Grid, enough: Grid) -> Grid | None:
        stretch = (min(grid[0], STRETCH), *grid[1:])
        if self._fits(self.need(stretch, grid)):
            return stretch

        def fits(tile: Grid) -> bool:
            return self._fits(self.need(tile, grid))

        return tiles.choose(grid, tiles.every(grid), fits, enough)

    def _fits(self, need: int) -> bool:
        return self.budget is None or need <= self.budget

    def piece_need(self, piece: int, grid: Grid) -> int:
        """Bytes at most, of so many latent frames at a time."""
        if self.stream is None:
            raise ValueError("there is no decoder that goes on")
        pixels = SPACE**2 * prod(grid[1:])
        frames = TIME * piece + EDGES
        return int(self.per_pixel * frames * pixels) + 2 * kept_bytes(self.stream, grid)

    def need(self, tile: Grid, grid: Grid) -> int:
        """Bytes at most."""
        one = shape(tile)
        need = int(self.per_pixel * one.frames * one.height * one.width)
        whole = tile == grid or self.stage == "vae_encoder"
        return need if whole else need + CANVAS * one.frames * SPACE**2 * prod(grid[1:])


def of_graph(stage: str, bundle: Bundle, choice: Choice) -> Choose:
    """Of what ONNX Runtime computes, which on TensorRT-RTX has profiles too."""
    made_for = bundle.manifest.onnxruntime
    profiles = made_for[stage].profiles if stage in made_for else ()
    streams = made_for[STREAM].profiles if stage == DECODER and STREAM in made_for else ()
    if choice.provider is Providers.tensorrt_rtx and (profiles or streams):
        return EngineTiles(stage, profiles, bundle.manifest, choice.vae_tile, streams)
    return HostTiles.of(stage, bundle, choice)


def per_pixel(stage: str, channels: int) -> float:
    """Bytes of memory for each pixel of a tile."""
    return PER_PIXEL + PER_CHANNEL[stage] * channels


def notes(wishes: Iterable[tuple[str, Grid]], choices: Mapping[str, Choose]) -> tuple[str, ...]:
    """On the stages that are used in tiles, of clips of these grids."""
    found = ((stage, choices[stage](grid), grid) for stage, grid in wishes if stage in choices)
    said = (_note(stage, tile, grid) for stage, tile, grid in found if tile is not None)
    return tuple(dict.fromkeys(said))


def _note(stage: str, cut: Grid | Streamed, grid: Grid) -> str:
    """For people, before the run."""
    if isinstance(cut, Streamed):
        return f"{stage}: {TIME * cut.frames} frames at a time, as with --vae-tile stream"
    number = prod(tiles.count(*pair) for pair in zip(grid, cut, strict=True))
    seams = (
        ""
        if tiles.shares(grid, cut, tiles.SEAMLESS)
        else ", which share so little that seams may show"
    )
    return f"{stage}: {number} tiles, as with --vae-tile {word(cut)}{seams}"


def shape(grid: Grid) -> VideoShape:
    frames, rows, columns = grid
    return VideoShape(TIME * (frames - 1) + 1, SPACE * rows, SPACE * columns)


def word(grid: Grid) -> str:
    """As `--vae-tile` has it."""
    one = shape(grid)
    return f"{one.height}x{one.width}x{one.frames}"


def _wished(wish: VideoShape, grid: Grid) -> Grid | None:
    frames, rows, columns = map(min, wish.latent, grid)
    return None if (tile := (frames, rows, columns)) == grid else tile


def _overlaps(tile: Grid, grid: Grid) -> bool:
    return all(t >= min(LEAST, cells) for t, cells in zip(tile, grid, strict=True))


def _channels(stage: str, bundle: Bundle) -> int:
    """Of the finest level, by the weights' own file; as in every release if it does not say."""
    for name in bundle.stage(stage).weights:
        try:
            shapes = read_header(bundle.file(name)).shapes()
        except CheckpointError:
            continue
        if FINEST[stage] in shapes:
            ends = shapes[FINEST[stage]]
            return ends[0] if stage == "vae_encoder" else ends[1]
    return CHANNELS
