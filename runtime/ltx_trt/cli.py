"""ltx-trt: run a bundle, or look at one."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ltx_engines import presets
from ltx_engines.command import invoke
from ltx_ref.checkpoint import CheckpointError
from ltx_trt import SEED, batch_commands, cache_commands, compare_commands, original_flags
from ltx_trt.backend import Backend, TextEncoderDevice
from ltx_trt.cache_options import (
    CacheFirst,
    CacheLast,
    CacheLongest,
    CacheRetention,
    CacheSteps,
    CacheTableFile,
    CacheWishes,
    Compare,
)
from ltx_trt.media_options import (
    Chunk,
    HeldNoise,
    Images,
    InputMediaPath,
    InputVideo,
    MediaPaths,
    Offload,
    OutputPath,
    PromptsAt,
    Resize,
    StartFrames,
    Strengths,
    Videos,
)
from ltx_trt.options import (
    SHIPPED as SHIPPED,
)
from ltx_trt.options import (
    Config,
    Count,
    DeviceMemory,
    EncoderDevice,
    Eta,
    Exported,
    Forgetful,
    FrameRate,
    Frames,
    Json,
    KeepLoaded,
    Loras,
    MemoryPolicy,
    NegativePrompt,
    Output,
    OutputOrNone,
    Pixels,
    Preset,
    Prompt,
    Provider,
    Room,
    RunOn,
    RunsOn,
    Sampler,
    Scale,
    Seed,
    Sheet,
    Stg,
    Strict,
    Threads,
    TileSize,
    Uncaptured,
    check_shipped,
    choice,
    memory_policy,
)


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


@app.command()
def run(  # noqa: PLR0913 - options of a command
    prompt: Prompt,
    output: OutputOrNone = None,
    output_path: OutputPath = None,
    bundle: Exported = SHIPPED,
    negative_prompt: NegativePrompt = None,
    width: Pixels = None,
    height: Pixels = None,
    num_frames: Frames = None,
    frame_rate: FrameRate = None,
    seed: Seed = SEED,
    num_inference_steps: Count = None,
    guidance_scale: Scale = None,
    stg_scale: Stg = None,
    rescaling_scale: Scale = None,
    sampler: Sampler = None,
    eta: Eta = 0.0,
    pipeline_config: Config = None,
    preset: Preset = None,
    strict_shape: Strict = False,
    image: Images = [],  # noqa: B006 - typer copies it
    video: Videos = [],  # noqa: B006 - typer copies it
    input_video: InputVideo = None,
    input_media_path: InputMediaPath = None,
    resize: Resize = False,
    image_cond_noise_scale: HeldNoise = None,
    conditioning_media_paths: MediaPaths = [],  # noqa: B006 - typer copies it
    conditioning_strengths: Strengths = [],  # noqa: B006 - typer copies it
    conditioning_start_frames: StartFrames = [],  # noqa: B006 - typer copies it
    chunk: Chunk = None,
    prompt_at: PromptsAt = [],  # noqa: B006 - typer copies it
    contact_sheet: Sheet = None,
    cache_steps: CacheSteps = None,
    cache_table: CacheTableFile = None,
    cache_first: CacheFirst = None,
    cache_last: CacheLast = None,
    cache_retention: CacheRetention = None,
    cache_longest: CacheLongest = None,
    compare: Compare = False,
    backend: RunOn = Backend.auto,
    provider: Provider = None,
    device_memory: DeviceMemory = None,
    memory: MemoryPolicy = None,
    keep_loaded: KeepLoaded = False,
    offload_to_cpu: Offload = False,
    text_encoder_device: EncoderDevice = TextEncoderDevice.auto,
    no_prompt_cache: Forgetful = False,
    vae_tile: TileSize = "auto",
    no_cuda_graphs: Uncaptured = False,
    threads: Threads = None,
    lora: Loras = [],  # noqa: B006 - typer copies it
    json: Json = False,
) -> None:
    """Make a clip from a prompt. What is not said is the pipeline config's or the bundle's."""
    check_shipped(bundle)
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
        image=tuple(image),
        video=tuple(video),
        input_video=input_video,
        input_media_path=input_media_path,
        resize=resize,
        image_cond_noise_scale=image_cond_noise_scale,
        conditioning_media_paths=tuple(conditioning_media_paths),
        conditioning_strengths=tuple(conditioning_strengths),
        conditioning_start_frames=tuple(conditioning_start_frames),
        chunk=chunk,
        prompt_at=tuple(prompt_at),
    )
    policy = memory_policy(memory, keep_loaded, offload=offload_to_cpu)
    chosen = choice(
        RunsOn(backend, provider, threads, text_encoder_device, no_cuda_graphs),
        Room(policy, device_memory, no_prompt_cache, vae_tile),
        lora,
    )
    config = presets.chosen(pipeline_config, preset)
    cache = CacheWishes(
        cache_steps, cache_table, cache_first, cache_last, cache_retention, cache_longest, compare
    )
    place = original_flags.destination(output, output_path)
    report = execute(Job(wishes, bundle, place, config, contact_sheet, chosen, cache))
    print(report.as_json() if json else report.as_text())


app.command(cls=batch_commands.BatchCommand)(batch_commands.batch)
app.command()(compare_commands.compare)
app.command()(compare_commands.bench)
app.command("calibrate-cache")(cache_commands.calibrate_cache)


@app.command()
def client(  # noqa: PLR0913 - options of a command
    prompt: Prompt,
    output: Output,
    url: Annotated[
        str, typer.Option(metavar="grpc://HOST:PORT", help="Of a Triton server; grpcs:// with TLS.")
    ] = "grpc://localhost:8001",
    negative_prompt: NegativePrompt = None,
    width: Pixels = None,
    height: Pixels = None,
    num_frames: Frames = None,
    frame_rate: FrameRate = None,
    seed: Seed = SEED,
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


@app.command("presets")
def show_presets(json: Json = False) -> None:
    """List what `--preset` knows: the releases of LTX-Video, each as the original runs it."""
    if json:
        print(presets.as_json())
        return
    for line in presets.lines():
        print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    words = original_flags.in_our_words(sys.argv[1:] if arguments is None else arguments)
    return invoke(app, "ltx-trt", words, mendable=(CheckpointError,))


if __name__ == "__main__":
    sys.exit(main())
