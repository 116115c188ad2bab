"""Frames become files: mp4, gif, PNG frames, contact sheets. Equal frames give equal bytes.

A file appears under its name in one rename when it is complete. `check` finds out before any work
whether that will be possible.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Literal, Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_trt.frame_spool import FrameSpool

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

COLUMNS = 6
"""Of a contact sheet."""


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
    else:
        check_file(path)
    _check_writable(path)
    return Output(path, kind)


def check_file(path: Path) -> None:
    """
    Raises:
        UserError: no file can be written there.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; choose another name")
    _check_writable(path)


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


def files(output: Output, count: int) -> Iterator[Path]:
    """All that `count` frames are written to."""
    if output.kind == "pattern":
        yield from (output.path.with_name(output.path.name % index) for index in range(count))
    else:
        yield output.path


Write = Callable[[Frames], None]
"""Takes the next frames [n, height, width, 3]."""


class Writer:
    """Frames go in as they come; the file takes its name when the `with` ends without an exception.
    Nothing is begun before the first frame, and with none there will be nothing."""

    def __init__(self, output: Output, frame_rate: float) -> None:
        self._output, self._frame_rate = output, frame_rate
        self._held = ExitStack()
        self._write: Write | None = None

    def write(self, frames: Frames) -> None:
        """The next ones, [n, height, width, 3]."""
        if self._write is None:
            self._write = self._held.enter_context(_writing(self._output, self._frame_rate))
        self._write(frames)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.__exit__(kind, error, trace)


def write(output: Output, frames: Frames, frame_rate: float) -> None:
    """[frames, height, width, 3]."""
    with Writer(output, frame_rate) as writer:
        writer.write(frames)


def _writing(output: Output, frame_rate: float) -> AbstractContextManager[Write]:
    if output.kind == "mp4":
        return _video(output.path, frame_rate)
    if output.kind == "gif":
        return _gif(output.path, frame_rate)
    if output.kind == "png":
        return _image(output.path)
    if output.kind == "pattern":
        return _numbered(output.path)
    return _folder(output.path)


def video_bytes(frames: Frames, frame_rate: float) -> bytes:
    """What `write` makes of an mp4."""
    file = BytesIO()
    with _encoding(file, frame_rate) as write_next:
        write_next(frames)
    return file.getvalue()


@contextmanager
def _video(path: Path, frame_rate: float) -> Iterator[Write]:
    with replacing(path) as temporary, _encoding(str(temporary), frame_rate) as write_next:
        yield write_next


@contextmanager
def _encoding(file: str | BytesIO, frame_rate: float) -> Iterator[Write]:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    with av.open(file, "w", format="mp4") as container:
        rate = Fraction(frame_rate).limit_denominator(1001)
        options = {"crf": str(CRF), "x264-params": PARAMETERS}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.thread_count = THREADS
        codec.color_primaries = codec.color_trc = codec.colorspace = BT_709
        codec.color_range = LIMITED

        def write_next(frames: Frames) -> None:
            if not codec.is_open:
                stream.height, stream.width = frames.shape[1:3]
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                )
                container.mux(stream.encode(picture))

        yield write_next
        container.mux(stream.encode(None))


@contextmanager
def _gif(path: Path, frame_rate: float) -> Iterator[Write]:
    """Pillow wants all frames at once, which wait on the disk until then."""
    from PIL import Image

    milliseconds = max(20, round(100 / frame_rate) * 10)  # players slow down what is faster
    with FrameSpool() as spool:
        yield spool.add
        images = (Image.fromarray(frame) for frame in spool.clip())
        with replacing(path) as temporary:
            next(images).save(
                temporary,
                format="GIF",
                save_all=True,
                append_images=images,
                duration=milliseconds,
                loop=0,
            )


def write_image(path: Path, image: Frames) -> None:
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


@contextmanager
def _image(path: Path) -> Iterator[Write]:
    """Of one frame."""
    yield lambda frames: write_image(path, frames[0])


@contextmanager
def _folder(folder: Path) -> Iterator[Write]:
    """0000.png, 0001.png, ... in a new folder."""
    with replacing(folder) as temporary:
        temporary.mkdir()
        names = (temporary / f"{index:04d}.png" for index in count())
        yield lambda frames: _each(frames, names)


@contextmanager
def _numbered(pattern: Path) -> Iterator[Write]:
    """All or none: the frames take their names when the last is written."""
    temporary = _temporary(pattern.with_name("frames"))
    written: list[Path] = []

    def named() -> Iterator[Path]:
        for index in count():
            written.append(temporary / (pattern.name % index))
            yield written[-1]

    names = named()
    try:
        temporary.mkdir()
        yield lambda frames: _each(frames, names)
        for path in written:
            os.replace(path, pattern.with_name(path.name))
    finally:
        _remove(temporary)


def _each(frames: Frames, names: Iterator[Path]) -> None:
    for frame in frames:
        write_image(next(names), frame)


def shown(frames: int, columns: int = COLUMNS) -> list[int]:
    """Which frames of a clip a contact sheet shows."""
    places = np.linspace(0, frames - 1, min(columns, frames)).round()
    return [int(index) for index in places]


def contact_sheet(clips: Sequence[Frames], *, columns: int = COLUMNS) -> Frames:
    """A row for each clip, with up to `columns` of its frames at equal distances.

    Clips of one size; a short clip's row is filled up with black.
    """
    _, height, width, _ = clips[0].shape
    columns = min(columns, max(len(clip) for clip in clips))
    sheet = np.zeros((len(clips) * height, columns * width, 3), np.uint8)
    for row, clip in enumerate(clips):
        for column, index in enumerate(shown(len(clip), columns)):
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
