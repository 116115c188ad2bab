"""ltx-export: from a checkpoint to a bundle that a small runtime plays."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from ltx_engines import presets
from ltx_engines.command import invoke
from ltx_engines.errors import UserError
from ltx_export import debug_commands, engine_commands, quantization_commands, triton_commands
from ltx_export.console import check_packages, follow
from ltx_export.options import (
    IgnoreKeys,
    Lora,
    Mode,
    Placement,
    Precisions,
    Preset,
    Weights,
    chosen_stages,
)
from ltx_ref.checkpoint import CheckpointError

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
    out: Annotated[Path, typer.Option(help="The bundle, a folder that does not exist yet.")],
    text_encoder: Annotated[
        Path | None,
        typer.Option(help="T5 as on Hugging Face: config.json, safetensors, tokenizer."),
    ] = None,
    upsampler: Annotated[
        Path | None, typer.Option(help="A latent upscaler's .safetensors: one more stage.")
    ] = None,
    stages: Annotated[str, typer.Option(help="all, or some of them, with commas.")] = "all",
    pipeline_config: Annotated[
        Path | None, typer.Option(help="An original ltxv-*.yaml: the bundle's defaults.")
    ] = None,
    preset: Preset = None,
    stg_mode: Mode = None,
    precision: Annotated[
        Precisions | None,
        typer.Option(help="Convert the weights; else they stay as they are, and where they are."),
    ] = None,
    lora: Lora = [],  # noqa: B006 - typer copies it
    opset: Annotated[
        int | None,
        typer.Option(help="23 for TensorRT, 20 for ONNX Runtime; else by the element type."),
    ] = None,
    weights: Placement = Weights.link,
    hash_everything: Annotated[
        bool, typer.Option("--hash", help="Hash large weights now; ltx-export seal does it later.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="The bundle's name; else the file's.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle that is there.")
    ] = False,
    ignore_config_key: IgnoreKeys = [],  # noqa: B006 - typer copies it
) -> None:
    """Write one ONNX graph for each stage; their weights stay in the original files."""
    chosen = chosen_stages(stages)
    check_packages("onnx")
    from ltx_export.onnx_bundle import Order, write

    order = Order(
        checkpoint,
        out,
        text_encoder=text_encoder,
        upsampler=upsampler,
        stages=chosen,
        pipeline_config=presets.chosen(pipeline_config, preset),
        stg_mode=stg_mode.value if stg_mode else None,
        precision=precision.value if precision else None,
        loras=tuple(lora),
        opset=_opset(opset),
        weights=weights.value,
        hash_everything=hash_everything,
        name=name,
        overwrite=overwrite,
        ignore_config_keys=tuple(ignore_config_key),
    )
    seconds = follow(write(order))
    typer.echo(f"{out}: {stages} in {seconds:.1f} s")


@app.command()
def seal(
    bundle: Annotated[Path, typer.Argument(help="A bundle of large, unhashed files.")],
    accept_changed: Annotated[
        bool, typer.Option("--accept-changed", help="Take them as they are now, e.g. copied.")
    ] = False,
) -> None:
    """Hash what an export did not read, so that the bundle can be checked on another machine."""
    from ltx_engines.bundle import reseal

    added = reseal(bundle, accept_changed=accept_changed)
    typer.echo(f"{bundle}: {len(added)} hashed" + "".join(f", {name}" for name in added))


@app.command()
def lora(
    files: Annotated[list[str], typer.Argument(metavar="FILE[:STRENGTH]...", help="LoRAs.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The checkpoint that they are, or should be, for.")
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="Say what they are, and whether they fit.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the checkpoint with them fused into it.")
    ] = None,
) -> None:
    """Look at LoRAs, or fuse them into a checkpoint."""
    check_packages("lora")
    from ltx_export import fusion

    if listing == (out is not None):
        raise UserError("ltx-export lora wants either --list or --out FILE")
    if out is None:
        for line in fusion.lines(files, checkpoint):
            typer.echo(line)
        return
    if checkpoint is None:
        raise UserError("ltx-export lora --out FILE wants --checkpoint FILE, to fuse into")
    seconds = follow(fusion.fuse(files, checkpoint, out))
    typer.echo(f"{out}: {len(files)} fused in {seconds:.1f} s")


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete them.")] = False,
) -> None:
    """Say which converted and fused weights are kept for the next export."""
    check_packages("cache")
    from ltx_export import weight_cache

    if clear:
        cleared = weight_cache.clear()
        held = f"; {cleared.held:,} more when the bundles that link to them are deleted"
        typer.echo(f"{cleared.freed:,} bytes freed{held if cleared.held else ''}")
        return
    for entry in weight_cache.entries():
        linked = ", linked by a bundle" if entry.linked else ""
        typer.echo(f"{entry.file}: {entry.bytes:,} bytes, {entry.name or 'incomplete'}{linked}")


@app.command()
def plan(  # noqa: PLR0913 - options of a command
    checkpoint: Annotated[Path, typer.Argument(help="The original single-file .safetensors.")],
    text_encoder: Annotated[Path | None, typer.Option(help="Plan it too: its folder.")] = None,
    upsampler: Annotated[Path | None, typer.Option(help="Plan it too: its file.")] = None,
    stages: Annotated[
        str, typer.Option(help="all that are in the files, or some of them, with commas.")
    ] = "all",
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16, bf16, fp8, int8, ..., of the transformer; else its own."),
    ] = None,
    rest_precision: Annotated[
        str | None,
        typer.Option(help="Of the other stages; else --precision if it is a float type, or bf16."),
    ] = None,
    shape: Annotated[
        list[str],
        typer.Option(metavar="WxHxF", help="A clip, or FROM..TO; may be repeated."),
    ] = ["1216x704x121"],  # noqa: B006 - typer copies it
    gpu: Annotated[
        list[str], typer.Option(help="rtx4090, h200, sm89, ...; may be repeated; else a set.")
    ] = [],  # noqa: B006 - typer copies it
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A run by it, maybe in two passes: see ltx-trt presets."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of a run; else the model's usual.")] = None,
    branches: Annotated[
        int | None, typer.Option(help="1, or more for guidance: CFG and STG add one each.")
    ] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Of a prompt; else 256.")] = None,
    conditioning: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="With given images, N of them after frame 0."),
    ] = None,
    vae_stream: Annotated[
        int | None,
        typer.Option(metavar="FRAMES", help="The decoder goes on, so many frames at a time."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    ignore_config_key: IgnoreKeys = [],  # noqa: B006 - typer copies it
) -> None:
    """Say what each stage needs, and whether it fits a GPU; exit code 3 if one that was asked for
    is too small."""
    check_packages("plan")
    from ltx_export import plan as planning
    from ltx_export import plan_report, sources, stage_plan
    from ltx_export.plan_question import Question, by_preset, usual
    from ltx_ref.text import MAX_LENGTH

    wanted = chosen_stages(stages)
    found = sources.read(checkpoint, text_encoder, upsampler, ignore_config_key)
    usual_steps, usual_branches = usual(found.config)
    question = Question(
        shapes=tuple(shape),
        precision=precision,
        rest_precision=rest_precision,
        gpus=tuple(gpu),
        steps=usual_steps if steps is None else steps,
        branches=usual_branches if branches is None else branches,
        text_tokens=MAX_LENGTH if text_tokens is None else text_tokens,
        conditioning=conditioning,
        vae_stream=vae_stream,
    )
    if preset is not None:
        if steps is not None or branches is not None:
            raise UserError("--preset says --steps and --branches; leave them out")
        question = by_preset(question, preset, found.config)
    choice = stage_plan.choose(found, wanted, question)
    parts = stage_plan.parts(found, question, choice.stages)
    made = planning.make(question, parts, choice.left_out)
    if as_json:
        typer.echo(json.dumps(plan_report.document(made), indent=2))
    else:
        plan_report.show(made, plan_report.console())
    raise typer.Exit(made.exit_code)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT|ENGINE|BUNDLE",
            help="A .safetensors, an index of shards, a text encoder's folder; engines.",
        ),
    ],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List all tensors, not only the largest.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="List an engine's kernels.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Of engines: JSON on stdout.")] = False,
    ignore_config_key: IgnoreKeys = [],  # noqa: B006 - typer copies it
) -> None:
    """Say what weights are: version, sizes, element types, quantization, tensors by size; or what
    kernels an engine runs."""
    check_packages("inspect")
    from ltx_export import engine_inspection, inspection

    if engine_inspection.is_engine(path):
        found = engine_inspection.read(path)
        if as_json:
            typer.echo(json.dumps(engine_inspection.document(found), indent=1))
            return
        for line in engine_inspection.lines(found, layers=layers):
            typer.echo(line)
        return
    if layers or as_json:
        raise UserError(f"{path} holds no engines; --layers and --json are for those")
    listed = None if tensors else inspection.LARGEST
    for line in inspection.lines(path, ignore_config_key, listed):
        typer.echo(line)


for command in (
    *quantization_commands.COMMANDS,
    *engine_commands.COMMANDS,
    *debug_commands.COMMANDS,
    *triton_commands.COMMANDS,
):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    return invoke(app, "ltx-export", arguments, mendable=(CheckpointError,))


def _opset(number: int | None) -> Literal[20, 23] | None:
    known: dict[int | None, Literal[20, 23] | None] = {None: None, 20: 20, 23: 23}
    if number not in known:
        raise UserError(f"--opset {number} is not one of 20, 23")
    return known[number]


if __name__ == "__main__":
    sys.exit(main())
