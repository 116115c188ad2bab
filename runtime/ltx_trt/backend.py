"""What a run's user says of how it is computed. Light: the command line reads it first."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ltx_engines.shapes import VideoShape


class Backend(StrEnum):
    auto = "auto"
    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class Providers(StrEnum):
    """Of ONNX Runtime."""

    cpu = "cpu"
    cuda = "cuda"
    tensorrt_rtx = "tensorrt-rtx"


class Memory(StrEnum):
    """What becomes of a stage when it has done its work."""

    staged = "staged"
    """It is freed, and loaded again when it is needed."""
    resident = "resident"
    """It stays, as all others do."""
    auto = "auto"
    """It stays if there is room for all stages at once."""


class TextEncoderDevice(StrEnum):
    auto = "auto"
    """Where the other stages are."""
    cpu = "cpu"
    """ONNX Runtime's CPU, whatever the others run on."""


class VaeTile(StrEnum):
    """What may be said of the VAE's tiles beside their size."""

    auto = "auto"
    """The clip is given whole if there is room, and of engines one that takes it; else a few latent
    frames at a time, else in tiles."""
    stream = "stream"
    """The decoder is given a few latent frames at a time; the encoder as with auto."""
    off = "off"
    """It is given whole."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`threads` are of one operator on the CPU; `device_memory` is in bytes, None: what is free;
    `loras` are FILE or FILE:STRENGTH; `provider` is of the stages that run on ONNX Runtime, None:
    CUDA if it is there, else the CPU; `prompt_cache` is a folder, None: texts are always encoded;
    `processes` share the machine's memory.
    """

    backend: Backend = Backend.auto
    threads: int | None = None
    memory: Memory = Memory.staged
    device_memory: int | None = None
    loras: tuple[str, ...] = ()
    provider: Providers | None = None
    cuda_graphs: bool = True
    text_encoder: TextEncoderDevice = TextEncoderDevice.auto
    prompt_cache: Path | None = None
    vae_tile: VaeTile | VideoShape = VaeTile.auto
    processes: int = 1
