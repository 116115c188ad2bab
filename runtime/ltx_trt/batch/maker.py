"""One who makes clips: reads the bundle once, then takes one job after the other.

A job is claimed by a lock of its own, so any number of makers, of one command or of several, may
be at work in one folder.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from rich.console import Console

from ltx_engines.errors import UserError
from ltx_ref.checkpoint import CheckpointError
from ltx_trt import media
from ltx_trt.backend import Choice
from ltx_trt.batch import asking, results
from ltx_trt.batch.facts import difference
from ltx_trt.batch.jobs import Job
from ltx_trt.batch.results import Facts, Finished, Form, Place
from ltx_trt.job import Clip, Report, Voice, make
from ltx_trt.pipeline import Planned
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages

MOST_TRIES = 3
"""As often a job may end the process that makes it (of a crash, or for want of memory)."""

ENDS_ALL = f"it has ended {MOST_TRIES} processes that tried to make it"

log = logging.getLogger(__name__)

State = Literal["made", "skipped", "failed", "held"]


@dataclass(frozen=True, slots=True)
class Order:
    """What all jobs have in common. `plans` has one of each group; `run` is a name of this command;
    `redo`: a finished clip that is wished otherwise now is made again. `opened`: somebody has tried
    that it can be done, and has said what there is to say of the bundle."""

    bundle: Path
    folder: Path
    form: Form
    pipeline_config: Path | None
    choice: Choice
    redo: bool
    run: str
    plans: tuple[Planned, ...] = ()
    opened: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """A job that was checked. Those of one `group` need the same of the engines."""

    job: Job
    place: Place
    facts: Facts
    group: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """`held`: another command is at it. `report` is as `ltx-trt run --json` prints it, `text` as it
    does without."""

    name: str
    where: str
    state: State
    report: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()


def failed(task: Task, reason: str, notes: tuple[str, ...] = ()) -> Outcome:
    return Outcome(task.job.name, task.job.where, "failed", reason=reason, notes=notes)


def said(error: Exception) -> str:
    """In one line."""
    return " ".join(str(error).split()) or type(error).__name__


class Crew(Protocol):
    """Whoever makes clips, from `with` to its end."""

    def make(self, tasks: Sequence[Task], /) -> Iterator[Outcome]:
        """One outcome of each task, in any order."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Maker:
    """Implements Crew, in this process."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._open = ExitStack()
        self._stages: Stages | None = None
        self._said: frozenset[str] = frozenset()

    def open(self) -> tuple[str, ...]:
        """Make room for the largest clip, and return what there is to say of that.

        Raises:
            UserError: the bundle cannot be run here, or not for all clips.
        """
        order = self._order
        stages = self._open.enter_context(open_stages(order.bundle, order.choice))
        notes = [note for clip in order.plans for note in stages.prepare(clip)]
        self._stages = stages
        self._said = frozenset(notes) if order.opened else frozenset()
        return tuple(dict.fromkeys(notes))

    def make(self, tasks: Sequence[Task], /) -> Iterator[Outcome]:
        return map(self.one, tasks)

    def one(self, task: Task) -> Outcome:
        try:
            return self._claimed(task)
        except OSError as error:  # of the folder of results: no claim, no settling, no discarding
            return failed(task, said(error))

    def _claimed(self, task: Task) -> Outcome:
        name, where = task.job.name, task.job.where
        with results.claim(task.place) as free:
            if not free:
                return Outcome(name, where, "held")
            finished = results.settle(task.place)
            changed = "" if finished is None else difference(finished.facts, task.facts)
            if finished is None or (changed and self._order.redo):
                return self._attempt(task)
        if changed:
            return failed(task, f"it was made otherwise meanwhile: {changed}")
        # Its maker may have been killed after it was finished and before he could say so.
        if finished.run == self._order.run:
            return Outcome(name, where, "made", finished.report, str(task.place.clip))
        return Outcome(name, where, "skipped", finished.report)

    def _attempt(self, task: Task) -> Outcome:
        name, where, voice = task.job.name, task.job.where, _Ear()
        try:
            if results.begin(task.place, self._order.run) > MOST_TRIES:
                raise UserError(ENDS_ALL)
            made = self._clip(task, voice)
            report = json.loads(made.as_json())
            results.commit(task.place, Finished(task.facts, report, self._order.run))
        except Exception as error:  # whatever it is, the other jobs are made
            results.discard(task.place)
            if not isinstance(error, UserError | CheckpointError | OSError | MemoryError):
                log.exception("%s", where)
            return failed(task, said(error), self._notes(voice))
        except BaseException:
            results.discard(task.place)
            raise
        return Outcome(name, where, "made", report, made.as_text(), notes=self._notes(voice))

    def _notes(self, voice: "_Ear") -> tuple[str, ...]:
        """Those that nobody has said: each process sees a little more or less of memory."""
        return tuple(note for note in voice.heard if note not in self._said)

    def _clip(self, task: Task, voice: Voice) -> Report:
        if self._stages is None:
            voice.say(*self.open())
        stages = self._stages
        if stages is None:
            raise AssertionError("open() leaves the stages")
        order = self._order
        request, notes = asking.request(
            task.job, stages.bundle, order.pipeline_config, order.choice.loras
        )
        voice.say(*notes)
        path = task.place.partial / task.place.file
        size = {"count": request.num_frames, "height": request.height, "width": request.width}
        report = make(Clip(request, media.check(path, **size)), stages, voice)
        return replace(report, output=str(task.place.clip))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)


class Alone(Maker):
    """A Maker that finds out at once whether it can make all of them."""

    def __init__(self, order: Order, voice: Voice) -> None:
        super().__init__(order)
        self._voice = voice

    def __enter__(self) -> Self:
        try:
            self._voice.say(*self.open())
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self


class _Ear(Voice):
    """Keeps the notes for whoever gave the job."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(file=StringIO())
        self.heard: list[str] = []

    def say(self, *notes: str) -> None:
        self.heard += notes
