"""A batch from its jobs to its results: everything is checked, then all that is missing is made."""

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from time import sleep
from uuid import uuid4

from ltx_engines import command
from ltx_engines.bundle import Bundle, read
from ltx_engines.errors import UserError
from ltx_trt import media
from ltx_trt.backend import Backend, Choice, Memory, Providers
from ltx_trt.batch import asking, facts, results
from ltx_trt.batch.cluster import Cluster, RayCrew
from ltx_trt.batch.jobs import Job
from ltx_trt.batch.maker import Alone, Crew, Order, Outcome, Task
from ltx_trt.batch.results import Facts, Form, Place
from ltx_trt.batch.workers import Team, Workers
from ltx_trt.job import Voice
from ltx_trt.passes import Pass
from ltx_trt.pipeline import Planned, plan

log = logging.getLogger(__name__)

PAUSE = 0.3
"""Seconds, while all that is left is in the hands of another command."""


@dataclass(frozen=True, slots=True)
class Batch:
    """`redo`: finished clips that are now wished otherwise are made again."""

    jobs: tuple[Job, ...]
    bundle: Path
    folder: Path
    form: Form = "mp4"
    pipeline_config: Path | None = None
    choice: Choice = field(default_factory=lambda: Choice(memory=Memory.auto))
    redo: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is to do, grouped, and what is there already."""

    order: Order
    tasks: tuple[Task, ...]
    skipped: tuple[Outcome, ...]
    places: tuple[Place, ...]
    on_cpu: bool


def check(batch: Batch) -> Plan:
    """No model is read, and nothing written.

    Raises:
        UserError: a job is wrong, or finished and changed, or there is no place for results.
    """
    bundle = Bundle(batch.bundle, read(batch.bundle))
    results.check(batch.folder)
    shared = facts.shared(batch.bundle, batch.pipeline_config, batch.choice.loras)
    tasks: dict[str, list[Task]] = {}
    plans: dict[str, Planned] = {}
    skipped = []
    for job in batch.jobs:
        place = Place(batch.folder, job.name, batch.form)
        with _said_of(job):
            _check_not_read(job, place)
            made_of = facts.of_job(job, batch.form, shared, batch.bundle)
            if (done := _done(job, place, made_of, redo=batch.redo)) is not None:
                skipped.append(done)
                continue
            planned = _planned(job, place, batch, bundle)
        group = repr((job.preset, *map(_shape, planned.passes), planned.encoded))
        tasks.setdefault(group, []).append(Task(job, place, made_of, group))
        plans.setdefault(group, planned)
    made = (batch.bundle, batch.folder, batch.form, batch.pipeline_config, batch.choice)
    return Plan(
        Order(*made, batch.redo, uuid4().hex, tuple(plans.values())),
        tuple(chain.from_iterable(tasks.values())),
        tuple(skipped),
        tuple(Place(batch.folder, job.name, batch.form) for job in batch.jobs),
        _on_cpu(batch, bundle),
    )


def execute(planned: Plan, team: Team | Cluster, voice: Voice) -> Generator[Outcome, None, None]:
    """Each outcome as it comes. Closing the generator ends the work; what is finished stays."""
    with _swept(planned):
        if planned.tasks:
            yield from _made(planned, team, voice)


def _made(planned: Plan, team: Team | Cluster, voice: Voice) -> Iterator[Outcome]:
    with _crew(planned, team, voice) as crew:
        planned.order.folder.mkdir(exist_ok=True)
        left: Sequence[Task] = planned.tasks
        while left:
            held = set()
            for outcome in crew.make(left):
                voice.say_of(outcome.name, *outcome.notes)
                if outcome.state == "held":
                    held.add(outcome.name)
                else:
                    yield outcome
            left = [task for task in left if task.job.name in held]
            if left:
                voice.say("waiting for jobs that another command is at")
                sleep(PAUSE)
        voice.say_of_others()


def _crew(planned: Plan, team: Team | Cluster, voice: Voice) -> Crew:
    if isinstance(team, Cluster):
        return RayCrew(planned.order, team, voice)
    if team.count == 1 and not team.gpus:
        return Alone(planned.order, voice)
    shared = replace(planned.order.choice, processes=team.count)
    return Workers(replace(planned.order, choice=shared), team, voice)


@contextmanager
def _said_of(job: Job) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if str(error).startswith(job.where):
            raise
        raise UserError(f"{job.where}: {error}") from error
    except OSError as error:
        raise UserError(f"{job.where}: {command.said(error)}") from error


def _planned(job: Job, place: Place, batch: Batch, bundle: Bundle) -> Planned:
    """All that it reads is read, pictures and videos to their end."""
    request, _ = asking.request(job, bundle, batch.pipeline_config, batch.choice.loras)
    planned = plan(request, bundle.manifest)
    if batch.form == "mp4":
        media.check_even(request.height, request.width)
    results.check_free(place)
    return planned


def _check_not_read(job: Job, place: Place) -> None:
    """A clip that is made again goes first."""
    replaced = {clip.resolve() for clip in results.clips(place)}
    for path in asking.files(job):
        if replaced & {path.resolve(), *path.resolve().parents}:
            raise UserError(f"{path} is read for the clip that would replace it; name the job anew")


def _shape(one: Pass) -> tuple[object, ...]:
    """What engines must take of a pass."""
    return one.shape, one.extra, one.per_token, tuple(sorted(set(one.batches)))


def _done(job: Job, place: Place, made_of: Facts, *, redo: bool) -> Outcome | None:
    """A clip that was made just so needs no other check.

    Raises:
        UserError: there is a clip of its name, which was made otherwise.
    """
    before = results.reported(place)
    if before is not None and (said := facts.difference(before.facts, made_of)):
        if redo:
            return None
        clip = results.clips(place)[-1]
        raise UserError(
            f"{clip} is finished, but was made otherwise: {said}; --redo makes it again, another "
            "name or folder keeps both"
        )
    if (finished := results.find(place)) is None:
        return None
    return Outcome(job.name, job.where, "skipped", finished.report)


def _on_cpu(batch: Batch, bundle: Bundle) -> bool:
    engines = bundle.manifest.engines and batch.choice.backend is not Backend.onnxruntime
    return not engines and batch.choice.provider in (None, Providers.cpu)


@contextmanager
def _swept(planned: Plan) -> Iterator[None]:
    """However it ends, what nobody is at goes; so does a new folder with nothing in it."""
    folder = planned.order.folder
    there = folder.exists()
    try:
        yield
    finally:
        if folder.is_dir():
            for place in planned.places:
                try:
                    results.sweep(place)
                except OSError as error:  # what is left is swept by the next command
                    log.warning("%s: %s", place.partial, error.strerror)
            if not there and not any(folder.iterdir()):
                folder.rmdir()
