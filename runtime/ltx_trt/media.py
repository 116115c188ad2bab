"""Frames become files: mp4, gif, PNG frames, contact sheets. Equal frames give equal bytes.

A file appears under its name in one rename when it is complete. `check` finds out before any work
whether that will be possible.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError

Frames = NDArray[np.uint8]
Kind = Literal["mp4", "gif", "png", "pattern", "folder"]

CRF = 18
"""x264's constant rate factor: 0 is lossless, 18 looks so, 23 is its default."""

THREADS = 4
"""Fixed, because x264's output depends on how many it has."""

PARAMETERS = "no-mbtree=1"
"""x264's macroblock tree reads memory that nobody wrote: with it, the bytes of clips of some sizes
(64 x 128, 96 x 64) depend on what was in the process before. (libx264 of PyAV 18.1, shown with
glibc's MALLOC_PERTURB_; without assembler it does not.)"""

BT_709, LIMITED = 1, 1


@dataclass(frozen=True, slots=True)
class Output:
    """Where frames go and in which form."""

    path: Path
    kind: Kind


def check(path: Path, *, count: int, height: int, width: int) -> Output:
    """The output for a clip of this size, or an error if it cannot be written there."""
    kind = _kind(path)
    if kind == "png" and count != 1:
        numbered = path.with_name(f"{path.stem}_%04d.png")
        raise UserError(f"{path} holds one frame, not {count}; name it {numbered} or {path.stem}/")
    if kind == "mp4":
        check_even(height, width)
    if kind == "folder":
        _check_folder(path)
    elif kind == "pattern":
        for index in range(count):
            if (taken := path.with_name(path.name % index)).is_dir():
                raise UserError(f"{taken} is a folder; choose another pattern")
    elif path.is_dir():
        raise UserError(f"{path} is a folder; choose another name")
    _check_writable(path)
    return Output(path, kind)


def check_even(height: int, width: int) -> None:
    """
    Raises:
        UserError: no mp4 has such frames.
    """
    if height % 2 or width % 2:
        raise UserError(
            f"mp4 needs an even width and height, not {width} x {height}; try "
            f"{width + width % 2} x {height + height % 2}, or write a .gif or PNG frames"
        )


def write(output: Output, frames: Frames, frame_rate: float) -> None:
    """[frames, height, width, 3]."""
    if output.kind == "mp4":
        write_video(output.path, frames, frame_rate)
    elif output.kind == "gif":
        write_gif(output.path, frames, frame_rate)
    elif output.kind == "png":
        write_image(output.path, frames[0])
    elif output.kind == "pattern":
        write_numbered(output.path, frames)
    else:
        write_frames(output.path, frames)


def write_video(path: Path, frames: Frames, frame_rate: float, *, crf: int = CRF) -> None:
    with replacing(path) as temporary:
        _encode(str(temporary), frames, frame_rate, crf)


def video_bytes(frames: Frames, frame_rate: float) -> bytes:
    """What `write_video` would write."""
    file = BytesIO()
    _encode(file, frames, frame_rate, CRF)
    return file.getvalue()


def _encode(file: str | BytesIO, frames: Frames, frame_rate: float, crf: int) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    with av.open(file, "w", format="mp4") as container:
        rate = Fraction(frame_rate).limit_denominator(1001)
        options = {"crf": str(crf), "x264-params": PARAMETERS}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.thread_count = THREADS
        codec.color_primaries = codec.color_trc = codec.colorspace = BT_709
        codec.color_range = LIMITED
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def write_gif(path: Path, frames: Frames, frame_rate: float) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in frames)
    milliseconds = max(20, round(100 / frame_rate) * 10)  # players slow down what is faster
    with replacing(path) as temporary:
        first.save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=others,
            duration=milliseconds,
            loop=0,
        )


def write_image(path: Path, image: Frames) -> None:
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def write_frames(folder: Path, frames: Frames) -> None:
    """0000.png, 0001.png, ... in a new folder."""
    with replacing(folder) as temporary:
        temporary.mkdir()
        for index, frame in enumerate(frames):
            write_image(temporary / f"{index:04d}.png", frame)


def write_numbered(pattern: Path, frames: Frames) -> None:
    """All or none: the frames take their names when the last is written."""
    names = [pattern.name % index for index in range(len(frames))]
    temporary = _temporary(pattern.with_name("frames"))
    try:
        temporary.mkdir()
        for name, frame in zip(names, frames, strict=True):
            write_image(temporary / name, frame)
        for name in names:
            os.replace(temporary / name, pattern.with_name(name))
    finally:
        _remove(temporary)


def contact_sheet(clips: Sequence[Frames], *, columns: int = 6) -> Frames:
    """A row for each clip, with up to `columns` of its frames at equal distances.

    Clips of one size; a short clip's row is filled up with black.
    """
    _, height, width, _ = clips[0].shape
    columns = min(columns, max(len(clip) for clip in clips))
    sheet = np.zeros((len(clips) * height, columns * width, 3), np.uint8)
    for row, clip in enumerate(clips):
        shown = min(columns, len(clip))
        for column, index in enumerate(np.linspace(0, len(clip) - 1, shown).round().astype(int)):
            top, left = row * height, column * width
            sheet[top : top + height, left : left + width] = clip[index]
    return sheet


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` on success and vanishes on any failure."""
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _kind(path: Path) -> Kind:
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        return "mp4"
    if suffix == ".gif":
        return "gif"
    if suffix == ".png":
        return _png(path)
    if suffix and not path.is_dir():
        raise UserError(
            f"{path}: cannot write {suffix}; choose .mp4, .gif, a folder or frames_%04d.png"
        )
    return "folder"


def _png(path: Path) -> Kind:
    if "%" not in path.name:
        return "png"
    try:
        if path.name % 0 != path.name % 1:
            return "pattern"
    except (TypeError, ValueError):
        pass
    raise UserError(f"{path}: the pattern needs one number, such as frames_%04d.png")


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose .mp4, .gif, a new folder or frames_%04d.png")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"the folder {path} is not empty; choose a new one")


def _check_writable(path: Path) -> None:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{path}: there is no folder {folder}; create it first")
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _temporary(path: Path) -> Path:
    return path.absolute().with_name(f".{path.name}.{uuid4().hex[:8]}.partial")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
