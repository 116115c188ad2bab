"""ltx-export build-engine: what a bundle's graphs become on a GPU."""

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ltx_engines import presets
from ltx_engines.errors import UserError
from ltx_engines.targets import Flavour
from ltx_export.console import check_packages, follow
from ltx_export.options import IgnoreKeys, Placement, Preset, Weights, chosen_stages


class Backends(StrEnum):
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"
    onnxruntime = "onnxruntime"


class EngineWeights(StrEnum):
    embedded = "embedded"
    inputs = "inputs"


def _flavour(backend: Backends) -> Flavour:
    return "tensorrt" if backend is Backends.tensorrt else "tensorrt-rtx"


GIB = 2**30

MOST = 2**20
"""GiB that nobody has: a petabyte."""

log = logging.getLogger(__name__)


def build_engine(  # noqa: PLR0913 - options of a command
    source: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE|ONNX|CHECKPOINT",
            help="Graphs, one graph of a bundle, or what they are made of.",
        ),
    ],
    gpu: Annotated[
        list[str], typer.Option(help="rtx4090, sm89, ...; may be repeated: one engine for all.")
    ] = [],  # noqa: B006 - typer copies it
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16 or bf16 of all; or fp8, int8, fp8-cast, ... of the transformer, which "
            "is quantized on the way; else its own."
        ),
    ] = None,
    shape: Annotated[
        list[str],
        typer.Option(metavar="WxHxF", help="A clip, or FROM..TO; each has kernels of its own."),
    ] = ["1216x704x121"],  # noqa: B006 - typer copies it
    out: Annotated[
        Path | None, typer.Option(help="The bundle with the engines; else the one that is given.")
    ] = None,
    stages: Annotated[str, typer.Option(help="all, or some of them, with commas.")] = "all",
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE.toml", help="A recipe of one's own instead.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Ranges of activations, from ltx-export calibrate.")
    ] = None,
    rest_precision: Annotated[
        str | None,
        typer.Option(help="fp16 or bf16, of what is not quantized; else its own, bf16 for fp32."),
    ] = None,
    text_encoder: Annotated[Path | None, typer.Option(help="Beside a checkpoint: T5.")] = None,
    upsampler: Annotated[Path | None, typer.Option(help="Beside a checkpoint.")] = None,
    pipeline_config: Annotated[Path | None, typer.Option(help="Beside a checkpoint.")] = None,
    preset: Preset = None,
    weights: Placement = Weights.link,
    ignore_config_key: IgnoreKeys = [],  # noqa: B006 - typer copies it
    backend: Annotated[
        Backends | None, typer.Option(help="Else what is installed and builds for the GPU.")
    ] = None,
    branches: Annotated[
        int | None,
        typer.Option(min=1, max=3, help="Of guidance at most; else as the model's defaults."),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(
            min=1, max=2, help="2: a --shape is made in two; 1: as it is; else by the defaults."
        ),
    ] = None,
    conditioning: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Also for given images, N of them after frame 0; a video there counts twice.",
        ),
    ] = None,
    vae_tile: Annotated[
        str | None,
        typer.Option(
            metavar="WxHxF",
            help="What the VAE takes at once, in the place of clips; beside --vae-stream its "
            "encoder. Width first, as in --shape; ltx-trt run --vae-tile has height first.",
        ),
    ] = None,
    vae_stream: Annotated[
        int | None,
        typer.Option(
            metavar="FRAMES",
            help="A decoder that goes on, so many frames at a time, for clips of any length, in "
            "the place of one for whole clips or tiles.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="auto|N",
            help="The transformer in N engines, or in as few as fit; else as it is in the bundle.",
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For --split auto; else 80 % of what is free."),
    ] = None,
    weight_streaming: Annotated[
        bool,
        typer.Option("--weight-streaming", help="Let a run keep some weights in host memory."),
    ] = False,
    refittable: Annotated[
        bool, typer.Option("--refittable", help="Let a run add LoRAs; wants the GPU here.")
    ] = False,
    engine_weights: Annotated[
        EngineWeights,
        typer.Option(help="inputs (experimental): the transformer's are given at run time."),
    ] = EngineWeights.embedded,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="Of the builder; else its own.")
    ] = None,
    workspace: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            min=0.001,
            help="For kernels; else most of what is free on the GPU, for TensorRT-RTX no limit.",
        ),
    ] = None,
    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Accept kernels that are not as the recipe.")
    ] = False,
    ignore_limits: Annotated[
        bool,
        typer.Option("--ignore-limits", help="Build though memory or disk seem to be too small."),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Link engines from here, and keep new ones for others."),
    ] = None,
) -> None:
    """Build engines for GPUs that, with TensorRT-RTX, need not be there; or see that ONNX Runtime's
    GPU providers take the graphs."""
    check_packages("build-engine")
    from ltx_engines import file_lock
    from ltx_engines.byte_sizes import parse
    from ltx_export import (
        block_groups,
        engine_bundle,
        engine_numbers,
        engine_refusals,
        engine_source,
        engine_stages,
        onnxruntime_bundle,
    )
    from ltx_export.onnx_order import Order as Graphs
    from ltx_export.onnx_order import Reader

    source, chosen = engine_source.resolve(source, chosen_stages(stages))
    if out is None and not engine_source.is_bundle(source):
        raise UserError(f"{source} is not a bundle; say with --out where one is to be made")
    on_graphs = backend is Backends.onnxruntime
    order = engine_bundle.Order(
        gpus=tuple(gpu),
        shapes=tuple(shape),
        stages=chosen,
        backend=None if backend is None or on_graphs else _flavour(backend),
        branches=branches,
        conditioning=conditioning,
        passes=passes,
        optimization_level=optimization_level,
        workspace=None if workspace is None else _bytes(workspace),
        allow_fallback=allow_fallback,
        vae_tile=vae_tile,
        vae_stream=vae_stream,
        weight_streaming=weight_streaming,
        refittable=refittable,
        cache=cache,
        ignore_limits=ignore_limits,
        split=None if split is None else block_groups.parse(split),
        engine_weights=engine_weights.value,
        host_memory=None if host_memory is None else parse(host_memory, "--host-memory"),
    )
    cards = (onnxruntime_bundle if on_graphs else engine_bundle).check_early(order)
    engine_stages.check_named(order)
    words = engine_numbers.Words(precision, recipe, calibration, rest_precision)
    numbers = engine_numbers.read(words)
    engine_numbers.check_cards(numbers, cards)
    graphs = Graphs(
        source,
        out or source,
        text_encoder=text_encoder,
        upsampler=upsampler,
        stages=engine_stages.graphs(order),
        pipeline_config=presets.chosen(pipeline_config, preset),
        weights=weights.value,
        ignore_config_keys=tuple(ignore_config_key),
    )
    reader: Reader = "onnxruntime-gpu" if on_graphs else "builder"
    with file_lock.building(graphs.out):
        if not on_graphs and not engine_source.is_bundle(source):
            engine_refusals.check_floats(graphs, numbers, cards, fallback=allow_fallback)
        seconds = follow(engine_source.prepare(graphs, numbers, reader))
        if on_graphs:
            for line in onnxruntime_bundle.write(onnxruntime_bundle.check(graphs.out, order)):
                typer.echo(line)
            return
        checked = engine_bundle.check(graphs.out, order)
        for reason in checked.reasons():
            typer.echo(reason)
        if not checked.work:
            typer.echo(f"{graphs.out}: up to date ({', '.join(checked.stages)})")
            return
        for sentence in checked.warnings():
            log.warning("%s", sentence)
        seconds += follow(engine_bundle.write(checked))
        for line in engine_bundle.report(graphs.out, checked):
            typer.echo(line)
        typer.echo(f"{graphs.out}: {checked.built()} in {seconds:.1f} s")


def _bytes(workspace: float) -> int:
    if not 0 < workspace <= MOST:  # nor is nan
        raise UserError(f"--workspace {workspace}: give GiB, at most {MOST:,}")
    return int(workspace * GIB)


COMMANDS = (build_engine,)
