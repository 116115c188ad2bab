"""ltx-trt batch: many clips, in one command that may be killed and given again."""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ltx_engines import presets
from ltx_engines.errors import UserError
from ltx_trt import SEED
from ltx_trt.backend import Backend, Memory, TextEncoderDevice
from ltx_trt.options import (
    SHIPPED,
    Config,
    Count,
    DeviceMemory,
    EncoderDevice,
    Exported,
    Forgetful,
    Form,
    Frames,
    Loras,
    MemoryOfMany,
    Pixels,
    Preset,
    Provider,
    Room,
    RunOn,
    RunsOn,
    Threads,
    TileSize,
    Uncaptured,
    check_shipped,
    choice,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from ltx_trt.batch.cluster import Cluster
    from ltx_trt.batch.execution import Plan
    from ltx_trt.batch.jobs import Job
    from ltx_trt.batch.maker import Outcome
    from ltx_trt.batch.workers import Team
    from ltx_trt.job import Voice

LOCAL = "local"

ADDRESS = re.compile(r"auto|local|(ray://)?[^\s/\\:]+:\d+")
"""What may follow --ray. Anything else is the next word of the command line."""


class BatchCommand(TyperCommand):
    """--ray has an address or none, which the parser of options knows no way to say."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = []
        for word, following in zip(args, [*args[1:], ""], strict=True):
            words.append(word)
            if word == "--ray" and not ADDRESS.fullmatch(following):
                words.append(LOCAL)
        return super().parse_args(ctx, words)


def batch(  # noqa: PLR0913 - options of a command
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", help="A folder: new, or to be completed.")
    ],
    jobs: Annotated[
        Path | None,
        typer.Argument(
            metavar="JOBS.jsonl",
            help='An object on each line: {"prompt": "a fox", "seed": 7, "name": "fox"}. '
            "Relative paths in it count from the current folder.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="In place of jobs: a text file, one prompt on each line.")
    ] = None,
    bundle: Exported = SHIPPED,
    form: Annotated[
        Form, typer.Option("--format", help="png: a folder of lossless frames for each clip.")
    ] = Form.mp4,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of jobs that say none; of prompts, the first's: they count up."),
    ] = None,
    num_inference_steps: Count = None,
    width: Pixels = None,
    height: Pixels = None,
    num_frames: Frames = None,
    pipeline_config: Config = None,
    preset: Preset = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="Make finished clips again whose job has changed.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes, each with the model loaded. On the CPU each takes all cores, so that "
            "frames are those of `run`; --threads shares them, and may change last bits.",
        ),
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="0,1", help="Worker by worker, the GPU that it sees.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]", help="On a Ray cluster; without address, one of this machine."
        ),
    ] = None,
    backend: RunOn = Backend.auto,
    provider: Provider = None,
    memory: MemoryOfMany = None,
    device_memory: DeviceMemory = None,
    text_encoder_device: EncoderDevice = TextEncoderDevice.auto,
    no_prompt_cache: Forgetful = False,
    vae_tile: TileSize = "auto",
    no_cuda_graphs: Uncaptured = False,
    threads: Threads = None,
    lora: Loras = [],  # noqa: B006 - typer copies it
    json: Annotated[
        bool, typer.Option("--json", help="One line of JSON on stdout for each clip.")
    ] = False,
) -> None:
    """Make a clip of each job in a file. What is not said is as in `run`.

    Given again after it was killed, it makes what is missing. Exit code 1: some have failed.
    """
    check_shipped(bundle)
    from ltx_trt.batch.execution import Batch, check
    from ltx_trt.job import Voice

    said = {
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "width": width,
        "height": height,
        "num_frames": num_frames,
    }
    told = _jobs(jobs, prompts, {key: value for key, value in said.items() if value is not None})
    chosen = choice(
        RunsOn(backend, provider, threads, text_encoder_device, no_cuda_graphs),
        Room(memory or Memory.auto, device_memory, no_prompt_cache, vae_tile),
        lora,
    )
    config = presets.chosen(pipeline_config, preset)
    planned = check(Batch(told, bundle, output, form.value, config, chosen, redo))
    team = _team(workers, gpus, ray, planned)
    raise typer.Exit(_follow(planned, team, Voice(), json=json))


def _jobs(jobs: Path | None, prompts: Path | None, defaults: dict[str, Any]) -> "tuple[Job, ...]":
    from ltx_engines.prompts import read as read_prompts
    from ltx_trt.batch.jobs import of_prompts, read

    if (jobs is None) == (prompts is None):
        raise UserError("name one file: JOBS.jsonl, or --prompts with a text file")
    if jobs is not None:
        return read(jobs, defaults)
    if prompts is None:
        raise AssertionError("one of the two is there")
    return of_prompts(prompts, read_prompts(prompts), {"seed": SEED, **defaults})


def _team(
    workers: int | None, gpus: str | None, ray: str | None, planned: "Plan"
) -> "Team | Cluster":
    from ltx_trt.batch.cluster import Cluster
    from ltx_trt.batch.workers import Team

    if gpus is not None and not re.fullmatch(r"[\w-]+(,[\w-]+)*", gpus):
        raise UserError(f"--gpus should be numbers with commas, such as 0,1, not {gpus!r}")
    listed = () if gpus is None else tuple(gpus.split(","))
    if ray is None:
        return Team(workers or len(listed) or 1, listed)
    if listed:
        raise UserError("--gpus is of workers of this machine; Ray gives a GPU to each of its own")
    threads = planned.order.choice.threads or 1
    return Cluster(ray, workers or 1, not planned.on_cpu, threads)


def _follow(planned: "Plan", team: "Team | Cluster", voice: "Voice", *, json: bool) -> int:
    """Each outcome as it comes, then what has become of all; the exit code."""
    from ltx_trt.batch.execution import execute

    started, ended = perf_counter(), [*planned.skipped]
    if json:
        for outcome in planned.skipped:
            print(_as_json(outcome), flush=True)
    failed: list[Outcome] = []
    with _bar(planned, voice) as (progress, task), closing(execute(planned, team, voice)) as coming:
        for outcome in coming:
            ended.append(outcome)
            failed += [outcome] * (outcome.state == "failed")
            if line := _as_json(outcome) if json else outcome.text:
                print(line, flush=True)
            lost = f", {len(failed)} failed" if failed else ""
            progress.update(task, advance=1, description=f"clips{lost}")
    for outcome in failed:
        voice.say(f"{outcome.where} ({outcome.name}): {outcome.reason}")
    summary = _summary(ended, perf_counter() - started)
    if failed:
        voice.say(f"{summary}; give the same command again for those that failed")
    elif not json:
        print(summary)
    return 1 if failed else 0


def _summary(ended: "Iterable[Outcome]", seconds: float) -> str:
    states = [outcome.state for outcome in ended]
    counts = [(states.count("made"), "made"), (states.count("skipped"), "there already")]
    counts += [(states.count("failed"), "failed")]
    parts = ", ".join(f"{count} {word}" for count, word in counts if count)
    return f"{len(states)} job{'s'[: len(states) != 1]}: {parts} in {seconds:.1f} s"


def _as_json(outcome: "Outcome") -> str:
    import json

    facts: dict[str, Any] = {"name": outcome.name, "state": outcome.state, **outcome.report}
    if outcome.state == "failed":
        facts["reason"] = outcome.reason
    return json.dumps(facts)


@contextmanager
def _bar(planned: "Plan", voice: "Voice") -> "Iterator[tuple[Progress, Any]]":
    """Lines on stdout go above it where both are the same terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=voice.console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not voice.console.is_terminal,
    ) as progress:
        done = len(planned.skipped)
        yield progress, progress.add_task("clips", total=done + len(planned.tasks), completed=done)
