"""ltx-export: from a checkpoint to a bundle that a small runtime plays."""

import sys
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ltx_engines.command import invoke
from ltx_engines.errors import UserError, nearest
from ltx_engines.stages import STAGES
from ltx_ref.checkpoint import CheckpointError

PACKAGES = ("onnx", "onnx_ir", "onnxscript", "safetensors", "torch", "transformers")
"""Of the extra [export]."""


class Weights(StrEnum):
    link = "link"
    copy = "copy"


class StgModes(StrEnum):
    attention_values = "attention_values"
    attention_skip = "attention_skip"
    transformer_block = "transformer_block"


class Precisions(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


IgnoreKeys = Annotated[
    list[str],
    typer.Option(
        "--ignore-config-key",
        help="A key of the checkpoint's configuration to pass over; may be repeated.",
    ),
]

app = typer.Typer(
    name="ltx-export",
    help=__doc__,
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def onnx(  # noqa: PLR0913 - options of a command
    checkpoint: Annotated[Path, typer.Argument(help="The original single-file .safetensors.")],
    text_encoder: Annotated[
        Path, typer.Option(help="T5 as on Hugging Face: config.json, safetensors, tokenizer.")
    ],
    out: Annotated[Path, typer.Option(help="The bundle, a folder that does not exist yet.")],
    stages: Annotated[str, typer.Option(help="all, or some of them, with commas.")] = "all",
    pipeline_config: Annotated[
        Path | None, typer.Option(help="An original ltxv-*.yaml: the bundle's defaults.")
    ] = None,
    stg_mode: Annotated[
        StgModes | None, typer.Option(help="What guidance by perturbed blocks does to them.")
    ] = None,
    precision: Annotated[
        Precisions | None,
        typer.Option(help="Convert the weights; else they stay as they are, and where they are."),
    ] = None,
    weights: Annotated[
        Weights, typer.Option(help="Hard links cost no disk; copies can leave the disk.")
    ] = Weights.link,
    name: Annotated[str | None, typer.Option(help="The bundle's name; else the file's.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle that is there.")
    ] = False,
    ignore_config_key: IgnoreKeys = [],  # noqa: B006 - typer copies it
) -> None:
    """Write one ONNX graph for each stage; their weights stay in the original files."""
    chosen = _stages(stages)
    _check_packages("onnx")
    from ltx_export.onnx_bundle import Order, write  # torch enters here and nowhere earlier

    order = Order(
        checkpoint,
        text_encoder,
        out,
        chosen,
        pipeline_config,
        stg_mode.value if stg_mode else None,
        precision.value if precision else None,
        weights.value,
        name,
        overwrite,
        tuple(ignore_config_key),
    )
    seconds = _follow(write(order))
    typer.echo(f"{out}: {', '.join(chosen)} in {seconds:.1f} s")


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="The original single-file .safetensors.")],
    ignore_config_key: IgnoreKeys = [],  # noqa: B006 - typer copies it
) -> None:
    """Say what a checkpoint is: version, sizes, element types, keys that no stage reads."""
    from ltx_export import inspection

    for line in inspection.lines(checkpoint, ignore_config_key):
        typer.echo(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    return invoke(app, "ltx-export", arguments, mendable=(CheckpointError,))


def _check_packages(command: str) -> None:
    """The base install is the runtime; what exports comes with an extra."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"ltx-export {command} needs {', '.join(missing)}; pip install 'ltx-trt[export]'"
        )


def _stages(words: str) -> tuple[str, ...]:
    """In the order of the table, whatever the order on the command line."""
    if words == "all":
        return STAGES
    chosen = [word.strip() for word in words.split(",")]
    for word in chosen:
        if word not in STAGES:
            raise UserError(
                f"unknown stage {word!r}{nearest(word, STAGES)}; known are all, {', '.join(STAGES)}"
            )
    return tuple(stage for stage in STAGES if stage in chosen)


def _follow(steps: Iterator[str]) -> float:
    """Show each step while it runs and its seconds when it is done; returns the sum."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    begin = start = time.perf_counter()
    step = ""
    with console.status("starting") as status:
        for following in steps:
            if step:
                console.print(f"{step}: {time.perf_counter() - start:.1f} s")
            step, start = following, time.perf_counter()
            status.update(step)
        console.print(f"{step}: {time.perf_counter() - start:.1f} s")
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
