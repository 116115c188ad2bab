"""The GPUs that a plan can be asked about: what they hold, how fast they are, what is legal there.

Rates are the vendor's, dense (no sparsity) and with float32 accumulation, since that is what the
kernels of a video model do. GeForce cards halve the rate of fp16, bf16 and fp8 for it, but not that
of int8, which accumulates in int32; the cards for workstations and data centres do not.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from ltx_engines.errors import UserError, nearest

Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4", "nvfp4"]
"""How a stage's large weights are stored. int4 is for weights alone: its arithmetic is bf16's."""

Flavour = Literal["tensorrt", "tensorrt-rtx"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

LEAST = MappingProxyType(
    {"fp32": 80, "fp16": 75, "bf16": 80, "fp8": 89, "int8": 75, "int4": 80, "nvfp4": 100}
)
"""The first compute capability that builds each precision (TensorRT-RTX 1.7.1, built for each SM on
a CPU, 2026-11; nvfp4 on SM100 is TensorRT's, from its release notes). For SM75 it says that neither
"FP32 GEMM" nor "FP32 3D convolution" is supported; elementwise kernels are."""

RTX_CAPABILITIES = frozenset({75, 80, 86, 89, 120, 121})
"""What TensorRT-RTX 1.7.1 can build for (its enum ComputeCapability)."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Rates relative to fp16's, by precision; a precision that is missing has no units of its own.

    `name` is how a person calls it, `capability` is 89 for SM89.
    """

    name: str
    capability: int
    fp8: float = 0.0
    int8: float = 0.0
    nvfp4: float = 0.0


TURING = Architecture("Turing", 75, int8=4)
AMPERE = Architecture("Ampere", 86, int8=4)
AMPERE_SERVER = Architecture("Ampere", 80, int8=2)
ADA = Architecture("Ada", 89, fp8=2, int8=4)
ADA_PRO = Architecture("Ada", 89, fp8=2, int8=2)
HOPPER = Architecture("Hopper", 90, fp8=2, int8=2)
BLACKWELL = Architecture("Blackwell", 120, fp8=2, int8=4, nvfp4=8)
BLACKWELL_PRO = Architecture("Blackwell", 120, fp8=2, int8=2, nvfp4=4)
BLACKWELL_SERVER = Architecture("Blackwell", 100, fp8=2, int8=2, nvfp4=4)


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU. `memory` is in bytes, `bandwidth` in bytes per second, `rate` in FLOP per second."""

    name: str
    architecture: Architecture
    memory: int
    bandwidth: float
    fp32: float
    fp16: float
    source: str

    @property
    def capability(self) -> int:
        return self.architecture.capability

    @property
    def flavours(self) -> tuple[Flavour, ...]:
        """Which builders can make an engine for it, the one that needs no GPU to build first."""
        rtx = self.capability in RTX_CAPABILITIES
        return ("tensorrt-rtx", "tensorrt") if rtx else ("tensorrt",)

    def refusal(
        self, precision: Precision, choices: Iterable[Precision] = PRECISIONS
    ) -> str | None:
        """Why no engine of this precision can be built for it, and which of the choices can.

        None if it can be built.
        """
        if self.capability >= LEAST[precision]:
            return None
        legal = ", ".join(p for p in choices if self.capability >= LEAST[p])
        return (
            f"{precision} needs SM{LEAST[precision]} or newer, {self.name} is "
            f"SM{self.capability} ({self.architecture.name}); use {legal}"
        )

    def rate(self, precision: Precision) -> float:
        """In fp32 any GPU computes, if only what is not a product.

        Raises:
            ValueError: the precision is not legal here.
        """
        if precision == "fp32":
            return self.fp32
        if reason := self.refusal(precision):
            raise ValueError(reason)
        arch = self.architecture
        relative = {"fp8": arch.fp8, "int8": arch.int8, "nvfp4": arch.nvfp4}
        return self.fp16 * relative.get(precision, 1.0)


GIB, GIGA, TERA = 2**30, 10**9, 10**12


def _row(
    name: str,
    architecture: Architecture,
    memory_gib: float,
    bandwidth_gb: float,
    teraflops: tuple[float, float],
    source: str,
) -> Target:
    """`teraflops` are those of fp32 (CUDA cores, no TF32) and of fp16."""
    fp32, fp16 = (rate * TERA for rate in teraflops)
    memory = int(memory_gib * GIB)
    return Target(name, architecture, memory, bandwidth_gb * GIGA, fp32, fp16, source)


TURING_PAPER = "NVIDIA Turing GPU Architecture whitepaper, Founders Edition"
AMPERE_PAPER = "NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A"
AMPERE_CARD = "product page: SMs, boost clock, memory; 512 FLOP per SM and clock as in GA102"
ADA_PAPER = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
ADA_CARD = "product page: SMs, boost clock, memory; 512 FLOP per SM and clock as in AD102"
BLACKWELL_PAPER = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix"
BLACKWELL_CARD = "product page: SMs, boost clock, memory; 512 FLOP per SM and clock as in GB202"
HOPPER_PAPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, table 2"

TARGETS: tuple[Target, ...] = (
    _row("RTX 2080 Ti", TURING, 11, 616, (14.2, 56.9), TURING_PAPER),
    _row("RTX 3060", AMPERE, 12, 360, (12.7, 25.5), AMPERE_CARD),
    _row("RTX 3070", AMPERE, 8, 448, (20.3, 40.6), AMPERE_PAPER),
    _row("RTX 3080", AMPERE, 10, 760, (29.8, 59.5), AMPERE_PAPER),
    _row("RTX 3090", AMPERE, 24, 936, (35.6, 71.0), AMPERE_PAPER),
    _row("RTX 4060", ADA, 8, 272, (15.1, 30.2), ADA_CARD),
    _row("RTX 4060 Ti 8GB", ADA, 8, 288, (22.1, 44.1), ADA_CARD),
    _row("RTX 4060 Ti 16GB", ADA, 16, 288, (22.1, 44.1), ADA_CARD),
    _row("RTX 4070", ADA, 12, 504, (29.1, 58.3), ADA_CARD),
    _row("RTX 4070 Super", ADA, 12, 504, (35.5, 71.0), ADA_CARD),
    _row("RTX 4070 Ti", ADA, 12, 504, (40.1, 80.2), ADA_CARD),
    _row("RTX 4070 Ti Super", ADA, 16, 672, (44.1, 88.2), ADA_CARD),
    _row("RTX 4080", ADA, 16, 717, (48.7, 97.5), ADA_PAPER),
    _row("RTX 4080 Super", ADA, 16, 736, (52.2, 104.4), ADA_CARD),
    _row("RTX 4090", ADA, 24, 1008, (82.6, 165.2), ADA_PAPER),
    _row("RTX 5060", BLACKWELL, 8, 448, (19.2, 38.4), BLACKWELL_CARD),
    _row("RTX 5060 Ti 8GB", BLACKWELL, 8, 448, (23.7, 47.4), BLACKWELL_CARD),
    _row("RTX 5060 Ti 16GB", BLACKWELL, 16, 448, (23.7, 47.4), BLACKWELL_CARD),
    _row("RTX 5070", BLACKWELL, 12, 672, (30.9, 61.7), BLACKWELL_PAPER),
    _row("RTX 5070 Ti", BLACKWELL, 16, 896, (43.9, 87.9), BLACKWELL_PAPER),
    _row("RTX 5080", BLACKWELL, 16, 960, (56.3, 112.6), BLACKWELL_PAPER),
    _row("RTX 5090", BLACKWELL, 32, 1792, (104.8, 209.5), BLACKWELL_PAPER),
    _row(
        *("RTX PRO 6000 Blackwell", BLACKWELL_PRO, 96, 1792, (126.0, 503.8)),
        "NVIDIA RTX Blackwell PRO GPU Architecture whitepaper, workstation edition",
    ),
    _row(
        *("RTX 6000 Ada", ADA_PRO, 48, 960, (91.1, 364.2)),
        "NVIDIA RTX 6000 Ada Generation data sheet (1,457 TFLOPS of fp8 are with sparsity)",
    ),
    # ECC on GDDR6 is on by default here and keeps one sixteenth of the memory for itself.
    _row("L4", ADA_PRO, 24 * 15 / 16, 300, (30.3, 121.0), "NVIDIA L4 data sheet, without sparsity"),
    _row("L40S", ADA_PRO, 48 * 15 / 16, 864, (91.6, 362.0), "NVIDIA L40S data sheet"),
    _row("A100 40GB", AMPERE_SERVER, 40, 1555, (19.5, 312.0), "NVIDIA A100 data sheet, SXM"),
    _row("A100 80GB", AMPERE_SERVER, 80, 2039, (19.5, 312.0), "NVIDIA A100 data sheet, SXM"),
    _row("H100 SXM", HOPPER, 80, 3352, (66.9, 989.4), HOPPER_PAPER),
    _row("H100 PCIe", HOPPER, 80, 2039, (51.2, 756.0), HOPPER_PAPER),
    _row("H200", HOPPER, 140, 4800, (66.9, 989.4), "NVIDIA H200 data sheet, SXM; 141 GB"),
    _row(
        *("B200", BLACKWELL_SERVER, 179, 8000, (75.0, 2250.0)),
        "NVIDIA DGX B200 data sheet, one eighth, without sparsity; 180 GB",
    ),
)


def find(name: str) -> Target:
    """The GPU of this name, however it is spelled: `rtx4090`, `RTX 4090`, `GeForce RTX-4090`.

    The beginning of a name will do when only one goes on from it. `sm89` is the least card of that
    compute capability (least memory, then least bandwidth): what fits it fits them all.

    Raises:
        UserError: no such GPU is known, or several are.
    """
    if match := re.fullmatch(r"sm_?(\d+)", name.strip().lower()):
        return _least(int(match[1]))
    wish = _key(name)
    if exact := [t for t in TARGETS if _key(t.name) == wish]:
        return exact[0]
    begun = [t for t in TARGETS if wish and _key(t.name).startswith(wish)]
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise UserError(f"GPU {name!r} is not one but several: {_names(begun)}; name one of them")
    names = {_key(t.name): t.name for t in TARGETS}
    hint = nearest(wish, names)
    for key, spelled in names.items():
        hint = hint.replace(repr(key), repr(spelled))
    raise UserError(f"unknown GPU {name!r}{hint or f'; known are {_names(TARGETS)} and sm75, ...'}")


def _least(capability: int) -> Target:
    cards = [t for t in TARGETS if t.capability == capability]
    if not cards:
        known = ", ".join(f"sm{sm}" for sm in sorted({t.capability for t in TARGETS}))
        raise UserError(f"no GPU of compute capability sm{capability} is known; known are {known}")
    return min(cards, key=lambda card: (card.memory, card.bandwidth))


def _key(name: str) -> str:
    """Letters and digits, without the words that people leave out."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia)?(geforce)?(rtx|gtx)?|gb$", "", letters)


def _names(targets: Iterable[Target]) -> str:
    return ", ".join(t.name for t in targets)
