"""A finished clip as somebody names it: a video file, a GIF, a folder of PNG frames, one picture.

Frames are read one after the other, so that a long clip takes no more memory than a short one.
"""

import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from ltx_engines.errors import UserError
from ltx_trt import media_files
from ltx_trt.media_files import Picture


@dataclass(frozen=True, slots=True)
class Clip:
    """`files` are those of its frames, or the one that holds them all. `frames` are as many as it
    says that it has. `frame_rate` is None where nothing says it."""

    path: Path
    files: tuple[Path, ...]
    moving: bool
    frames: int
    height: int
    width: int
    frame_rate: float | None = None

    def pictures(self) -> Generator[Picture, None, None]:
        """[height, width, 3].

        Raises:
            UserError: what is there is not what it seemed to be.
        """
        for file in self.files:
            for picture in media_files.pictures(file, "video" if self.moving else "image"):
                self._check(file, picture)
                yield picture

    def _check(self, file: Path, picture: Picture) -> None:
        if picture.shape[:2] != (self.height, self.width):
            height, width, _ = picture.shape
            raise UserError(
                f"{file} is {width} x {height}, the first frame of {self.path} is {self.width} x "
                f"{self.height}; a clip has one size"
            )


def open_clip(path: Path) -> Clip:
    """Its first frame is read, and how many there are.

    Raises:
        UserError: it is none.
    """
    files: tuple[Path, ...] = (path,)
    moving, rate = False, None
    if path.is_dir():
        files = _numbered(path)
        frames = len(files)
    elif (moving := media_files.kind_if_moving(path) == "video") and (
        counted := media_files.count(path)
    ):
        frames, rate = counted, media_files.frame_rate(path)
    else:
        frames = 1
    reader = media_files.pictures(files[0], "video" if moving else "image")
    try:
        height, width, _ = next(reader).shape
    finally:
        reader.close()
    return Clip(path, files, moving, frames, height, width, rate)


def _numbered(folder: Path) -> tuple[Path, ...]:
    """By their numbers: 2 comes before 10, however they are padded."""
    found = [path for path in folder.iterdir() if path.suffix.lower() == ".png"]
    if not found:
        raise UserError(f"{folder} has no PNG frames; name a folder of them, or a video")
    for path in found:
        media_files.kind(path, "image")
    return tuple(sorted(found, key=lambda path: _with_numbers(path.name)))


def _with_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
