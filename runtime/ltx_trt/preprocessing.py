"""A picture as the model saw pictures in training: cut to the clip's aspect, a little soft, and
once through H.264, whose traces tell the model that it looks at a frame of a video.

Operation by operation the original's (`inference.py`, `crf_compressor.py`), roundings included.
"""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_engines.shapes import SPACE, snap

Floats = NDArray[np.float32]
Picture = NDArray[np.uint8]

CRF = 29
"""x264's constant rate factor; 23 is its default, more is coarser."""

LEAST = 16
"""Pixels of a side; less is no picture, and x264 wants some."""


def prepare(picture: Picture, height: int, width: int) -> Floats:
    """[3, h, w] in -1..1 of a picture [rows, columns, 3] that a clip of `height` x `width` is to
    show: the largest part of this aspect, padded in grey as the clip is. It is not resized."""
    return _padded(_softened(_cut(picture, height, width)), -height % SPACE, -width % SPACE)


def prepare_resized(picture: Picture, height: int, width: int) -> Floats:
    """Of the size that a clip of `height` x `width` is made in: what video-to-video begins from."""
    from PIL import Image

    cut = Image.fromarray(_cut(picture, height, width))
    pixels = _softened(np.asarray(cut.resize((width, height))))
    rows, columns = pixels.shape[1:]  # one less than an odd size
    whole = snap(1, height, width)
    return _padded(pixels, whole.height - rows, whole.width - columns)


def _cut(picture: Picture, height: int, width: int) -> Picture:
    """Out of the middle."""
    rows, columns = picture.shape[:2]
    aspect = width / height
    if columns / rows > aspect:
        size = rows, int(rows * aspect)
    else:
        size = int(columns / aspect), columns
    if min(size) < LEAST:
        raise UserError(
            f"{columns} x {rows} pixels are too few for a clip of {width} x {height}; take a "
            f"larger picture, of at least {LEAST} pixels each way after the cut to that aspect"
        )
    top, left = (rows - size[0]) // 2, (columns - size[1]) // 2
    return np.ascontiguousarray(picture[top : top + size[0], left : left + size[1]])


def _softened(picture: Picture) -> Floats:
    """[3, rows, columns] in -1..1; an odd last row or column is lost, as H.264 has none."""
    unit = _blurred(picture.astype(np.float32) / np.float32(255))
    rows, columns = (size // 2 * 2 for size in picture.shape[:2])
    coded = _recompressed((unit[:rows, :columns] * np.float32(255)).astype(np.uint8))
    unit = coded.astype(np.float32) / np.float32(255)
    pixels = unit.transpose(2, 0, 1) * np.float32(255) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(pixels)


def _blurred(unit: Floats) -> Floats:
    """A Gaussian of sigma 1 over three pixels each way, mirrored at the edges."""
    places = np.arange(-1, 2, dtype=np.float32)
    weights = np.exp(np.float32(-0.5) * places**2)
    weights /= weights.sum()
    around = np.pad(unit, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    rows, columns = unit.shape[:2]
    blurred = np.zeros_like(unit)
    for down, across in np.ndindex(3, 3):
        share = np.float64(weights[down] * weights[across])
        # rounded once, as by the fused multiply-add of torch's convolution: after x264, one level
        # of difference in one pixel of ten thousand is ten levels in many
        part = share * around[down : down + rows, across : across + columns]
        blurred = (part + blurred).astype(np.float32)
    return blurred


def _recompressed(picture: Picture) -> Picture:
    """As the only frame of a video."""
    import av

    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": str(CRF), "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=1, options=options)
        stream.height, stream.width = picture.shape[:2]
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r") as coded:
        return next(coded.decode(video=0)).to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def _padded(pixels: Floats, rows: int, columns: int) -> Floats:
    """By so many, in grey; the odd one at bottom and right, where the clip is cut too."""
    sides = [(missing // 2, missing - missing // 2) for missing in (rows, columns)]
    return np.pad(pixels, [(0, 0), *sides])
