"""How long each stage and each step of a clip takes, measured the same way everywhere.

    order -> cases: every clip size with every number of steps, all checked before the first runs
    case  -> some runs that do not count, then those that do -> a Timing for each stage, and memory

A run's events come when the work is done, also on a GPU, so that no launch is taken for the work.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal, Self

from ltx_engines import pipeline_config
from ltx_engines.shapes import VideoShape
from ltx_trt.backend import Choice
from ltx_trt.events import Event, Planned, StepDone
from ltx_trt.host_memory import HostWatch
from ltx_trt.job import seconds_by_stage
from ltx_trt.pipeline import generate, plan
from ltx_trt.request import Request, Wishes, resolve
from ltx_trt.session.bundle_stages import EngineStages, Stages
from ltx_trt.session.choice import open_stages
from ltx_trt.voice import Voice

PROMPT = "a red fox walks through fresh snow, its breath in the cold morning light"

STEP, CLIP = "step", "clip"
"""Beside the stages: each step of the transformer by itself, and all of a run."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. The median is the headline; p90 and worst say how far to trust it.

    `p90` is the least of the runs that nine in ten do not exceed (nearest rank).
    """

    median: float
    p90: float
    worst: float
    runs: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Self:
        """
        Raises:
            ValueError: there are none.
        """
        found = sorted(seconds)
        if not found:
            raise ValueError("a timing of no runs")
        rank = -(-9 * len(found) // 10)  # ceil(0.9 n), from 1
        return cls(median(found), found[rank - 1], found[-1], len(found))

    def rounded(self) -> dict[str, float]:
        """To microseconds."""
        return {name: round(number, 6) for name, number in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Order:
    """Without `shapes` or `steps`: the bundle's own. `runs` are those that count."""

    bundle: Path
    shapes: tuple[VideoShape, ...] = ()
    steps: tuple[int, ...] = ()
    runs: int = 5
    warmup: int = 1
    choice: Choice = field(default_factory=Choice)
    pipeline_config: Path | None = None

    def __post_init__(self) -> None:
        if self.runs < 1 or self.warmup < 0:
            raise ValueError(f"{self.runs} runs after {self.warmup}")


@dataclass(frozen=True, slots=True)
class Case:
    request: Request
    planned: Planned
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        request, steps = self.request, len(self.planned.sigmas) - 1
        return f"{request.width}x{request.height}x{request.num_frames}, {steps} steps"


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of memory are None where nobody counts them: see `job.Report`. Those of the host are
    this case's own, what stays in memory from those before it among them; those of the GPU are the
    most of this case and all before it."""

    case: Case
    seconds: dict[str, Timing]
    host_memory: int | None
    host_anonymous: int | None
    device_memory: int | None

    def document(self) -> dict[str, Any]:
        request, planned = self.case.request, self.case.planned
        return {
            "width": request.width,
            "height": request.height,
            "frames": request.num_frames,
            "steps": len(planned.sigmas) - 1,
            "batches": planned.batches,
            "seconds": {name: timing.rounded() for name, timing in self.seconds.items()},
            "host_memory": self.host_memory,
            "host_anonymous": self.host_anonymous,
            "device_memory": self.device_memory,
        }


@dataclass(frozen=True, slots=True)
class Opened:
    """`seconds`: the manifest is read, files are held against it, the GPU is there."""

    cases: tuple[Case, ...]
    seconds: float
    runs_on: Literal["engines", "onnxruntime"]


def execute(
    order: Order, voice: Voice, clock: Clock = perf_counter
) -> Generator[Opened | int | Measured, None, None]:
    """First what will be measured; then, after each run, how many there were; and each case when it
    is done.

    Raises:
        UserError: a case is none for this bundle, or the bundle cannot be run here.
    """
    started = clock()
    with open_stages(order.bundle, order.choice) as stages:
        opened = clock() - started
        made = tuple(cases(order, stages))
        notes = [stages.prepare(case.planned) for case in made]
        yield Opened(made, opened, "engines" if isinstance(stages, EngineStages) else "onnxruntime")
        done = 0
        for case, said in zip(made, notes, strict=True):
            voice.say(*case.notes, *case.planned.notes, *said)
            stages.prepare(case.planned)
            runs: list[dict[str, list[float]]] = []
            with HostWatch() as host:
                for _ in range(order.warmup + order.runs):
                    runs.append(once(case.request, stages, clock))
                    yield (done := done + 1)
            memory = None if stages.watch is None else stages.watch.peak
            timings = _timings(runs[order.warmup :])
            yield Measured(case, timings, host.resident, host.anonymous, memory)


def cases(order: Order, stages: Stages) -> Iterator[Case]:
    path = order.pipeline_config
    config = None if path is None else pipeline_config.load(path)
    for shape in dict.fromkeys(order.shapes) or (None,):
        for steps in dict.fromkeys(order.steps) or (None,):
            size = {} if shape is None else asdict(shape)
            wishes = Wishes(
                PROMPT,
                num_frames=size.get("frames"),
                height=size.get("height"),
                width=size.get("width"),
                num_inference_steps=steps,
            )
            request, notes = resolve(wishes, stages.bundle, config)
            yield Case(request, plan(request, stages.bundle.manifest), notes)


def once(request: Request, stages: Stages, clock: Clock = perf_counter) -> dict[str, list[float]]:
    """One run. By name its seconds: one number for each stage, and as many as there are steps."""
    steps: list[float] = []

    def noted(events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            if stages.watch is not None:
                stages.watch.look()
            if isinstance(event, StepDone):
                steps.append(event.seconds)
            yield event

    started = clock()
    with closing(generate(request, stages.bundle, stages)) as events:
        found = {name: [seconds] for name, seconds in seconds_by_stage(noted(events)).items()}
    return {**found, STEP: steps, CLIP: [clock() - started]}


def _timings(runs: Sequence[dict[str, list[float]]]) -> dict[str, Timing]:
    """Of each name, the seconds of all runs together."""
    return {name: Timing.of(s for run in runs for s in run[name]) for name in runs[0]}
