"""ltx-trt calibrate-cache: measure a checkpoint for step caching."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ltx_engines import presets
from ltx_trt import SEED
from ltx_trt.backend import Backend, Memory
from ltx_trt.options import (
    SHIPPED,
    Config,
    Count,
    DeviceMemory,
    Exported,
    Frames,
    Json,
    Loras,
    Pixels,
    Preset,
    Provider,
    Room,
    RunOn,
    RunsOn,
    Sampler,
    Scale,
    Stg,
    Threads,
    check_shipped,
    choice,
)

if TYPE_CHECKING:
    from ltx_trt.cache_calibration import Order
    from ltx_trt.cache_table import CacheTable


def calibrate_cache(  # noqa: PLR0913 - options of a command
    prompts: Annotated[Path, typer.Option(help="A text file, one prompt on each line.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The table, JSON; BUNDLE/step_cache.json needs not be named later."
        ),
    ],
    bundle: Exported = SHIPPED,
    seeds: Annotated[int, typer.Option(min=1, help="Clips of each prompt.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = SEED,
    num_inference_steps: Count = None,
    width: Pixels = None,
    height: Pixels = None,
    num_frames: Frames = None,
    guidance_scale: Scale = None,
    stg_scale: Stg = None,
    sampler: Sampler = None,
    pipeline_config: Config = None,
    preset: Preset = None,
    backend: RunOn = Backend.auto,
    provider: Provider = None,
    device_memory: DeviceMemory = None,
    threads: Threads = None,
    lora: Loras = [],  # noqa: B006 - typer copies it
    json: Json = False,
) -> None:
    """Measure how alike neighbouring steps are: what magcache and teacache decide by.

    A table is of one checkpoint and one schedule. Calibrate with what will be run.
    """
    check_shipped(bundle)
    from ltx_engines.prompts import read
    from ltx_trt.cache_calibration import Order
    from ltx_trt.request import Wishes

    wishes = Wishes(
        prompt="",
        seed=seed,
        num_inference_steps=num_inference_steps,
        width=width,
        height=height,
        num_frames=num_frames,
        guidance_scale=guidance_scale,
        stg_scale=stg_scale,
        sampler=sampler,
    )
    chosen = choice(RunsOn(backend, provider, threads), Room(Memory.auto, device_memory), lora)
    config = presets.chosen(pipeline_config, preset)
    table = _measure(Order(wishes, read(prompts), seeds, bundle, out, config, chosen))
    print(table.model_dump_json() if json else _said(table, out))


def _measure(order: "Order") -> "CacheTable":
    """Shows each step."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from ltx_trt.cache_calibration import execute

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        clips = len(order.prompts) * order.seeds
        task = progress.add_task("transformer", total=None)
        steps = execute(order)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                table: CacheTable = end.value
                return table
            progress.update(task, total=clips * step.total, advance=1)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s'[: count != 1]}"


def _said(table: "CacheTable", out: Path) -> str:
    ratios, fit = table.magcache.ratios, table.teacache
    correlation = ", ".join(
        f"{name} {value:.2f}" if value is not None else f"no {name}"
        for name, value in (("Pearson", fit.pearson), ("R2", fit.r2))
    )
    lines = [
        f"{out}: {len(table.sigmas)} steps, {_counted(table.clips.prompts, 'prompt')}, "
        f"{_counted(len(table.clips.seeds), 'seed')}",
        f"magcache: residuals are {min(ratios):.3f} to {max(ratios):.3f} times the one before, "
        f"{max(table.magcache.deviations):.3f} off at most from clip to clip",
        f"teacache: a polynomial of degree {len(fit.coefficients) - 1} through {fit.points} "
        f"changes, {correlation}",
    ]
    return "\n".join(lines + ([f"note: {fit.doubt()}"] if fit.doubt() else []))
