"""Command lines of the original (`python inference.py --conditioning_media_paths a.png b.mp4 ...`)
that work here as they are: its lists after one flag, its switches with a value, its file names."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from itertools import count
from pathlib import Path

from ltx_engines.errors import UserError

LISTS = (
    "--conditioning-media-paths",
    "--conditioning-strengths",
    "--conditioning-start-frames",
)

OFFLOAD = "--offload-to-cpu"
SWITCHED = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

NUMBER = re.compile(r"-\d*\.?\d+")

LETTERS = 30
"""Of a prompt, in a file's name."""


def in_our_words(words: Sequence[str]) -> list[str]:
    """`--list a b` becomes `--list a --list b`, for click wants the flag before each; and a switch
    that is followed by a value becomes one, or nothing."""
    found: list[str] = []
    flag, values = "", 0
    for word in words:
        if word.startswith("-") and not NUMBER.fullmatch(word):
            flag, values = word.replace("_", "-"), 0
            found.append(word)
            continue
        values += 1
        if flag == OFFLOAD and values == 1 and word.lower() in SWITCHED:
            if not SWITCHED[word.lower()]:
                found.pop()
        else:
            found += [flag, word] if flag in LISTS and values > 1 else [word]
    return found


@dataclass(frozen=True, slots=True)
class Unnamed:
    """A clip in this folder, which is made; its file is named when the clip's size is known."""

    folder: Path


@dataclass(frozen=True, slots=True)
class Named:
    """What the original's name for a clip says of it."""

    prompt: str
    seed: int
    height: int
    width: int
    frames: int


def destination(output: Path | None, folder: Path | None) -> Path | Unnamed:
    """What `--output` and `--output-path` say together.

    Raises:
        UserError: both are said, or the folder cannot be one.
    """
    if output is not None and folder is not None:
        raise UserError(
            f"--output-path {folder} is the original's way to say --output {output}; leave one "
            "of them out"
        )
    if output is not None:
        return output
    folder = folder or Path("outputs") / date.today().isoformat()
    for one in (folder, *folder.parents):
        if one.exists() and not one.is_dir():
            raise UserError(
                f"--output-path is a folder, and {one} is a file; name another one, or the clip "
                "itself: --output FILE"
            )
    return Unnamed(folder)


@contextmanager
def place(to: Path | Unnamed, named: Named) -> Iterator[Path]:
    """Where the clip goes. A new name is taken by an empty file until the clip is there, so that
    no other process takes it too; what stays empty goes."""
    if isinstance(to, Path):
        yield to
        return
    new = [one for one in (to.folder, *to.folder.parents) if not one.exists()]
    try:
        to.folder.mkdir(parents=True, exist_ok=True)
        path = _taken(to.folder, named)
        try:
            yield path
        finally:
            if path.exists() and path.stat().st_size == 0:
                path.unlink()
    finally:
        for one in new:  # those that are still empty: nothing was made
            with suppress(OSError):
                one.rmdir()


def _taken(folder: Path, named: Named) -> Path:
    kind, suffix = ("image", "png") if named.frames == 1 else ("video", "mp4")
    size = f"{named.height}x{named.width}x{named.frames}"
    stem = f"{kind}_output_0_{_short(named.prompt)}_{named.seed}_{size}"
    for number in count():
        path = folder / f"{stem}_{number}.{suffix}"
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise AssertionError("numbers end")


def _short(prompt: str) -> str:
    """Its first words, of letters alone."""
    kept: list[str] = []
    letters = "".join(one.lower() for one in prompt if one.isalpha() or one.isspace())
    for word in letters.split():
        if sum(map(len, kept)) + len(word) > LETTERS:
            break
        kept.append(word)
    return "-".join(kept)
