"""ltx-export build-engine: what a bundle's graphs become on a GPU."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ltx_engines.errors import UserError
from ltx_export.console import check_packages, follow
from ltx_export.options import IgnoreKeys, Placement, Precisions, Weights, chosen_stages


class Backends(StrEnum):
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


GIB = 2**30


def build_engine(  # noqa: PLR0913 - options of a command
    source: Annotated[
        Path, typer.Argument(metavar="BUNDLE|CHECKPOINT", help="Graphs, or what they are made of.")
    ],
    gpu: Annotated[
        list[str], typer.Option(help="rtx4090, sm89, ...; may be repeated: one engine for all.")
    ],
    shape: Annotated[
        list[str],
        typer.Option(metavar="WxHxF", help="A clip, or FROM..TO; each has kernels of its own."),
    ] = ["1216x704x121"],  # noqa: B006 - typer copies it
    out: Annotated[
        Path | None, typer.Option(help="The bundle with the engines; else the one that is given.")
    ] = None,
    stages: Annotated[str, typer.Option(help="all, or some of them, with commas.")] = "all",
    backend: Annotated[
        Backends | None, typer.Option(help="Else what is installed and builds for the GPU.")
    ] = None,
    branches: Annotated[
        int | None,
        typer.Option(min=1, max=3, help="Of guidance at most; else as the model's defaults."),
    ] = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Also a timestep for each token, as for images.")
    ] = False,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="Of the builder; else its own.")
    ] = None,
    workspace: Annotated[
        float | None, typer.Option(metavar="GIB", min=0.001, help="For kernels; else no limit.")
    ] = None,
    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Accept kernels that are not as the recipe.")
    ] = False,
    text_encoder: Annotated[Path | None, typer.Option(help="Beside a checkpoint: T5.")] = None,
    upsampler: Annotated[Path | None, typer.Option(help="Beside a checkpoint.")] = None,
    pipeline_config: Annotated[Path | None, typer.Option(help="Beside a checkpoint.")] = None,
    precision: Annotated[
        Precisions | None, typer.Option(help="Of a checkpoint's graphs; else its own.")
    ] = None,
    weights: Placement = Weights.link,
    ignore_config_key: IgnoreKeys = [],  # noqa: B006 - typer copies it
) -> None:
    """Build engines for GPUs that, with TensorRT-RTX, need not be there."""
    check_packages("build-engine")
    from ltx_export import engine_bundle, engine_source
    from ltx_export.onnx_order import Order as Graphs

    chosen = chosen_stages(stages)
    if out is None and not engine_source.is_bundle(source):
        raise UserError(f"{source} is not a bundle; say with --out where one is to be made")
    order = engine_bundle.Order(
        gpus=tuple(gpu),
        shapes=tuple(shape),
        stages=chosen,
        backend=backend.value if backend else None,
        branches=branches,
        per_token=per_token,
        optimization_level=optimization_level,
        workspace=None if workspace is None else int(workspace * GIB),
        allow_fallback=allow_fallback,
    )
    engine_bundle.check_early(order)
    graphs = Graphs(
        source,
        out or source,
        text_encoder=text_encoder,
        upsampler=upsampler,
        stages=chosen,
        pipeline_config=pipeline_config,
        precision=precision.value if precision else None,
        weights=weights.value,
        ignore_config_keys=tuple(ignore_config_key),
    )
    seconds = follow(engine_source.prepare(graphs))
    checked = engine_bundle.check(graphs.out, order)
    for work in checked.work:
        typer.echo(work.sentence())
    if not checked.work:
        typer.echo(f"{graphs.out}: up to date ({', '.join(checked.stages)})")
        return
    seconds += follow(engine_bundle.write(checked))
    for line in engine_bundle.report(graphs.out, checked):
        typer.echo(line)
    stages_built = ", ".join(work.key.stage for work in checked.work)
    typer.echo(f"{graphs.out}: {stages_built} in {seconds:.1f} s")


COMMANDS = (build_engine,)
