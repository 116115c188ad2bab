"""What a run's user says of how it is computed. Light: the command line reads it first."""

from dataclasses import dataclass
from enum import StrEnum


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


class Keep(StrEnum):
    """What becomes of a stage when it has done its work in a clip."""

    never = "never"
    always = "always"
    fitting = "fitting"
    """It stays if the GPU has room for all stages at once."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`threads` are of one operator on the CPU; `device_memory` is in bytes, None: what is free;
    `loras` are FILE or FILE:STRENGTH; `provider` is of the stages that run on ONNX Runtime, None:
    CUDA if it is there, else the CPU."""

    backend: Backend = Backend.auto
    threads: int | None = None
    keep: Keep = Keep.never
    device_memory: int | None = None
    loras: tuple[str, ...] = ()
    provider: Providers | None = None
    cuda_graphs: bool = True
