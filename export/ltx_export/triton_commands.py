"""ltx-export triton: a bundle as a model repository of Triton Inference Server, or what is wrong
with one."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ltx_engines.errors import UserError
from ltx_engines.triton_settings import Batching, Layout, Settings


def triton(  # noqa: PLR0913 - options of a command
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="The exported model.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The repository: a new folder.")] = None,
    layout: Annotated[
        Layout, typer.Option(help="The whole pipeline in one model, or a model for each stage.")
    ] = "single",
    at_once: Annotated[
        int, typer.Option(min=1, help="Requests that are computed together; others wait.")
    ] = Settings().at_once,
    batching: Annotated[
        Batching,
        typer.Option(
            help="Steps of several requests go together where that changes no bit of a clip, "
            "wherever their shapes are equal (GPUs round otherwise then), or never."
        ),
    ] = "exact",
    batch_delay: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="How long a step waits for steps of other requests of its shape, if there are.",
        ),
    ] = Settings().batch_delay,
    queue: Annotated[int, typer.Option(min=1, help="Requests that wait, at most.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="Of one operator, on the CPU.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Put it in the place of another repository.")
    ] = False,
    check: Annotated[
        Path | None, typer.Option(metavar="REPO", help="Say what is wrong with a repository.")
    ] = None,
) -> None:
    """Make a model repository for Triton Inference Server, or check one without a server."""
    _check_packages()
    if check is not None:
        if bundle is not None or out is not None:
            raise UserError("--check looks at a repository and makes none; leave out the rest")
        from ltx_export.triton.check import check as look

        for line in look(check).lines():
            typer.echo(line)
        return
    if bundle is None or out is None:
        raise UserError("name a bundle and --out REPO, or a repository with --check REPO")
    from ltx_export.triton import config, repository

    settings = Settings(
        layout=layout,
        at_once=at_once,
        batching=batching,
        batch_delay=batch_delay,
        threads=threads,
    )
    order = repository.Order(settings, config.Queue(size=queue), overwrite)
    models = repository.write(bundle, out, order)
    typer.echo(f"{out}: {', '.join(models)}; how to run it is in {out / 'README.md'}")


def _check_packages() -> None:
    if find_spec("tritonclient") is None:
        raise UserError("ltx-export triton needs tritonclient; pip install 'ltx-trt[triton]'")


COMMANDS: tuple[Callable[..., None], ...] = (triton,)
