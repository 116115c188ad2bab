"""ltx-trt: run a bundle, or look at one."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ltx_engines import byte_sizes
from ltx_engines.command import invoke
from ltx_engines.errors import UserError
from ltx_ref.checkpoint import CheckpointError
from ltx_trt import SEED
from ltx_trt.backend import Backend, Choice, Keep, Providers

SHIPPED = Path(__file__).parent / "ltx_tiny"


def _with_dashes(word: str) -> str:
    """The original spells its flags with underscores (--num_frames); both are understood."""
    return word.replace("_", "-")


app = typer.Typer(
    name="ltx-trt",
    help=__doc__,
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": _with_dashes},
)


Pixels = Annotated[int | None, typer.Option(help="Pixels; multiples of 32 need no crop.")]
Frames = Annotated[int | None, typer.Option(help="8k + 1 need no cut.")]
Count = Annotated[int | None, typer.Option(min=1)]
Scale = Annotated[float | None, typer.Option(help="1 is none.")]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout, nothing else.")]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="A .mp4 or .gif file, a new folder, or frames_%04d.png."),
]
Stg = Annotated[float | None, typer.Option(help="Spatio-temporal guidance; 0 is none.")]
Sampler = Annotated[str | None, typer.Option(help="euler, stochastic, dpmpp-2m or ddim.")]
Eta = Annotated[float, typer.Option(help="The share of fresh noise in ddim, 0 to 1.")]
Config = Annotated[Path | None, typer.Option(help="An original configs/ltxv-*.yaml.")]
Strict = Annotated[bool, typer.Option("--strict-shape", help="Refuse sizes that need a crop.")]
Sheet = Annotated[Path | None, typer.Option(help="Also an overview of the frames (.png).")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Of one operator, where ONNX Runtime is on the CPU.")
]
RunOn = Annotated[
    Backend, typer.Option(help="auto: the bundle's engines, ONNX Runtime if it has none.")
]
Provider = Annotated[
    Providers | None,
    typer.Option(
        help="Of ONNX Runtime, which then runs all; else CUDA if it is there, or the CPU."
    ),
]

Loras = Annotated[
    list[str],
    typer.Option(metavar="FILE[:STRENGTH]", help="Added to the weights; may be repeated."),
]
Uncaptured = Annotated[
    bool,
    typer.Option("--no-cuda-graphs", help="Engines' kernels go to the GPU one by one."),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        metavar="8GiB",
        help="Of the GPU at most, for engines; weights that do not fit are streamed.",
    ),
]


class Form(StrEnum):
    mp4 = "mp4"
    gif = "gif"
    png = "png"


@app.command()
def run(  # noqa: PLR0913 - options of a command
    prompt: Annotated[str, typer.Option(help="What the clip shows.")],
    output: Output,
    bundle: Annotated[Path, typer.Option(help="The exported model.")] = SHIPPED,
    negative_prompt: Annotated[str | None, typer.Option(help="What it does not show.")] = None,
    width: Pixels = None,
    height: Pixels = None,
    num_frames: Frames = None,
    frame_rate: Annotated[float | None, typer.Option(help="Frames a second.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = SEED,
    num_inference_steps: Count = None,
    guidance_scale: Scale = None,
    stg_scale: Stg = None,
    rescaling_scale: Scale = None,
    sampler: Sampler = None,
    eta: Eta = 0.0,
    pipeline_config: Config = None,
    strict_shape: Strict = False,
    contact_sheet: Sheet = None,
    backend: RunOn = Backend.auto,
    provider: Provider = None,
    device_memory: DeviceMemory = None,
    keep_loaded: Annotated[
        bool, typer.Option("--keep-loaded", help="All engines stay on the GPU to the end.")
    ] = False,
    no_cuda_graphs: Uncaptured = False,
    threads: Threads = None,
    lora: Loras = [],  # noqa: B006 - typer copies it
    json: Json = False,
) -> None:
    """Make a clip from a prompt. What is not said is the pipeline config's or the bundle's."""
    _check_shipped(bundle)
    from ltx_trt.job import Job, execute
    from ltx_trt.request import Wishes

    wishes = Wishes(
        prompt=prompt,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        num_frames=num_frames,
        frame_rate=frame_rate,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        stg_scale=stg_scale,
        rescaling_scale=rescaling_scale,
        sampler=sampler,
        eta=eta,
        strict_shape=strict_shape,
    )
    keep = Keep.always if keep_loaded else Keep.never
    memory, on = _memory(device_memory), _backend(backend, provider)
    choice = Choice(on, threads, keep, memory, tuple(lora), provider, not no_cuda_graphs)
    report = execute(Job(wishes, bundle, output, pipeline_config, contact_sheet, choice))
    print(report.as_json() if json else report.as_text())


@app.command()
def batch(  # noqa: PLR0913 - options of a command
    prompts: Annotated[Path, typer.Option(help="A text file, one prompt on each line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder: 0000, 0001, ...")],
    bundle: Annotated[Path, typer.Option(help="The exported model.")] = SHIPPED,
    form: Annotated[
        Form, typer.Option("--format", help="png: a folder of lossless frames for each clip.")
    ] = Form.mp4,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the first clip; each next one has the next.")
    ] = SEED,
    num_inference_steps: Count = None,
    width: Pixels = None,
    height: Pixels = None,
    num_frames: Frames = None,
    pipeline_config: Config = None,
    backend: RunOn = Backend.auto,
    provider: Provider = None,
    device_memory: DeviceMemory = None,
    no_cuda_graphs: Uncaptured = False,
    threads: Threads = None,
    lora: Loras = [],  # noqa: B006 - typer copies it
    json: Annotated[
        bool, typer.Option("--json", help="One line of JSON on stdout for each clip.")
    ] = False,
) -> None:
    """Make a clip of each prompt in a file. What is not said is as in `run`."""
    _check_shipped(bundle)
    from ltx_engines.prompts import read
    from ltx_trt.batch import Batch, execute
    from ltx_trt.request import Wishes

    wishes = tuple(
        Wishes(
            prompt=prompt,
            seed=seed + number,
            num_inference_steps=num_inference_steps,
            width=width,
            height=height,
            num_frames=num_frames,
        )
        for number, prompt in enumerate(read(prompts))
    )
    memory, on = _memory(device_memory), _backend(backend, provider)
    kept, graphs = Keep.fitting, not no_cuda_graphs
    choice = Choice(on, threads, kept, memory, tuple(lora), provider, graphs)
    for report in execute(Batch(wishes, bundle, output, form.value, pipeline_config, choice)):
        print(report.as_json() if json else report.as_text(), flush=True)


@app.command()
def client(  # noqa: PLR0913 - options of a command
    prompt: Annotated[str, typer.Option(help="What the clip shows.")],
    output: Output,
    url: Annotated[
        str, typer.Option(metavar="grpc://HOST:PORT", help="Of a Triton server; grpcs:// with TLS.")
    ] = "grpc://localhost:8001",
    negative_prompt: Annotated[str | None, typer.Option(help="What it does not show.")] = None,
    width: Pixels = None,
    height: Pixels = None,
    num_frames: Frames = None,
    frame_rate: Annotated[float | None, typer.Option(help="Frames a second.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = SEED,
    num_inference_steps: Count = None,
    guidance_scale: Scale = None,
    stg_scale: Stg = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Give up, and cancel, after so many seconds.")
    ] = None,
    json: Json = False,
) -> None:
    """Let a Triton server make a clip; Ctrl-C cancels it there. The server has the defaults."""
    from ltx_trt.triton.client import Call, execute

    said = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "width": width,
        "height": height,
        "num_frames": num_frames,
        "num_inference_steps": num_inference_steps,
        "frame_rate": frame_rate,
        "guidance_scale": guidance_scale,
        "stg_scale": stg_scale,
    }
    wishes = {name: wish for name, wish in said.items() if wish is not None}
    report = execute(Call(url, wishes, timeout=timeout), output)
    print(report.as_json() if json else report.as_text())


@app.command()
def info(
    bundle: Annotated[Path, typer.Argument(help="The exported model.")] = SHIPPED,
    json: Json = False,
) -> None:
    """Show a bundle's stages, tensors, files and defaults."""
    from ltx_engines.bundle import open_bundle

    found = open_bundle(bundle)
    if json:
        print(found.manifest.model_dump_json())
        return
    from rich.console import Console

    from ltx_trt.overview import show

    show(found, Console(soft_wrap=True))


def _backend(wished: Backend, provider: Providers | None) -> Backend:
    if provider is None:
        return wished
    if wished not in (Backend.auto, Backend.onnxruntime):
        raise UserError(
            f"--provider is of ONNX Runtime, --backend {wished.value} is not; leave one of them out"
        )
    return Backend.onnxruntime


def _memory(wished: str | None) -> int | None:
    return None if wished is None else byte_sizes.parse(wished, "--device-memory")


def _check_shipped(bundle: Path) -> None:
    if bundle == SHIPPED and not SHIPPED.is_dir():
        raise UserError(
            f"the bundle that ships with ltx-trt is missing ({SHIPPED}); name one with --bundle"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    return invoke(app, "ltx-trt", arguments, mendable=(CheckpointError,))


if __name__ == "__main__":
    sys.exit(main())
