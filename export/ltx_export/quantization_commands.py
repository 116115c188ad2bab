"""The commands that make a model smaller and prove that it is still the same model."""

import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ltx_export.console import check_packages, follow

T = TypeVar("T")


MOST = 2**63 - 1
"""The largest seed of torch's and of numpy's generators alike."""


def _known_device(word: str | None) -> str | None:
    if word is not None and not re.fullmatch("cpu|cuda(:[0-9]{1,3})?", word):
        raise typer.BadParameter(f"{word!r} is none; give cpu, cuda or cuda:N")
    return word


SEEDS = typer.Option(min=0, max=MOST, help="Of the first prompt; each next one has the next.")
TEXT_ENCODER = typer.Option(help="T5 as on Hugging Face: config.json, safetensors, tokenizer.")
DEVICE = typer.Option(
    callback=_known_device, help="cpu, cuda or cuda:N; else cuda if there is one."
)

Original = Annotated[Path, typer.Argument(help="The original .safetensors, not quantized.")]
Prompts = Annotated[Path, typer.Option(help="A text file, one prompt on each line.")]
Known = Annotated[
    Path | None, typer.Option(help="Ranges of activations, from ltx-export calibrate.")
]
Shapes = Annotated[
    list[str],
    typer.Option(metavar="WxHxF", help="A clip; may be repeated; else the model's usual."),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Of a run; else the model's usual.")]
First = Annotated[int | None, typer.Option(min=1, help="Only so many prompts of the file.")]
PipelineConfig = Annotated[
    Path | None,
    typer.Option(help="An original ltxv-*.yaml: schedule and guidance; of two passes the first's."),
]
NegativePrompt = Annotated[str | None, typer.Option(help="Else the usual one.")]
OffloadBlocks = Annotated[
    bool, typer.Option("--offload-blocks", help="Hold one block's weights at a time.")
]
IgnoreKeys = Annotated[
    list[str], typer.Option(help="A key of the checkpoint's configuration to pass over.")
]


def quantize(  # noqa: PLR0913 - options of a command
    checkpoint: Original,
    recipe: Annotated[
        str, typer.Option(help="fp8, int8, fp8-cast, int8-wo, int4-wo, nvfp4, or a FILE.toml.")
    ],
    out: Annotated[Path, typer.Option(help="The quantized .safetensors.")],
    calibration: Known = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="Errors of layers, from ltx-export sensitivity.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Keep each layer whose error is above this one.")
    ] = None,
    target_ssim: Annotated[
        float | None,
        typer.Option(help="Keep the fewest layers with which clips are so similar."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Run the model on these, one on each line, for what is not given; how, say the "
            "options from --text-encoder to --ignore-config-key."
        ),
    ] = None,
    text_encoder: Annotated[Path | None, TEXT_ENCODER] = None,
    shape: Shapes = [],  # noqa: B006 - typer copies it
    steps: Steps = None,
    seed: Annotated[int | None, SEEDS] = None,
    first: First = None,
    pipeline_config: PipelineConfig = None,
    negative_prompt: NegativePrompt = None,
    device: Annotated[str | None, DEVICE] = None,
    offload_blocks: OffloadBlocks = False,
    ignore_config_key: IgnoreKeys = [],  # noqa: B006 - typer copies it
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that are there.")
    ] = False,
) -> None:
    """Write the checkpoint with linear layers as codes and scales, as a recipe says."""
    check_packages("quantize")
    from ltx_export import exclusions, quantization_order

    runs = quantization_order.Runs(
        prompts,
        text_encoder,
        shapes=tuple(shape),
        steps=steps,
        seed=seed,
        first=first,
        pipeline_config=pipeline_config,
        negative_prompt=negative_prompt,
        device=device,
        offload_blocks=offload_blocks,
        ignore_config_keys=tuple(ignore_config_key),
    )
    wish = exclusions.Wish(max_error, target_ssim, sensitivity)
    order = quantization_order.Order(checkpoint, recipe, out, calibration, wish, runs, overwrite)
    seconds, done = followed(quantization_order.run(order))
    for line in quantization_order.lines(done, out, seconds):
        typer.echo(line)


def calibrate(  # noqa: PLR0913 - options of a command
    checkpoint: Original,
    text_encoder: Annotated[Path, TEXT_ENCODER],
    prompts: Prompts,
    out: Annotated[
        Path, typer.Option(help="The ranges, a .safetensors; one that is not finished goes on.")
    ],
    shape: Shapes = [],  # noqa: B006 - typer copies it
    steps: Steps = None,
    seed: Annotated[int, SEEDS] = 0,
    first: First = None,
    pipeline_config: PipelineConfig = None,
    negative_prompt: NegativePrompt = None,
    device: Annotated[str | None, DEVICE] = None,
    offload_blocks: OffloadBlocks = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin again, whatever is there.")
    ] = False,
    ignore_config_key: IgnoreKeys = [],  # noqa: B006 - typer copies it
) -> None:
    """Make clips with the reference, and write down how large the activations become."""
    check_packages("calibrate")
    from ltx_export import calibration

    calibration.check_packages()
    from ltx_export import calibrate as calibrating

    order = calibrating.Order(
        checkpoint,
        text_encoder,
        prompts,
        out,
        shapes=tuple(calibrating.shape_of(word) for word in shape),
        steps=steps,
        seed=seed,
        first=first,
        pipeline_config=pipeline_config,
        negative_prompt=negative_prompt,
        device=device,
        offload_blocks=offload_blocks,
        overwrite=overwrite,
        ignore_config_keys=tuple(ignore_config_key),
    )
    seconds = follow(calibrating.run(order))
    found = calibration.load(out)
    typer.echo(
        f"{out}: ranges of {len(found.ranges)} layers, seen in {found.facts['runs']} runs, "
        f"in {seconds:.1f} s"
    )


def sensitivity(  # noqa: PLR0913 - options of a command
    checkpoint: Original,
    text_encoder: Annotated[Path, TEXT_ENCODER],
    prompts: Prompts,
    calibration: Known = None,
    formats: Annotated[
        str, typer.Option(help="Recipes to measure, with commas; a FILE.toml is one too.")
    ] = "fp8,int8,fp8-cast,int8-wo",
    shape: Shapes = [],  # noqa: B006 - typer copies it
    steps: Steps = None,
    sample_steps: Annotated[
        int, typer.Option(min=1, help="Of each run, measure so many, evenly spaced.")
    ] = 4,
    seed: Annotated[int, SEEDS] = 0,
    first: First = None,
    pipeline_config: PipelineConfig = None,
    negative_prompt: NegativePrompt = None,
    device: Annotated[str | None, DEVICE] = None,
    offload_blocks: OffloadBlocks = False,
    out: Annotated[
        Path | None, typer.Option(help="All errors as JSON, for ltx-export quantize.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG: blocks by layers.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that are there.")
    ] = False,
    ignore_config_key: IgnoreKeys = [],  # noqa: B006 - typer copies it
) -> None:
    """Measure the error that each format causes in each layer, in real runs of the model."""
    check_packages("sensitivity")
    from ltx_export import sensitivity_report

    inputs = {
        "the checkpoint": checkpoint,
        "the text encoder": text_encoder,
        "--prompts": prompts,
        "--calibration": calibration,
        "--pipeline-config": pipeline_config,
    }
    given = {what: path for what, path in inputs.items() if path is not None}
    sensitivity_report.check(out, plot, given, overwrite=overwrite)
    from ltx_export import sensitivity as measuring
    from ltx_export.calibrate import Order, shape_of
    from ltx_export.plan_report import console

    runs = Order(
        checkpoint,
        text_encoder,
        prompts,
        checkpoint,
        shapes=tuple(shape_of(word) for word in shape),
        steps=steps,
        seed=seed,
        first=first,
        pipeline_config=pipeline_config,
        negative_prompt=negative_prompt,
        device=device,
        offload_blocks=offload_blocks,
        ignore_config_keys=tuple(ignore_config_key),
    )
    scratch, chosen = out and out.absolute().parent, measuring.recipes_of(formats)
    order = measuring.Order(runs, chosen, calibration, sample_steps, scratch)
    _, found = followed(measuring.measure(order))
    sensitivity_report.show(found, console())
    if out is not None:
        sensitivity_report.save(found, out)
    if plot is not None:
        sensitivity_report.plot(found, plot)


def quality(  # noqa: PLR0913 - options of a command
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="To be measured.")],
    reference: Annotated[Path, typer.Option(help="The bundle that they shall equal.")],
    prompts: Annotated[Path, typer.Option(help="A text file, one prompt on each line.")],
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MOST, help="Of the first clip; each next one has the next."),
    ] = None,
    pipeline_config: Annotated[
        Path | None, typer.Option(help="An original ltxv-*.yaml, for all of them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the report: Markdown, PNG and JSON.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a report that is there.")
    ] = False,
    min_ssim: Annotated[float | None, typer.Option(help="Exit 1 below this mean.")] = None,
    min_psnr: Annotated[float | None, typer.Option(help="In dB; exit 1 below this mean.")] = None,
) -> None:
    """Make the same clips with each bundle and the reference, and measure how far they are apart;
    exit code 1 if a minimum is missed."""
    from ltx_export import quality as measuring
    from ltx_export import quality_report

    minima = measuring.Minima(ssim=min_ssim, psnr=min_psnr)
    if out is not None:
        quality_report.check(out, overwrite=overwrite)
    order = measuring.Order(
        bundles=tuple(bundles),
        reference=reference,
        prompts=prompts,
        seed=seed,
        pipeline_config=pipeline_config,
        scratch=None if out is None else out.absolute().parent,
    )
    seconds, found = followed(measuring.run(order))
    typer.echo("\n".join(quality_report.table(found)))
    if out is not None:
        quality_report.write(found, out, measuring.command(order), minima)
    typer.echo(f"{len(bundles)} measured on {len(found.strips)} clips in {seconds:.1f} s")
    missed = [line for each in found.comparisons for line in minima.missed(each)]
    if missed:
        typer.echo("\n".join(missed), err=True)
        raise typer.Exit(1)


def verify(  # noqa: PLR0913 - options of a command
    checkpoint: Annotated[Path, typer.Argument(help="A quantized .safetensors, or a float one.")],
    text_encoder: Annotated[Path, TEXT_ENCODER],
    prompt: Annotated[str, typer.Option(help="What the clip shows.")],
    shape: Annotated[str, typer.Option(metavar="WxHxF", help="The clip, e.g. 704x480x25.")],
    original: Annotated[
        Path | None,
        typer.Option(help="What CHECKPOINT was quantized from; else the file beside it."),
    ] = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST, help="Of the noise.")] = 0,
    bundle: Annotated[
        Path | None, typer.Option(help="Its bundle; else one is exported and thrown away.")
    ] = None,
    bounds: Annotated[
        list[str],
        typer.Option(metavar="NAME=VALUE", help="As in quantized.velocity=0.05; may be repeated."),
    ] = [],  # noqa: B006 - typer copies it
    pipeline_config: PipelineConfig = None,
    device: Annotated[
        str, typer.Option(callback=_known_device, help="Of the rungs in torch: cpu, cuda, cuda:N.")
    ] = "cpu",
    offload_blocks: OffloadBlocks = False,
    json: Annotated[Path | None, typer.Option(help="A file for all figures.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file of figures that is there.")
    ] = False,
    ignore_config_key: IgnoreKeys = [],  # noqa: B006 - typer copies it
) -> None:
    """Run one seed in float32, bfloat16, quantized and as ONNX, and name what breaks, down to the
    layer; exit code 1 if a rung exceeds its bound."""
    check_packages("verify")
    from ltx_export import ladder

    ladder.check_packages()
    from ltx_export import ladder_report
    from ltx_export import verify as climbing
    from ltx_export.calibrate import shape_of

    order = climbing.Order(
        checkpoint,
        text_encoder,
        prompt,
        shape_of(shape),
        original=original,
        steps=steps,
        seed=seed,
        bundle=bundle,
        bounds=tuple(bounds),
        pipeline_config=pipeline_config,
        device=device,
        offload_blocks=offload_blocks,
        ignore_config_keys=tuple(ignore_config_key),
        figures=json,
        overwrite=overwrite,
    )
    _, found = followed(climbing.run(order))
    ladder_report.show(found, ladder_report.console())
    if json is not None:
        ladder_report.save(found, json)
    if found.broken is not None:
        raise typer.Exit(1)


COMMANDS: tuple[Callable[..., None], ...] = (calibrate, sensitivity, quantize, verify, quality)
"""In the order of the help."""


def followed(work: Generator[str, None, T]) -> tuple[float, T]:
    """Show the work's steps; its seconds, and what it returns."""
    found: list[T] = []

    def steps() -> Iterator[str]:
        found.append((yield from work))

    seconds = follow(steps())
    return seconds, found[0]
