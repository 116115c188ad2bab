"""Builders and numbers that are known to make bad engines, so that nobody has to find it again."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ltx_engines.cache_key import EngineKey, targets
from ltx_engines.stages import STREAM
from ltx_engines.targets import Flavour, Precision

VAE = frozenset({"vae_decoder", STREAM, "vae_encoder"})
BLACKWELL = 100
"""The first of its compute capabilities."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`who` is a builder, with the beginning of the bad versions, or a type of numbers. `least` is
    the first compute capability; no stages are all of them."""

    who: tuple[Flavour, str] | Precision
    what: str
    stages: frozenset[str] = frozenset()
    least: int = 0

    def concerns(self, key: EngineKey, precisions: Collection[Precision]) -> bool:
        cards = any(target >= self.least for target in key.targets)
        stage = not self.stages or key.stage in self.stages
        return cards and stage and self._is_used(key, precisions)

    def _is_used(self, key: EngineKey, precisions: Collection[Precision]) -> bool:
        if isinstance(self.who, str):
            return self.who in precisions
        flavour, version = self.who
        return key.flavour == flavour and f"{key.version}.".startswith(f"{version}.")


FAULTS = (
    Fault(
        ("tensorrt", "11.2.1"),
        "writes large activations into the engine as zeros (github.com/NVIDIA/TensorRT issue "
        "4841); use another version, or compare the engine's size with its weights",
    ),
    Fault(
        ("tensorrt", "10.16"),
        "makes VAE engines that crash at their first run on Blackwell "
        "(github.com/daydreamlive/DEMON issue 17); use another version",
        VAE,
        BLACKWELL,
    ),
    Fault(
        "fp16",
        "does not hold the activations of T5-XXL, whose clips become white "
        "(github.com/NVIDIA/TensorRT-Model-Connect issue 472); use bf16 where the GPU has it, or "
        "run this stage elsewhere",
        frozenset({"text_encoder"}),
    ),
)


def sentences(key: EngineKey, precisions: Collection[Precision]) -> Iterator[str]:
    """What is known against building this engine, of these numbers, with this builder."""
    for fault in FAULTS:
        if fault.concerns(key, precisions):
            who = fault.who if isinstance(fault.who, str) else f"{key.flavour} {key.version}"
            yield f"{key.stage} for {targets(key.targets)}: {who} {fault.what}"
