"""ltx-trt compare and ltx-trt bench: how good and how fast."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ltx_engines import presets
from ltx_trt.backend import Backend, TextEncoderDevice
from ltx_trt.options import (
    SHIPPED,
    Config,
    DeviceMemory,
    EncoderDevice,
    Exported,
    Json,
    Loras,
    MemoryPolicy,
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
    memory_policy,
)

if TYPE_CHECKING:
    from ltx_trt.bench import Order

Clip = Annotated[Path, typer.Argument(help="A video, a .gif, a folder of PNG frames, a picture.")]


def compare(
    a: Clip,
    b: Clip,
    common_frames: Annotated[
        bool, typer.Option("--common-frames", help="Leave out what the longer one has beyond.")
    ] = False,
    side_by_side: Annotated[Path | None, typer.Option(help="Both in one video (.mp4).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Each measure, frame by frame (.png).")] = None,
    out: Annotated[Path | None, typer.Option(help="All figures of all frames (.json).")] = None,
    json: Json = False,
) -> None:
    """Say how far one clip is from another: PSNR, SSIM, MS-SSIM, flicker, LPIPS if at hand."""
    from ltx_trt import compare_report
    from ltx_trt.compare_job import Order, Outputs, execute
    from ltx_trt.voice import Voice

    found = execute(Order(a, b, Outputs(out, plot, side_by_side), common_frames), Voice())
    if json:
        print(compare_report.as_json(found.document()))
        return
    from rich.console import Console

    Console(soft_wrap=True).print(compare_report.table(found.pair, found.rows, found.lpips))


def bench(  # noqa: PLR0913 - options of a command
    bundle: Exported = SHIPPED,
    shape: Annotated[
        list[str],
        typer.Option(metavar="WxHxF", help="A clip; may be repeated; else the bundle's own."),
    ] = [],  # noqa: B006 - typer copies it
    num_inference_steps: Annotated[
        list[int], typer.Option(min=1, help="May be repeated; else the bundle's own.")
    ] = [],  # noqa: B006
    pipeline_config: Config = None,
    preset: Preset = None,
    runs: Annotated[int, typer.Option(min=1, help="That count, of each shape and steps.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before them that do not.")] = 1,
    backend: RunOn = Backend.auto,
    provider: Provider = None,
    device_memory: DeviceMemory = None,
    memory: MemoryPolicy = None,
    text_encoder_device: EncoderDevice = TextEncoderDevice.auto,
    vae_tile: TileSize = "auto",
    no_cuda_graphs: Uncaptured = False,
    threads: Threads = None,
    lora: Loras = [],  # noqa: B006 - typer copies it
    json: Json = False,
) -> None:
    """Measure each stage and each step, and memory; the last line on stdout is JSON."""
    check_shipped(bundle)
    from ltx_engines import shapes
    from ltx_trt.bench import Order

    policy = memory_policy(memory, keep_loaded=False)
    chosen = choice(
        RunsOn(backend, provider, threads, text_encoder_device, no_cuda_graphs),
        Room(policy, device_memory, no_prompt_cache=True, vae_tile=vae_tile),
        lora,
    )
    config = presets.chosen(pipeline_config, preset)
    sizes, steps = tuple(map(shapes.parse, shape)), tuple(num_inference_steps)
    _bench(Order(bundle, sizes, steps, runs, warmup, chosen, config), quiet=json)


def _bench(order: "Order", *, quiet: bool) -> None:
    """Shows each run, and each table when it is there."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ltx_trt import bench_report
    from ltx_trt.bench import Measured, Opened, execute
    from ltx_trt.voice import Voice

    voice, tables = Voice(), Console(quiet=quiet, soft_wrap=True)
    events, measured = execute(order, voice), []
    columns = (TextColumn("runs"), MofNCompleteColumn(), TimeRemainingColumn())
    seen = voice.console.is_terminal
    with (
        closing(events),
        Progress(*columns, console=voice.console, transient=True, disable=not seen) as progress,
    ):
        opened = next(events)
        if not isinstance(opened, Opened):
            raise AssertionError("a bench begins with what it will measure")
        total = len(opened.cases) * (order.warmup + order.runs)
        task = progress.add_task("runs", total=total)
        for event in events:
            if isinstance(event, Measured):
                measured.append(event)
                tables.print(bench_report.table(event))
            else:
                progress.advance(task)
    print(bench_report.as_json(order, opened, measured))
