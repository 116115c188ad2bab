"""Whether a model fits a GPU: which stages at once, in how many tiles, and how fast at best."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from types import MappingProxyType
from typing import Literal, get_args

import onnx_ir as ir

from ltx_engines.shapes import SPACE, TIME
from ltx_engines.targets import GIGA, PRECISIONS, Precision, Target
from ltx_export.engine_profiles import VAE
from ltx_export.graph_costs import INT32_MAX, Costs, Kernel
from ltx_export.plan_question import FLOATS, Number
from ltx_export.stage_plan import Grid, StagePlan, Workshop, is_small, stored

ARENA = 1.1
"""Activation memory to the graph's estimate: 0.99 (2B transformer), 1.00 (the VAE, 121 frames of
1216x704), 1.09 (the VAE, 25 frames of 256x256)."""
RESERVED = 2**30
"""Bytes of a GPU that are not ours: CUDA's context, loaded kernels, a desktop. An allowance."""

COMPUTED: Mapping[ir.DataType, Precision] = MappingProxyType(
    {
        ir.DataType.FLOAT: "fp32",
        ir.DataType.FLOAT16: "fp16",
        ir.DataType.BFLOAT16: "bf16",
    }
)

HEAD_LIMIT = 256
"""The widest attention head with a kernel of its own; float32 has none at any width (TensorRT-RTX
1.7.1: "Attention operation was not supported by a dedicated kernel")."""

OVERLAP = (1, 2, 2)
"""Latent frames, rows and columns that neighbouring tiles share, as diffusers tiles."""
SMALLEST_TILE = 4

Residency = Literal["all resident", "staged"]
RESIDENCIES: tuple[Residency, ...] = get_args(Residency)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a VAE stage is run: `count` calls, each of `tile` latent cells."""

    tile: Grid
    count: int
    costs: Costs

    @property
    def pixels(self) -> str:
        frames, rows, columns = self.tile
        return f"{SPACE * columns}x{SPACE * rows}x{TIME * (frames - 1) + 1}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`memory` and `seconds` are by stage, as far as they can be known."""

    target: Target
    residency: Residency | None
    reasons: tuple[str, ...]
    memory: Mapping[str, int]
    tilings: Mapping[str, Tiling]
    seconds: Mapping[str, float]

    @property
    def fits(self) -> bool:
        return self.residency is not None


@dataclass(frozen=True, slots=True)
class _Attempt:
    """The stages under one residency; `short` are those that it leaves too little for."""

    residency: Residency
    tilings: Mapping[str, Tiling]
    memory: Mapping[str, int]
    short: tuple[StagePlan, ...]


def verdict(target: Target, stages: Sequence[StagePlan], workshop: Workshop) -> Verdict:
    """Everything at once if it fits, else one stage after another, else no, with the reason."""
    illegal = _illegal(stages, target)
    budget = target.memory - RESERVED
    attempts = (_attempt(residency, stages, budget, workshop) for residency in RESIDENCIES)
    for best in attempts:
        if not best.short:
            break
    tilings = best.tilings
    reasons = (*illegal, *(_shortage(s, tilings[s.name], target, budget) for s in best.short))
    seconds = {} if illegal else {s.name: _seconds(s, tilings[s.name], target) for s in stages}
    residency = None if reasons else best.residency
    return Verdict(target, residency, reasons, best.memory, tilings, seconds)


def _attempt(
    residency: Residency, stages: Sequence[StagePlan], budget: int, workshop: Workshop
) -> _Attempt:
    together = sum(stage.engine for stage in stages)
    engines = {s.name: together if residency == "all resident" else s.engine for s in stages}
    tilings = {s.name: _tiling(s, budget - engines[s.name], workshop) for s in stages}
    memory = {name: engines[name] + working(tilings[name].costs) for name in engines}
    short = (s for s in stages if memory[s.name] > budget or not _counts(tilings[s.name].costs))
    return _Attempt(residency, tilings, memory, tuple(short))


def _illegal(stages: Sequence[StagePlan], target: Target) -> tuple[str, ...]:
    """Why engines cannot be built for the GPU, whatever its memory; each reason once."""
    stages_of: dict[str, list[str]] = {}
    for stage in stages:
        for reason in (*_refusals(stage, target), *_attention_refusal(stage)):
            stages_of.setdefault(reason, []).append(stage.name)
    return tuple(f"{', '.join(names)}: {reason}" for reason, names in stages_of.items())


def _refusals(stage: StagePlan, target: Target) -> Iterator[str]:
    form = stage.number
    choices = PRECISIONS if stage.name == "transformer" else tuple(FLOATS)
    if reasons := [r for r in (target.refusal(type_, choices) for type_ in form.types) if r]:
        yield from reasons
    elif reason := target.refusal(form.base, tuple(FLOATS)):
        yield f"{form.stored} leaves other weights {form.base}, and {reason}"


def _attention_refusal(stage: StagePlan) -> Iterator[str]:
    for attention in stage.costs.attentions:
        if attention.dtype == ir.DataType.FLOAT or attention.head_dim > HEAD_LIMIT:
            width, dtype = attention.head_dim, COMPUTED[attention.dtype]
            yield (
                f"no attention kernel for {dtype} heads of {width}; wanted fp16 or bf16 and at "
                f"most {HEAD_LIMIT}"
            )
            return


def working(costs: Costs) -> int:
    """Device memory beside the engine while it runs."""
    return int(ARENA * costs.activations) + costs.io


def needs(stage: StagePlan, costs: Costs) -> int:
    """Device memory of one stage alone."""
    return stage.engine + working(costs)


def _counts(costs: Costs) -> bool:
    """Whether each convolution can count its elements."""
    return all(conv.elements <= INT32_MAX for conv in costs.convolutions)


def _tiling(stage: StagePlan, budget: int, workshop: Workshop) -> Tiling:
    """The fewest tiles that fit; if none do, the last ones tried. Only a VAE is tiled."""
    pieces, tile, costs = (1, 1, 1), workshop.shape.latent, stage.costs
    while budget > 0 and not (_counts(costs) and working(costs) <= budget):
        if stage.name not in VAE or max(tile) <= SMALLEST_TILE:
            break
        pieces = _halved(pieces, tile)
        tile = _tile(workshop.shape.latent, pieces)
        costs = workshop.costs(stage.name, tile)
    return Tiling(tile, prod(pieces), costs)


def tiles(whole: Grid) -> Iterator[Grid]:
    """Smaller and smaller ones, as a plan tries them."""
    pieces, tile = (1, 1, 1), whole
    while max(tile) > SMALLEST_TILE:
        pieces = _halved(pieces, tile)
        tile = _tile(whole, pieces)
        yield tile


def _halved(pieces: Grid, tile: Grid) -> Grid:
    """Twice as many along the longest side; of equals the last: frames are the dearest to cut."""
    longest = max(range(3), key=lambda axis: (tile[axis], axis))
    frames, rows, columns = (n * 2 if axis == longest else n for axis, n in enumerate(pieces))
    return frames, rows, columns


def _tile(whole: Grid, pieces: Grid) -> Grid:
    """The size with which so many overlapping pieces cover the whole."""
    frames, rows, columns = (
        ceil((size + (count - 1) * overlap) / count)
        for size, count, overlap in zip(whole, pieces, OVERLAP, strict=True)
    )
    return frames, rows, columns


def _shortage(stage: StagePlan, tiling: Tiling, target: Target, budget: int) -> str:
    if not _counts(tiling.costs):
        return (
            f"{stage.name}: a convolution of {stage.most_elements:,} elements; TensorRT counts to "
            f"{INT32_MAX:,}"
        )
    return (
        f"{stage.name} needs {needs(stage, tiling.costs) / GIGA:.1f} GB "
        f"(engine {stage.engine / GIGA:.1f}, activations "
        f"{ARENA * tiling.costs.activations / GIGA:.1f}, inputs and outputs "
        f"{tiling.costs.io / GIGA:.1f}); {target.name} has {target.memory / GIGA:.1f} GB, "
        f"{budget / GIGA:.1f} of them free"
    )


def _seconds(stage: StagePlan, tiling: Tiling, target: Target) -> float:
    """One call of a stage; all tiles of a VAE."""
    form = stage.number
    once = sum(
        _kernel_seconds(kernel, tiling.costs, form, target) for kernel in tiling.costs.kernels
    )
    return once * tiling.count


def _kernel_seconds(kernel: Kernel, costs: Costs, form: Number, target: Target) -> float:
    small = [name for name in kernel.weights if is_small(name, costs.weights[name], form)]
    computed = COMPUTED.get(kernel.dtype, form.base)
    if small:
        coded = form.coded.get(small[0])
        computed = form.computed if coded is None else coded.computed
    weights = sum(stored(name, costs.weights[name], form) for name in kernel.weights)
    arithmetic = kernel.flops / target.rate(computed)
    return max(arithmetic, (kernel.traffic + weights) / target.bandwidth)
