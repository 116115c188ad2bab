"""One run of the command line: checks first, then frames, then files, then a report."""

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from rich.progress import Progress, TaskID

from ltx_engines import pipeline_config
from ltx_engines.byte_sizes import said
from ltx_engines.errors import UserError
from ltx_engines.shapes import counted
from ltx_trt import cached_run, input_media, media, original_flags
from ltx_trt.backend import Choice
from ltx_trt.cache_options import CacheWishes
from ltx_trt.cached_run import Hits, Loss, Made
from ltx_trt.delivery import Delivery, Destination, Take
from ltx_trt.frame_spool import FrameSpool
from ltx_trt.host_memory import HostWatch
from ltx_trt.input_media import Media
from ltx_trt.original_flags import Named, Unnamed
from ltx_trt.pipeline import (
    Decoded,
    Event,
    MediaEncoded,
    Planned,
    PromptEncoded,
    StageOpened,
    StepDone,
    Upsampled,
    generate,
    plan,
)
from ltx_trt.request import Request, Wishes, resolve
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages
from ltx_trt.voice import Voice as Voice


@dataclass(frozen=True, slots=True)
class Job:
    wishes: Wishes
    bundle: Path
    output: Path | Unnamed
    pipeline_config: Path | None = None
    contact_sheet: Path | None = None
    choice: Choice = field(default_factory=Choice)
    cache: CacheWishes = field(default_factory=CacheWishes)


@dataclass(frozen=True, slots=True)
class Clip:
    """What to make, and where it goes: both checked. `tap` is given all frames, in order."""

    request: Request
    output: media.Output
    contact_sheet: Path | None = None
    tap: Take | None = None

    @property
    def destination(self) -> Destination:
        request = self.request
        return Destination(
            self.output, request.frame_rate, request.num_frames, self.contact_sheet, self.tap
        )


@dataclass(frozen=True, slots=True)
class Frames:
    """Where they are, and the hash of their bytes before any encoding."""

    output: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Report:
    """`sha256` is of the frames' bytes, before any encoding. `device_memory` are the bytes of the
    GPU that the run took at most; None without a GPU. `loras` are those that were added.

    `sigmas` has the noise level before each step of all passes, and where the last one ends;
    `sigmas_by_pass` the same of each pass apart, one of them too.

    `host_memory` are the bytes that the process has had in memory at most while the clip was made,
    of which pages of files can be taken back, and `host_anonymous` those that cannot, at most;
    `cached_prompts` are the texts that were not encoded, for that was done before. Where texts are
    kept, the text encoder is opened when one is new, and `seconds` count that as its work."""

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
    host_memory: int | None = None
    host_anonymous: int | None = None
    cached_prompts: int = 0
    caching: Hits | None = None
    compared: Loss | None = None
    sigmas_by_pass: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(
        cls,
        request: Request,
        made: Frames,
        planned: Planned,
        seconds: Mapping[str, float],
        device_memory: int | None,
    ) -> Self:
        return cls(
            output=made.output,
            seed=request.seed,
            frames=request.num_frames,
            height=request.height,
            width=request.width,
            frame_rate=request.frame_rate,
            sampler=request.sampler,
            sigmas=planned.sigmas,
            seconds={name: round(value, 4) for name, value in seconds.items()},
            sha256=made.sha256,
            device_memory=device_memory,
            sigmas_by_pass=planned.sigmas_by_pass,
        )

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    def as_text(self) -> str:
        return (
            f"{self.output}: {counted(self.frames)} of {self.width} x {self.height}, "
            f"{len(self.sigmas) - 1} steps, seed {self.seed}, {sum(self.seconds.values()):.1f} s"
            f"{self._peaks()}{self._caching()}"
        )

    def _caching(self) -> str:
        """A line for each thing that there is to say."""
        said = (part.as_text() for part in (self.caching, self.compared) if part is not None)
        return "".join(f"\n{line}" for line in said)

    def _peaks(self) -> str:
        """Of memory, where they are known."""
        own = "" if self.host_anonymous is None else f" ({said(self.host_anonymous)} its own)"
        host = "" if self.host_memory is None else f", {said(self.host_memory)} of memory{own}"
        gpu = "" if self.device_memory is None else f", {said(self.device_memory)} of the GPU"
        return host + gpu


def execute(job: Job) -> Report:
    config = None if job.pipeline_config is None else pipeline_config.load(job.pipeline_config)
    pictures = input_media.media(job.wishes)
    caching = cached_run.caching(job.cache, job.bundle)
    voice = Voice()
    with open_stages(job.bundle, job.choice) as stages:
        request, notes = resolve(job.wishes, stages.bundle, config)
        with original_flags.place(job.output, _named(request)) as path:
            output = _check_outputs(job, path, request)
            _check_apart(job, output, pictures, request)
            outline = input_media.outline(request, pictures)
            outline, _ = cached_run.attach(outline, caching, stages.loras)
            plan(outline, stages.bundle.manifest)  # a refusal comes before all work and all notes
            if job.cache.compare:
                cached_run.check_comparable(outline)
            request, more = _with_pictures(request, pictures, voice)
            request, doubts = cached_run.attach(request, caching, stages.loras)
            plan(request, stages.bundle.manifest)
            voice.say(*notes, *more, *doubts)
            clip = Clip(request, output, job.contact_sheet)
            work = make_and_compare if job.cache.compare else make
            return work(clip, stages, voice)


def _named(request: Request) -> Named:
    size = (request.height, request.width, request.num_frames)
    return Named(request.prompt, request.seed, *size)


def _with_pictures(
    request: Request, pictures: Media, voice: Voice
) -> tuple[Request, tuple[str, ...]]:
    """Shown while they are prepared, which takes seconds for each of large ones."""
    with voice.progress() as progress:
        task = progress.add_task("pictures", total=None)
        return input_media.attach(request, pictures, lambda _: progress.advance(task))


def make_and_compare(clip: Clip, stages: Stages, voice: Voice) -> Report:
    """Once more without caching, for the report alone. A step of either that is not counted comes
    first: what is read, captured or chosen at a first step is a matter of who begins."""
    plain = replace(clip.request, caching=None)
    before = _found_prompts(stages)
    _warm(clip.request, stages)
    found = _found_prompts(stages) - before
    _warm(plain, stages)
    with FrameSpool() as ours, FrameSpool() as theirs:
        report = make(replace(clip, tap=ours.add), stages, voice)
        stages.prepare(plan(plain, stages.bundle.manifest))
        events = _follow(plain, stages, voice, theirs.add)
        made = Made(ours.clip(), report.seconds), Made(theirs.clip(), seconds_by_stage(events))
        return replace(report, compared=Loss.of(*made), cached_prompts=found)


def _warm(request: Request, stages: Stages) -> None:
    stages.prepare(plan(request, stages.bundle.manifest))
    with closing(generate(request, stages.bundle, stages)) as events:
        next(event for event in events if isinstance(event, StepDone))


def make(clip: Clip, stages: Stages, voice: Voice) -> Report:
    before = _found_prompts(stages)
    with HostWatch() as host:
        report = _make(clip, stages, voice)
    return replace(
        report,
        host_memory=host.resident,
        host_anonymous=host.anonymous,
        cached_prompts=_found_prompts(stages) - before,
    )


def _found_prompts(stages: Stages) -> int:
    return 0 if stages.prompts is None else stages.prompts.hits


def _make(clip: Clip, stages: Stages, voice: Voice) -> Report:
    request = clip.request
    planned = plan(request, stages.bundle.manifest)
    voice.say(*planned.notes, *stages.prepare(planned))
    with Delivery(clip.destination) as delivery:
        events = _follow(request, stages, voice, delivery.add)
    seconds = {**seconds_by_stage(events), "write": delivery.seconds}
    memory = None if stages.watch is None else stages.watch.peak
    made = Frames(str(clip.output.path), delivery.sha256)
    report = Report.of(request, made, planned, seconds, memory)
    hits = None if request.caching is None else Hits.of(request.caching, events)
    return replace(report, loras=stages.loras, caching=hits)


def _check_outputs(job: Job, output: Path, request: Request) -> media.Output:
    """Before any work: an hour of it should not end with a name that cannot be written."""
    size = {"count": request.num_frames, "height": request.height, "width": request.width}
    if (sheet := job.contact_sheet) is not None:
        if sheet.suffix.lower() != ".png":
            raise UserError(f"the contact sheet is a .png, not {sheet}")
        if sheet.absolute() == output.absolute():
            raise UserError(f"{sheet} is the output already; name the contact sheet otherwise")
        media.check(sheet, count=1, height=request.height, width=request.width)
    return media.check(output, **size)


def _check_apart(job: Job, output: media.Output, pictures: Media, request: Request) -> None:
    """What is written is not what is read, nor written twice."""
    written = {path.resolve() for path in media.files(output, request.num_frames)}
    if job.contact_sheet is not None:
        if job.contact_sheet.resolve() in written:
            raise UserError(
                f"{job.contact_sheet} is one of the frames; name the contact sheet otherwise"
            )
        written.add(job.contact_sheet.resolve())
    files = (job.pipeline_config, job.cache.table, *(wish.path for wish in pictures.wishes))
    for file in files:
        if file is not None and file.resolve() in written:
            raise UserError(
                f"{file} is read for this clip, which would replace it; name the "
                "output, or the contact sheet, otherwise"
            )


def _follow(request: Request, stages: Stages, voice: Voice, take: Take) -> list[Event]:
    """All events, shown while they come; their frames are given away."""
    heard: list[Event] = []
    with (
        voice.progress() as progress,
        closing(generate(request, stages.bundle, stages)) as events,
    ):
        task = progress.add_task("text_encoder", total=None)
        for event in events:
            heard.append(event)
            if isinstance(event, Decoded):
                take(event.frames)
                heard[-1] = replace(event, frames=event.frames[:0].copy())
            if stages.watch is not None:
                stages.watch.look()
            _show(progress, task, event)
            if request.caching is not None and isinstance(event, StepDone):
                hits = Hits.of(request.caching, heard)
                progress.update(task, description=f"transformer ({hits.reused} reused)")
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
    elif isinstance(event, Decoded):
        progress.update(task, total=event.total, completed=event.first + len(event.frames))


def seconds_by_stage(events: Iterable[Event]) -> dict[str, float]:
    """By stage, what it took to open (`..._open`) and to run."""
    seconds: dict[str, float] = {}
    stage = ""
    for event in events:
        if isinstance(event, StageOpened):
            stage = event.stage
            name = f"{stage}_open"
            seconds[name] = seconds.get(name, 0.0) + event.seconds
        elif isinstance(event, PromptEncoded | MediaEncoded | StepDone | Upsampled | Decoded):
            seconds[stage] = seconds.get(stage, 0.0) + event.seconds
    return seconds
