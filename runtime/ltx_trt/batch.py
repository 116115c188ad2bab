"""Many prompts, one process: numbered clips in a new folder, a report on each when it is there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ltx_engines import pipeline_config
from ltx_engines.errors import UserError
from ltx_trt import media
from ltx_trt.backend import Choice, Keep
from ltx_trt.job import Clip, Report, Voice, make
from ltx_trt.pipeline import plan
from ltx_trt.request import Request, Wishes, resolve
from ltx_trt.session.choice import open_stages


@dataclass(frozen=True, slots=True)
class Batch:
    """`form` png: each clip is a folder of frames."""

    wishes: tuple[Wishes, ...]
    bundle: Path
    folder: Path
    form: Literal["mp4", "gif", "png"] = "mp4"
    pipeline_config: Path | None = None
    choice: Choice = field(default_factory=lambda: Choice(keep=Keep.fitting))


def execute(batch: Batch) -> Iterator[Report]:
    """All clips are checked before the first is begun. Those that are finished stay when a later
    one fails."""
    config = None if batch.pipeline_config is None else pipeline_config.load(batch.pipeline_config)
    voice = Voice()
    with open_stages(batch.bundle, batch.choice) as stages:
        resolved = [resolve(wishes, stages.bundle, config) for wishes in batch.wishes]
        with _filled(batch.folder):
            clips = [
                Clip(request, _check(batch, number, request))
                for number, (request, _) in enumerate(resolved)
            ]
            for clip in clips:
                stages.prepare(plan(clip.request, stages.bundle.manifest))
            voice.say(*(note for _, notes in resolved for note in notes))
            for clip in clips:
                yield make(clip, stages, voice)


def _check(batch: Batch, number: int, request: Request) -> media.Output:
    path = batch.folder / (f"{number:04d}" + ("" if batch.form == "png" else f".{batch.form}"))
    return media.check(path, count=request.num_frames, height=request.height, width=request.width)


@contextmanager
def _filled(folder: Path) -> Iterator[None]:
    """A folder that is new or was empty; a new one is not left behind empty by a failure."""
    if (there := folder.exists()) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there and not an empty folder; choose a new one")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"{folder}: there is no folder {folder.absolute().parent}; create it first")
    folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if not there and not any(folder.iterdir()):
            folder.rmdir()
        raise
