"""Whether the stages that ONNX Runtime computes stay in the host's memory between two uses."""

from collections.abc import Iterable
from dataclasses import dataclass

from ltx_engines import host
from ltx_engines.bundle import Bundle
from ltx_engines.byte_sizes import said
from ltx_trt.backend import Choice, Memory
from ltx_trt.session.onnxruntime_session import CPU, provider_name

SHARE = 2
"""All weights may take one part in so many of the memory that is free: activations, which nobody
knows before they are computed, need the rest. A choice, not a measurement."""


@dataclass(frozen=True, slots=True)
class Policy:
    """`note` says why, where nobody else has decided."""

    keeps: bool
    note: str = ""


def policy(bundle: Bundle, choice: Choice, stages: Iterable[str]) -> Policy:
    """Of these stages, if they stay open all at once."""
    if choice.memory is not Memory.auto:
        return Policy(choice.memory is Memory.resident)
    if provider_name(None if choice.provider is None else choice.provider.value) != CPU:
        return Policy(False, "memory: staged, ONNX Runtime does not say what it takes of the GPU")
    if (free := host.free_memory()) is None:
        return Policy(False, "memory: staged, this system does not say how much of it is free")
    weights = weight_bytes(bundle, stages)
    return decide(weights, free, choice.processes)


def decide(weights: int, free: int, processes: int = 1) -> Policy:
    """`processes` begin with the same memory free, and each has its own weights in it."""
    share = SHARE * processes
    keeps = weights * share <= free
    what, fits = ("resident", "fit") if keeps else ("staged", "do not fit")
    note = (
        f"memory: {what}, {said(weights)} of weights {fits} into 1/{share} of the {said(free)} "
        f"that are free{f' to {processes} processes' if processes > 1 else ''}"
    )
    return Policy(keeps, note)


def weight_bytes(bundle: Bundle, stages: Iterable[str]) -> int:
    """Of files that several stages share, once."""
    entries = [bundle.stage(stage) for stage in stages]
    names = {name for entry in entries for name in (entry.file, *entry.weights)}
    return sum(bundle.manifest.files[name].bytes for name in names)
