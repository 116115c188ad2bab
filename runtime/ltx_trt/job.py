"""One run of the command line: checks first, then frames, then files, then a report."""

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from ltx_engines import pipeline_config
from ltx_engines.errors import UserError
from ltx_trt import media
from ltx_trt.backend import Choice
from ltx_trt.pipeline import (
    Decoded,
    Event,
    Planned,
    PromptEncoded,
    StageOpened,
    StepDone,
    generate,
    plan,
)
from ltx_trt.request import Request, Wishes, resolve
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages


@dataclass(frozen=True, slots=True)
class Job:
    wishes: Wishes
    bundle: Path
    output: Path
    pipeline_config: Path | None = None
    contact_sheet: Path | None = None
    choice: Choice = field(default_factory=Choice)


@dataclass(frozen=True, slots=True)
class Clip:
    """What to make, and where it goes: both checked."""

    request: Request
    output: media.Output
    contact_sheet: Path | None = None


class Voice:
    """Notes go to stderr, each of them once however many clips it is true of."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._said: set[str] = set()

    def say(self, *notes: str) -> None:
        for note in notes:
            if note not in self._said:
                self._said.add(note)
                self.console.print(
                    f"ltx-trt: {note}", markup=False, highlight=False, soft_wrap=True
                )

    def progress(self) -> Progress:
        """A bar, where somebody sees it; it goes when it is done."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """`sha256` is of the frames' bytes, before any encoding. `device_memory` are the bytes of the
    GPU that the run took at most; None without a GPU. `loras` are those that were added."""

    output: str
    seed: int
    frames: int
    height: int
    width: int
    frame_rate: float
    sampler: str
    sigmas: tuple[float, ...]
    seconds: dict[str, float]
    sha256: str
    device_memory: int | None = None
    loras: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        request: Request,
        frames: media.Frames,
        output: str,
        sigmas: tuple[float, ...],
        seconds: Mapping[str, float],
        device_memory: int | None,
    ) -> Self:
        count, height, width, _ = frames.shape
        return cls(
            output=output,
            seed=request.seed,
            frames=count,
            height=height,
            width=width,
            frame_rate=request.frame_rate,
            sampler=request.sampler,
            sigmas=sigmas,
            seconds={name: round(value, 4) for name, value in seconds.items()},
            sha256=sha256(frames.tobytes()).hexdigest(),
            device_memory=device_memory,
        )

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    def as_text(self) -> str:
        return (
            f"{self.output}: {self.frames} frames of {self.width} x {self.height}, "
            f"{len(self.sigmas) - 1} steps, seed {self.seed}, {sum(self.seconds.values()):.1f} s"
        )


def execute(job: Job) -> Report:
    config = None if job.pipeline_config is None else pipeline_config.load(job.pipeline_config)
    with open_stages(job.bundle, job.choice) as stages:
        request, notes = resolve(job.wishes, stages.bundle, config)
        output = _check_outputs(job, request)
        voice = Voice()
        voice.say(*notes)
        return make(Clip(request, output, job.contact_sheet), stages, voice)


def make(clip: Clip, stages: Stages, voice: Voice) -> Report:
    request = clip.request
    planned = plan(request, stages.bundle.manifest)
    voice.say(*planned.notes, *stages.prepare(planned))
    events = _follow(request, stages, voice)
    frames = next(event for event in events if isinstance(event, Decoded)).frames
    started = perf_counter()
    media.write(clip.output, frames, request.frame_rate)
    if clip.contact_sheet is not None:
        media.write_image(clip.contact_sheet, media.contact_sheet([frames]))
    seconds = {**seconds_by_stage(events), "write": perf_counter() - started}
    memory = None if stages.watch is None else stages.watch.peak
    report = Report.of(request, frames, str(clip.output.path), planned.sigmas, seconds, memory)
    return replace(report, loras=stages.loras)


def _check_outputs(job: Job, request: Request) -> media.Output:
    """Before any work: an hour of it should not end with a name that cannot be written."""
    size = {"count": request.num_frames, "height": request.height, "width": request.width}
    if (sheet := job.contact_sheet) is not None:
        if sheet.suffix.lower() != ".png":
            raise UserError(f"the contact sheet is a .png, not {sheet}")
        if sheet.absolute() == job.output.absolute():
            raise UserError(f"{sheet} is the output already; name the contact sheet otherwise")
        media.check(sheet, count=1, height=request.height, width=request.width)
    return media.check(job.output, **size)


def _follow(request: Request, stages: Stages, voice: Voice) -> list[Event]:
    """All events, shown while they come."""
    heard: list[Event] = []
    with (
        voice.progress() as progress,
        closing(generate(request, stages.bundle, stages)) as events,
    ):
        task = progress.add_task("text_encoder", total=None)
        for event in events:
            heard.append(event)
            if stages.watch is not None:
                stages.watch.look()
            _show(progress, task, event)
            if isinstance(event, PromptEncoded):
                voice.say(*event.notes)
    return heard


def _show(progress: Progress, task: TaskID, event: Event) -> None:
    if isinstance(event, Planned):
        progress.update(task, total=len(event.batches))
    elif isinstance(event, StageOpened):
        progress.update(task, description=event.stage)
    elif isinstance(event, StepDone):
        progress.update(task, completed=event.index)


def seconds_by_stage(events: Iterable[Event]) -> dict[str, float]:
    """By stage, what it took to open (`..._open`) and to run."""
    seconds: dict[str, float] = {}
    stage = ""
    for event in events:
        if isinstance(event, StageOpened):
            stage = event.stage
            seconds[f"{stage}_open"] = event.seconds
        elif isinstance(event, PromptEncoded | StepDone | Decoded):
            seconds[stage] = seconds.get(stage, 0.0) + event.seconds
    return seconds
