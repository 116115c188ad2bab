"""What a clip is to show or to begin from, as a user says it: `--image photo.png@24:0.5`.

    PATH[@FRAME][:STRENGTH]      FRAME counts from 0, or from the end: -1 is the last

Where items may stand is the original's rule: an image at any frame, a video at multiples of 8, cut
to 8k + 1 frames that are within the clip.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_engines.shapes import TIME, VideoShape, counted
from ltx_trt import media_files, preprocessing
from ltx_trt.conditioning import Item
from ltx_trt.media_files import Kind
from ltx_trt.passes import choose_shape
from ltx_trt.request import Request, Wishes
from ltx_trt.resampling import resize

Floats = NDArray[np.float32]

SUFFIX = re.compile(
    r"(?P<path>.+?)(?:@(?P<frame>[+-]?\d+))?(?::(?P<strength>[^:@/\\]*))?", re.DOTALL
)

SHORTEST = TIME + 1
"""Frames of a video. What is shorter holds one latent frame, as an image does."""

LOST = 0.01
"""More than this share of a picture is not cut away without a word."""


@dataclass(frozen=True, slots=True)
class Wish:
    """`frame` below 0 counts from the end. `kind` None: whatever the file is. A video that is not
    `fitted` has the size of the clip; images are fitted always."""

    path: Path
    frame: int = 0
    strength: float = 1.0
    kind: Kind | None = None
    fitted: bool = False


@dataclass(frozen=True, slots=True)
class Media:
    """All that a run reads from files of pictures; each of them is there, and is what it should."""

    items: tuple[Wish, ...] = ()
    input_video: Wish | None = None
    image_cond_noise_scale: float | None = None

    @property
    def wishes(self) -> tuple[Wish, ...]:
        """All files that are read."""
        return self.items if self.input_video is None else (*self.items, self.input_video)

    @property
    def notes(self) -> tuple[str, ...]:
        """On what was said and does nothing."""
        if self.image_cond_noise_scale is None or any(item.strength == 1 for item in self.items):
            return ()
        why = (
            "what the clip is held to has strengths below 1"
            if self.items
            else ("without an --image or --video")
        )
        return (f"--image-cond-noise-scale has no effect: {why}",)


def parse(text: str, kind: Kind | None = None) -> Wish:
    """
    Raises:
        UserError: frame or strength are none.
    """
    if Path(text).is_file():
        return Wish(Path(text), kind=kind)
    found = SUFFIX.fullmatch(text)
    if found is None:
        raise UserError(f"{text!r} names no file; write PATH[@FRAME][:STRENGTH]")
    path, frame, strength = found["path"], found["frame"], found["strength"]
    if not Path(path).exists():
        _check_suffix(text)
    return Wish(Path(path), int(frame or 0), _strength(text, strength), kind)


def _check_suffix(text: str) -> None:
    """Whether a file is named, and something strange behind it."""
    for mark, what in (("@", "FRAME is a whole number"), (":", "STRENGTH is from 0 to 1")):
        path, said, after = text.partition(mark)
        if said and Path(path).is_file():
            raise UserError(
                f"{text}: write {path}[@FRAME][:STRENGTH], not {mark + after!r}; {what}"
            )


def media(wishes: Wishes) -> Media:
    """
    Raises:
        UserError: a file, frame or strength that cannot be meant. Nothing of a model is needed.
    """
    items = (
        *(parse(text, "image") for text in wishes.image),
        *(replace(parse(text, "video"), fitted=wishes.resize) for text in wishes.video),
        *_originals(wishes),
    )
    for item in items:
        media_files.kind(item.path, item.kind)
    return Media(items, _begun_from(wishes), wishes.image_cond_noise_scale)


def outline(request: Request, media: Media) -> Request:
    """The request with grey in place of the pictures: what it is refused for can be said before
    they are read.

    Raises:
        UserError: something does not fit into this clip.
    """
    placed = _fitting(request, media)
    made = choose_shape(request)
    one = _grey(replace(made, frames=1))
    return replace(
        request,
        conditioning=tuple(Item(one, wish.frame, wish.strength) for wish in placed),
        input_video=None if media.input_video is None else _grey(made),
    )


Prepared = Callable[[Path], object]
"""Told of each picture that is ready."""


def attach(
    request: Request, media: Media, prepared: Prepared = lambda _: None
) -> tuple[Request, tuple[str, ...]]:
    """The request with the pictures it needs, and notes on what is not taken of them.

    Raises:
        UserError: something does not fit into this clip, or cannot be read.
    """
    placed = _fitting(request, media)
    notes = [note for wish in media.wishes for note in _of_size(wish, request)]
    items = tuple(_item(wish, request, notes, prepared) for wish in placed)
    request = replace(request, conditioning=items)
    if media.image_cond_noise_scale is not None:
        request = replace(request, image_cond_noise_scale=media.image_cond_noise_scale)
    if media.input_video is not None:
        start = _start(media.input_video, request, prepared)
        request = replace(request, input_video=start)
    return request, (*media.notes, *notes)


def _originals(wishes: Wishes) -> Iterator[Wish]:
    """The original's three lists: files, strengths (1 if none is said), frames."""
    paths, frames = wishes.conditioning_media_paths, wishes.conditioning_start_frames
    strengths = wishes.conditioning_strengths or (1.0,) * len(paths)
    for name, given in (
        ("--conditioning-start-frames", frames),
        ("--conditioning-strengths", strengths),
    ):
        if len(given) != len(paths):
            raise UserError(
                f"--conditioning-media-paths names {len(paths)}, {name} {len(given)}; give one "
                "for each file"
            )
    for path, frame, strength in zip(paths, frames, strengths, strict=True):
        yield Wish(Path(path), frame, _strength(path, str(strength)), fitted=True)


def _begun_from(wishes: Wishes) -> Wish | None:
    """Of both ways to say it; the original resizes what it is given."""
    ours, theirs = wishes.input_video, wishes.input_media_path
    if ours is not None and theirs is not None:
        raise UserError("--input-media-path is the original's --input-video; leave one of them out")
    said = theirs if ours is None else ours
    if said is None:
        return None
    kind = media_files.kind_if_moving(Path(said))
    return Wish(Path(said), kind=kind, fitted=wishes.resize or ours is None)


def _strength(text: str, said: str | None) -> float:
    try:
        strength = 1.0 if said is None else float(said)
    except ValueError:
        strength = math.nan
    if not 0 <= strength <= 1:
        raise UserError(f"{text}: a strength is from 0 to 1, not {said!r}")
    return strength


def _fitting(request: Request, media: Media) -> tuple[Wish, ...]:
    """The items at their frames; all that is checked without reading a file to its end."""
    placed = tuple(_placed(item, request.num_frames) for item in media.items)
    _check_apart(placed)
    for wish in placed:
        if wish.kind == "video":
            _check_room(f"{wish.path}@{wish.frame}", wish.frame, request.num_frames - wish.frame)
            _check_shortest(wish.path, media_files.count(wish.path))
    for wish in media.wishes:
        _check_size(wish, request)
    if (start := media.input_video) is not None:
        frames = 1 if start.kind == "image" else media_files.count(start.path)
        _check_enough(start.path, frames, choose_shape(request))
    return placed


def _grey(shape: VideoShape) -> Floats:
    """Of one number in memory."""
    size = (1, 3, shape.frames, shape.height, shape.width)
    return np.broadcast_to(np.float32(0), size)


def _placed(wish: Wish, num_frames: int) -> Wish:
    frame = wish.frame + num_frames * (wish.frame < 0)
    if not 0 <= frame < num_frames:
        raise UserError(
            f"{wish.path}@{wish.frame}: the clip has {counted(num_frames)}, 0 to {num_frames - 1} "
            f"or -{num_frames} to -1; choose one of them, or a longer clip (--num-frames)"
        )
    return replace(wish, frame=frame)


def _check_apart(wishes: Sequence[Wish]) -> None:
    at: dict[int, Wish] = {}
    for wish in wishes:
        if (other := at.setdefault(wish.frame, wish)) is not wish:
            raise UserError(
                f"{other.path} and {wish.path} are both to stand at frame {wish.frame}; move one "
                f"of them: {wish.path}@FRAME"
            )


def _item(wish: Wish, request: Request, notes: list[str], prepared: Prepared) -> Item:
    of = media_files.kind(wish.path, wish.kind)
    room = 1 if of == "image" else _whole(request.num_frames - wish.frame)
    found = media_files.pictures(wish.path, of)
    height, width, made = request.height, request.width, choose_shape(request)
    pictures = []
    for picture in islice(found, room):
        ready = preprocessing.prepare(picture, height, width)
        pictures.append(_sized(ready, request, made))
        prepared(wish.path)
    pixels = _stacked(pictures)
    if wish.kind == "video":
        _check_shortest(wish.path, pixels.shape[2])
    if pixels.shape[2] > 1:
        _check_multiple(f"{wish.path}@{wish.frame}", wish.frame)
    if of == "video":
        more = len(pictures) > pixels.shape[2] or next(found, None) is not None
        notes += _of_video(wish.path, pixels.shape[2], request, more=more)
    return Item(pixels, wish.frame, wish.strength)


def _check_shortest(path: Path, frames: int) -> None:
    if frames < SHORTEST:
        raise UserError(
            f"{path} has less than {SHORTEST} frames, a video has {SHORTEST} at least; make "
            "an image of one of them and use --image"
        )


def _check_room(said: str, frame: int, left: int) -> None:
    """Of a video, before it is read."""
    _check_multiple(said, frame)
    if left < SHORTEST:
        raise UserError(
            f"{said}: {counted(left)} of the clip {'is' if left == 1 else 'are'} left from there, "
            f"a video takes {SHORTEST} at least; let it begin earlier, or use --image"
        )


def _check_multiple(said: str, frame: int) -> None:
    if frame % TIME:
        near = frame // TIME * TIME
        raise UserError(
            f"{said}: a video begins at a multiple of {TIME}; try @{near} or @{near + TIME}"
        )


def _start(wish: Wish, request: Request, prepared: Prepared) -> Floats:
    """What video-to-video begins from: as many frames as are made."""
    made, of = choose_shape(request), wish.kind or "video"
    pictures = []
    for picture in islice(media_files.pictures(wish.path, of), made.frames):
        pictures.append(preprocessing.prepare_resized(picture, request.height, request.width))
        prepared(wish.path)
    _check_enough(wish.path, len(pictures), made)
    return _stacked(pictures)


def _check_enough(path: Path, frames: int, made: VideoShape) -> None:
    """To begin a clip from."""
    if frames < made.frames:
        raise UserError(
            f"{path} has {counted(frames)}, the clip is made of {made.frames}; take a longer "
            f"video, or ask for --num-frames {_whole(frames)}"
        )


def _sized(pixels: Floats, request: Request, made: VideoShape) -> Floats:
    """A run of two passes resizes it for each of them, as the original does."""
    return resize(pixels, made.height, made.width) if request.second is None else pixels


def _check_size(wish: Wish, request: Request) -> None:
    """Of its first picture."""
    of = media_files.kind(wish.path, wish.kind)
    rows, columns = media_files.size(wish.path, of)
    if (rows, columns) == (request.height, request.width):
        return
    said = f"{wish.path} is {columns} x {rows}, the clip is {request.width} x {request.height}"
    if of == "video" and not wish.fitted:
        raise UserError(
            f"{said} (width x height); give --width {columns} --height {rows}, or --resize"
        )
    if request.strict_shape:
        raise UserError(f"{said}; make the two equal, or leave out --strict-shape")


def _of_size(wish: Wish, request: Request) -> Iterator[str]:
    """What is done to it. An image is resized without a word."""
    of = media_files.kind(wish.path, wish.kind)
    height, width = media_files.size(wish.path, of)
    if (height, width) == (request.height, request.width):
        return
    said, wished = f"{wish.path} is {width} x {height}", f"{request.width} x {request.height}"
    ratio = width / height / (request.width / request.height)
    if max(ratio, 1 / ratio) > 1 / (1 - LOST):
        yield f"{said}: cut to the aspect of {wished}{' and resized' if of == 'video' else ''}"
    elif of == "video":
        yield f"{said}: resized to {wished}"


def _of_video(path: Path, taken: int, request: Request, *, more: bool) -> Iterator[str]:
    if more:
        yield f"of {path} the first {f'{taken} frames are' if taken > 1 else 'frame is'} taken"
    rate = media_files.frame_rate(path)
    if taken > 1 and rate and not math.isclose(rate, request.frame_rate, rel_tol=0.01):
        yield (
            f"{path} has {rate:g} frames a second, the clip {request.frame_rate:g}: they are taken "
            "one for one"
        )


def _whole(frames: int) -> int:
    """The most of them that are 8k + 1."""
    return (frames - 1) // TIME * TIME + 1


def _stacked(pictures: Iterable[Floats]) -> Floats:
    """[1, 3, f, rows, columns] of the first 8k + 1 of them [3, rows, columns]."""
    found = list(pictures)
    return np.stack(found[: _whole(len(found))], axis=1)[None]
