"""The options that several commands of ltx-trt share, and what becomes of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ltx_engines import byte_sizes
from ltx_engines.errors import UserError
from ltx_engines.shapes import SPACE, TIME, VideoShape
from ltx_trt.backend import Backend, Choice, Memory, Providers, TextEncoderDevice, VaeTile

SHIPPED = Path(__file__).parent / "ltx_tiny"

LEAST_TILE = (2 * SPACE, 2 * SPACE, TIME + 1)
"""Pixels of rows and columns, and frames."""

Exported = Annotated[Path, typer.Option("--bundle", help="The exported model.")]
Prompt = Annotated[str, typer.Option(help="What the clip shows.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What it does not show.")]
FrameRate = Annotated[float | None, typer.Option(help="Frames a second.")]
Seed = Annotated[int, typer.Option(min=0)]
Pixels = Annotated[int | None, typer.Option(help="Pixels; multiples of 32 need no crop.")]
Frames = Annotated[int | None, typer.Option(help="8k + 1 need no cut.")]
Count = Annotated[
    int | None, typer.Option(min=1, help="Steps from noise to the clip; more take longer.")
]
Scale = Annotated[float | None, typer.Option(help="1 is none.")]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout, nothing else.")]
OUTPUT = typer.Option(
    "--output", "-o", help="A .mp4 or .gif file, a new folder, or frames_%04d.png."
)
Output = Annotated[Path, OUTPUT]
OutputOrNone = Annotated[Path | None, OUTPUT]
Stg = Annotated[float | None, typer.Option(help="Spatio-temporal guidance; 0 is none.")]
Sampler = Annotated[str | None, typer.Option(help="euler, stochastic, dpmpp-2m or ddim.")]
Eta = Annotated[float, typer.Option(help="The share of fresh noise in ddim, 0 to 1.")]
Config = Annotated[Path | None, typer.Option(help="An original configs/ltxv-*.yaml.")]
Preset = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="As the original runs a release: see ltx-trt presets."),
]
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
MEMORY = "staged: each stage is freed after use; resident: all stay; auto: if all fit."
MemoryPolicy = Annotated[
    Memory | None, typer.Option("--memory", help=MEMORY, show_default=Memory.staged.value)
]
MemoryOfMany = Annotated[
    Memory | None, typer.Option("--memory", help=MEMORY, show_default=Memory.auto.value)
]
KeepLoaded = Annotated[bool, typer.Option("--keep-loaded", help="As --memory resident.")]
EncoderDevice = Annotated[
    TextEncoderDevice,
    typer.Option("--text-encoder-device", help="cpu: ONNX Runtime's, whatever runs the rest."),
]
Forgetful = Annotated[
    bool,
    typer.Option("--no-prompt-cache", help="Encode texts, also those that were encoded before."),
]


TileSize = Annotated[
    str,
    typer.Option(
        "--vae-tile",
        metavar="auto|stream|HxWxF|off",
        help="Height, width and frames that the VAE is given at once (ltx-export build-engine has "
        "width first); stream: decode a few frames at a time, in little memory and exactly; auto: "
        "whole if there is room (and an engine that takes it), else stream or tiles.",
    ),
]


class Form(StrEnum):
    mp4 = "mp4"
    gif = "gif"
    png = "png"


@dataclass(frozen=True, slots=True)
class RunsOn:
    """What was said of who computes."""

    backend: Backend
    provider: Providers | None
    threads: int | None
    text_encoder: TextEncoderDevice = TextEncoderDevice.auto
    no_cuda_graphs: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """What was said of what may be held, and where."""

    memory: Memory
    device_memory: str | None
    no_prompt_cache: bool = False
    vae_tile: str = VaeTile.auto.value


def choice(on: RunsOn, room: Room, loras: Iterable[str]) -> Choice:
    """
    Raises:
        UserError: two of the options contradict each other, or one is nonsense.
    """
    return Choice(
        on_backend(on.backend, on.provider),
        on.threads,
        room.memory,
        memory_limit(room.device_memory),
        tuple(loras),
        on.provider,
        not on.no_cuda_graphs,
        on.text_encoder,
        prompt_cache(room.no_prompt_cache),
        tile_size(room.vae_tile),
    )


def on_backend(wished: Backend, provider: Providers | None) -> Backend:
    if provider is None:
        return wished
    if wished not in (Backend.auto, Backend.onnxruntime):
        raise UserError(
            f"--provider is of ONNX Runtime, --backend {wished.value} is not; leave one of them out"
        )
    return Backend.onnxruntime


def tile_size(wished: str) -> VaeTile | VideoShape:
    """
    Raises:
        UserError: it is none of these, or tiles of that size cannot overlap.
    """
    if wished in list(VaeTile):
        return VaeTile(wished)
    sizes = wished.split("x")
    if len(sizes) != len(LEAST_TILE) or not all(size.isdecimal() for size in sizes):
        raise UserError(
            "--vae-tile is auto, stream, off or HEIGHTxWIDTHxFRAMES such as 512x768x65, not "
            f"{wished}"
        )
    height, width, frames = map(int, sizes)
    if any(size < least for size, least in zip((height, width, frames), LEAST_TILE, strict=True)):
        least = "x".join(map(str, LEAST_TILE))
        raise UserError(f"--vae-tile {wished} is too small for tiles to overlap; try {least}")
    try:
        return VideoShape(frames, height, width)
    except UserError as error:
        raise UserError(f"--vae-tile {wished}: {error}") from None


def memory_limit(wished: str | None) -> int | None:
    return None if wished is None else byte_sizes.parse(wished, "--device-memory")


def check_shipped(bundle: Path) -> None:
    if bundle == SHIPPED and not SHIPPED.is_dir():
        raise UserError(
            f"the bundle that ships with ltx-trt is missing ({SHIPPED}); name one with --bundle"
        )


def memory_policy(wished: Memory | None, keep_loaded: bool, *, offload: bool = False) -> Memory:
    """`keep_loaded` is the older word for one of them, `offload` the original's for another. A
    single clip needs most stages once, so that nothing is won by keeping them."""
    if offload and (keep_loaded or wished not in (None, Memory.staged)):
        other = "--keep-loaded is --memory resident" if keep_loaded else f"--memory is {wished}"
        raise UserError(f"--offload-to-cpu is --memory staged, but {other}; leave one of them out")
    if keep_loaded and wished not in (None, Memory.resident):
        raise UserError(
            f"--keep-loaded is --memory resident, but --memory is {wished}; leave one of them out"
        )
    return Memory.resident if keep_loaded else wished or Memory.staged


def prompt_cache(forgetful: bool) -> Path | None:
    """Where texts are kept, on this machine for this user."""
    if forgetful:
        return None
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("ltx-trt")) / "prompts"
