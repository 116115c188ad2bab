"""What of a batch is on the disk: a finished clip never looks unfinished, nor the reverse.

    out/fox.mp4, fox.json              a clip that is finished, and the report that says so
    out/.fox.partial/                  a clip that is being made, or was when its maker was killed
    out/.fox.partial/fox.json          the one moment: once it is here, the clip will be finished
    out/.fox.lock                      somebody is at it; the system takes it back when he ends

Everything is on the disk before the moment, and may be repeated after it: whoever finds the report
in the partial folder moves both to where they belong. A clip is finished when its report is there
and its files are of the size that the report says.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ltx_engines import file_lock
from ltx_engines.errors import UserError

Form = Literal["mp4", "gif", "png"]
Facts = Mapping[str, Any]
"""What a clip is made of, as JSON: the job's keys, the bundle, and whatever else decides it."""

FORMAT = 2
KEYS = {"format", "made_of", "run", "clip", "bytes", "report"}
"""Of the file of a report. Before format 2 the clip's form was in `made_of` alone."""


@dataclass(frozen=True, slots=True)
class Place:
    """Of one job in the folder. `form` png: the clip is a folder of frames."""

    folder: Path
    name: str
    form: Form

    @property
    def file(self) -> str:
        return self.name if self.form == "png" else f"{self.name}.{self.form}"

    @property
    def clip(self) -> Path:
        return self.folder / self.file

    @property
    def report(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def partial(self) -> Path:
        return self.folder / f".{self.name}.partial"

    @property
    def lock(self) -> Path:
        """As `file_lock.beside` names it."""
        return self.folder / f".{self.name}.lock"

    @property
    def tries(self) -> Path:
        """The run, how often it has begun this, and the process that is at it."""
        return self.partial / "tries"


@dataclass(frozen=True, slots=True)
class Finished:
    """`report` is of the clip, as `ltx-trt run --json` prints it; `run` is the command's name."""

    facts: Facts
    report: Mapping[str, Any]
    run: str


def find(place: Place) -> Finished | None:
    """The finished clip, if it is there, in whatever form. Nothing is changed."""
    told = _read(place.report)
    if told is None or _size(place.folder / told["clip"]) != told["bytes"]:
        return None
    return Finished(told["made_of"], told["report"], told["run"])


def reported(place: Place) -> Finished | None:
    """What was finished of this name; the clip itself may be gone since."""
    told = _read(place.report)
    return None if told is None else Finished(told["made_of"], told["report"], told["run"])


def clips(place: Place) -> tuple[Path, ...]:
    """Those that go when this one is made: what is at its place, and a finished one of another
    form."""
    told = _read(place.report)
    names = (place.file, *(() if told is None else (told["clip"],)))
    return tuple(place.folder / name for name in dict.fromkeys(names))


def claim(place: Place) -> AbstractContextManager[bool]:
    """Whether this process has the job for itself now, until the block ends."""
    return file_lock.beside(place.folder / place.name)


def settle(place: Place) -> Finished | None:
    """Finish what was interrupted after its one moment. Only for whoever has claimed the job."""
    if (place.partial / place.report.name).exists():
        _publish(place)
    if (finished := find(place)) is not None:
        _remove(place.partial)
    return finished


def begin(place: Place, run: str) -> int:
    """A folder to make the clip in; returns how often this run has begun it. What was left behind
    there goes, and so does a clip that another one shall replace, be it of another form."""
    before, count, *_ = (*_text(place.tries).split(), "", "")
    tries = 1 + (int(count) if before == run and count.isdigit() else 0)
    _remove(place.partial)
    place.partial.mkdir()
    place.tries.write_text(f"{run} {tries} {os.getpid()}")
    replaced = clips(place)
    for other in replaced[1:]:
        _remove(other)  # before the report, which alone knows its name
    place.report.unlink(missing_ok=True)  # first: without it, the clip is not finished
    _remove(replaced[0])
    return tries


def commit(place: Place, finished: Finished) -> None:
    """The clip, which is complete in the partial folder, is finished from now on."""
    clip = place.partial / place.file
    for path in [*clip.glob("*"), clip]:
        _flush(path)
    told = {
        "format": FORMAT,
        "made_of": finished.facts,
        "run": finished.run,
        "clip": place.file,
        "bytes": _size(clip),
        "report": finished.report,
    }
    draft = place.partial / "draft"
    draft.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    _flush(draft)
    os.replace(draft, place.partial / place.report.name)
    _flush(place.partial)
    _publish(place)


def discard(place: Place) -> None:
    """What is unfinished, goes. Only for whoever has claimed the job."""
    settle(place)
    _remove(place.partial)


def sweep(place: Place) -> None:
    """What is left of a clip that nobody is making; one that is finished comes to its place."""
    if not (place.partial.exists() or place.lock.exists()):
        return
    with claim(place) as free:
        if free:
            discard(place)


def check(folder: Path) -> None:
    """
    Raises:
        UserError: no batch can be there.
    """
    if os.path.lexists(folder):
        if not (folder.is_dir() and _takes(folder)):
            raise UserError(
                f"{folder} is there and not an empty folder, nor one of a batch; choose a new one"
            )
        _check_writable(folder, folder)
        return
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{folder}: there is no folder {parent}; create it first")
    _check_writable(folder, parent)


def check_free(place: Place) -> None:
    """
    Raises:
        UserError: something of the job's name is there that no batch has made.
    """
    if place.partial.is_dir():  # somebody was killed in the middle of it
        return
    told = _read(place.report)
    if os.path.lexists(place.report) and told is None:
        raise UserError(
            f"{place.report} is there and not the report of a clip; move it, or name the job "
            "otherwise"
        )
    if os.path.lexists(place.clip) and (told is None or told["clip"] != place.file):
        report = f"its report {place.report.name}" if told is None else "a report of its own"
        raise UserError(
            f"{place.clip} is there without {report}: it is not of a batch; move it, or name the "
            "job otherwise"
        )


def _takes(folder: Path) -> bool:
    """Empty, or there is something of a batch in it."""
    if not any(folder.iterdir()):
        return True
    if any(any(folder.glob(f".*.{word}")) for word in ("partial", "lock")):
        return True
    return any(_read(path) is not None for path in folder.glob("*.json"))


def _check_writable(wished: Path, folder: Path) -> None:
    from tempfile import TemporaryFile

    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write in {wished}: {error.strerror}; choose another") from None


def _publish(place: Place) -> None:
    """Any part of it may have been done before. The report comes last, and names the clip: this
    command may wish another form."""
    told = _read(place.partial / place.report.name)
    name = place.file if told is None else told["clip"]
    if (place.partial / name).exists():
        os.replace(place.partial / name, place.folder / name)
        _flush(place.folder)
    os.replace(place.partial / place.report.name, place.report)
    _flush(place.folder)
    _remove(place.partial)


def _read(path: Path) -> dict[str, Any] | None:
    """A report of ours; None if there is none, or it is of something else.

    Raises:
        UserError: it is of a later program.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    if not (isinstance(told, dict) and {"format", "made_of"} <= told.keys()):
        return None
    if told["format"] not in range(1, FORMAT + 1):
        raise UserError(
            f"{path} is of format {told['format']!r}, this ltx-trt reads up to {FORMAT}; use the "
            "one that wrote it, or another folder"
        )
    if told["format"] == 1 and told.keys() == KEYS - {"clip"}:
        form = told["made_of"].get("format", "mp4")
        told["clip"] = Place(path.parent, path.stem, form).file
    return told if told.keys() == KEYS else None


def _size(clip: Path) -> int:
    """Bytes of the file, or of all frames; -1 if there is none."""
    if clip.is_dir():
        return sum(path.stat().st_size for path in _files(clip))
    try:
        return clip.stat().st_size
    except OSError:
        return -1


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file())


def _text(path: Path) -> str:
    with suppress(OSError, ValueError):
        return path.read_text()
    return ""


def _flush(path: Path) -> None:
    """Onto the disk. Windows does so for files only."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
