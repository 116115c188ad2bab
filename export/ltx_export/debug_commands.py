"""ltx-export debug-layers: what is wrong with an engine, down to the node."""

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ltx_engines.errors import UserError
from ltx_export.console import check_packages
from ltx_export.quantization_commands import followed


class Builders(StrEnum):
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


def debug_layers(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE|ONNX", help="Graphs, or one graph of a bundle.")
    ],
    stage: Annotated[
        str | None, typer.Option(help="Of the bundle; else the graph's, or the transformer.")
    ] = None,
    gpu: Annotated[
        list[str], typer.Option(help="rtx4090, sm89, ...; may be repeated; else the one at hand.")
    ] = [],  # noqa: B006 - typer copies it
    shape: Annotated[str, typer.Option(metavar="WxHxF", help="A clip.")] = "1216x704x121",
    branches: Annotated[int, typer.Option(min=1, max=3, help="Of guidance.")] = 1,
    backend: Annotated[
        Builders | None, typer.Option(help="Else what is installed and builds for the GPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Find the nodes that a builder refuses or, on the GPU, the layer whose numbers are wrong; exit
    code 1 if there are any."""
    check_packages("debug-layers")
    from ltx_export import debug_layers as debugging
    from ltx_export import engine_source, refused_nodes
    from ltx_export.onnx_transformer import STAGE

    home, own = engine_source.resolve(bundle, None)
    named = stage or (own or (STAGE,))[0]
    if own is not None and named not in own:
        raise UserError(f"{bundle} is the stage {own[0]}, not {named}; leave out --stage")
    order = debugging.Order(
        home, named, tuple(gpu), shape, branches, backend.value if backend else None
    )
    seconds, found = followed(debugging.run(order))
    if as_json:
        typer.echo(json.dumps(found.document() | {"seconds": round(seconds, 1)}, indent=1))
    else:
        typer.echo(found.target)
        if found.refused is None:
            typer.echo("every node is built")
        else:
            for line in refused_nodes.said(found.refused):
                typer.echo(line)
        typer.echo(found.numbers)
    if not found.passed:
        raise typer.Exit(1)


COMMANDS: tuple[Callable[..., None], ...] = (debug_layers,)
