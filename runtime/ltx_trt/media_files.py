"""Pictures out of a file that somebody named: an image, or the frames of a video.

What a file is decides its content, not its name. Pictures come upright, as a viewer shows them:
phones write them lying and say so beside.
"""

import struct
import warnings
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError

Picture = NDArray[np.uint8]
Kind = Literal["image", "video"]

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Of Pillow's, those that hold a picture as pixels; some others start programs."""

CONTAINERS = {
    *("3gp", "apng", "asf", "avi", "flv", "gif", "h264", "hevc", "ivf", "m4v", "matroska", "mov"),
    *("mp4", "mpeg", "mpegts", "mpegvideo", "mxf", "obu", "ogg", "webm", "wmv", "yuv4mpegpipe"),
}
"""Of FFmpeg's; others make a video of any text, or read what a playlist names."""


def kind(path: Path, wanted: Kind | None = None) -> Kind:
    """
    Raises:
        UserError: there is no such file, or it is neither, or not the one that is wanted.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one {wanted or 'image or video'} in it")
    if not path.is_file():
        if path.exists():
            raise UserError(f"{path} is no ordinary file; name {_article(wanted)}")
        raise UserError(f"there is no file {path}; name {_article(wanted)}")
    with path.open("rb") as file:
        if not file.read(1):
            raise UserError(f"{path} is empty; name {_article(wanted)}")
    frames = _image_frames(path)
    if frames is not None and (wanted != "video" or frames == 1):
        found: Kind = "image"
    elif _has_video(path):
        found = "video"
    else:
        raise UserError(f"{path} is no {wanted or 'image or video'} that can be read here")
    if wanted not in (None, found):
        raise UserError(f"{path} is {_article(found)}, not {_article(wanted)}; use --{found}")
    return found


def kind_if_moving(path: Path) -> Kind:
    """As `kind`, but a picture that moves is a video, whatever program made it."""
    found = kind(path)
    if found == "image" and (_image_frames(path) or 1) > 1:
        return kind(path, "video")
    return found


def pictures(path: Path, of: Kind) -> Generator[Picture, None, None]:
    """[rows, columns, 3], all of one size.

    Raises:
        UserError: the file is damaged.
    """
    size: tuple[int, ...] | None = None
    for picture in _image(path) if of == "image" else _frames(path):
        if size not in (None, picture.shape):
            raise UserError(f"the frames of {path} change their size; convert it to one size")
        size = picture.shape
        yield picture


def size(path: Path, of: Kind) -> tuple[int, int]:
    """Rows and columns of its first picture.

    Raises:
        UserError: the file is damaged.
    """
    with closing(pictures(path, of)) as found:
        rows, columns, _ = next(found).shape
    return rows, columns


def count(path: Path) -> int:
    """Frames of a video, none of which is decoded.

    Raises:
        UserError: the file is damaged.
    """
    import av

    try:
        with av.open(str(path)) as container:
            return sum(packet.size > 0 for packet in container.demux(video=0))
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be read to its end ({error}); write it anew") from None


def frame_rate(path: Path) -> float | None:
    """Of a video, if it says so."""
    import av

    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    return None if rate is None else float(rate)


def _article(of: Kind | None) -> str:
    return {"image": "an image", "video": "a video", None: "an image or a video"}[of]


def _image_frames(path: Path) -> int | None:
    """None: Pillow does not know it."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures, which are fine
        try:
            with Image.open(path, formats=_known()) as image:
                return int(getattr(image, "n_frames", 1))
        except _broken():
            return None


def _has_video(path: Path) -> bool:
    import av

    try:
        with av.open(str(path)) as container:
            known = CONTAINERS.intersection(container.format.name.split(","))
            return bool(known and container.streams.video)
    except av.FFmpegError:
        return False


def _image(path: Path) -> Generator[Picture, None, None]:
    """The first, if it is moving."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=_known()) as image:
                upright = ImageOps.exif_transpose(image)
                yield np.asarray(upright.convert("RGB"))
        except _broken() as error:
            raise UserError(f"{path} cannot be read to its end ({error}); save it anew") from None


def _known() -> list[str]:
    """Of FORMATS, those that this Pillow was built with."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _broken() -> tuple[type[Exception], ...]:
    """What Pillow raises at damaged files."""
    from PIL import Image

    return (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def _frames(path: Path) -> Generator[Picture, None, None]:
    import av

    count = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                quarters = round(frame.rotation / 90)  # counterclockwise
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters))
                count += 1
    except av.FFmpegError as error:
        raise UserError(f"{path} is damaged after {count} frames ({error}); cut it there") from None
    if not count:
        raise UserError(f"{path} is a video without frames")
