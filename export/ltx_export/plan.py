"""What a model will take on a GPU, known before anything is converted, built or loaded.

    make(order, parts) -> Plan: what each stage costs, and a yes or no for each GPU

Everything follows from the graphs at the largest clip of the order (`graph_costs.py`) and from the
table of GPUs. What is not in a graph was measured and is one of the constants below. Seconds are a
bound, not a promise: each kernel at the vendor's full rate or bandwidth, whichever takes longer.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from types import MappingProxyType
from typing import Literal, get_args

import onnx_ir as ir

from ltx_engines import targets
from ltx_engines.shapes import SPACE, TIME, VideoShape
from ltx_engines.targets import GIGA, PRECISIONS, Precision, Target
from ltx_export.axes import DERIVED, Derived
from ltx_export.graph_costs import INT32_MAX, Array, Costs, Kernel, cost
from ltx_export.graphs import OPSETS, Graphs
from ltx_export.plan_order import FLOATS, OWN, Number, Order, float_type, largest, number
from ltx_export.sources import Sources, check_fit
from ltx_ref.checkpoint import TensorInfo

# TensorRT-RTX 1.7.1 for SM89 on 2 CPU cores, 2025-11, benchmarks/plan.py.
KERNEL_BYTES = 40_000
"""An engine is its weights and this much code for each kernel (2B: 45 MB of 3,892)."""
ARENA = 1.1
"""Activation memory to the graph's estimate: 1.00 (2B), 0.93 to 1.09 (the VAE at two sizes)."""
BUILD_BASE = 220_000_000
"""Bytes of a builder's process without a model."""
BUILD_FACTOR: Mapping[str, float] = MappingProxyType({"float": 1.53, "conv": 2.06, "small": 1.04})
"""Bytes that a build with a stream writer allocates for one byte of weights, beside the mapped
file: 2B transformer; VAE decoder and encoder; 128 fp8 layers (2.35 GB for 2.05). Without the stream
writer it is 2.05 to 2.3 for all."""
EXPORT_BASE = 200_000_000
"""Bytes of a process that exports graphs whose weights stay in their files."""

RESERVED = 2**30
"""Bytes of a GPU that are not ours: CUDA's context, loaded kernels, a desktop. An allowance."""

STORED: Mapping[Precision, float] = MappingProxyType(
    {
        **{"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0},
        **{"int4": 0.5 + 2 / 128, "nvfp4": 0.5 + 1 / 16},
    }
)
"""Bytes of one weight. int4 has a bf16 scale for 128 of them, nvfp4 an fp8 scale for 16."""

COMPUTED: Mapping[ir.DataType, Precision] = MappingProxyType(
    {
        ir.DataType.FLOAT: "fp32",
        ir.DataType.FLOAT16: "fp16",
        ir.DataType.BFLOAT16: "bf16",
    }
)

QUANTIZED = re.compile(r"(^|\.)transformer_blocks\.\d+\..*\.weight$")
"""The weights (of two axes) that a quantized transformer has small: those of the published fp8
files. The rest stays bf16."""

HEAD_LIMIT = 256
"""The widest attention head with a kernel of its own; float32 has none at any width (TensorRT-RTX
1.7.1: "Attention operation was not supported by a dedicated kernel")."""

OVERLAP = (1, 2, 2)
"""Latent frames, rows and columns that neighbouring tiles share, as diffusers tiles."""
SMALLEST_TILE = 4

SHOWN = ("rtx 3060", "rtx 3090", "rtx 4060", "rtx 4070", "rtx 4090", "rtx 5080", "rtx 5090")
SHOWN_SERVERS = ("l4", "l40s", "a100 80gb", "h100 sxm", "rtx pro 6000")
"""The GPUs of a plan that names none."""

STAGED_NOTE = "one stage after another, each freed before the next"

Residency = Literal["all resident", "staged"]
RESIDENCIES: tuple[Residency, ...] = get_args(Residency)
Grid = tuple[int, int, int]
"""Latent frames, rows and columns."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stage's graph, in the type that `float_type` gives, and its weights' entries in the files.

    `derived` are the axes that follow from others.
    """

    model: ir.Model
    tensors: Mapping[str, TensorInfo]
    derived: Mapping[str, Derived] = field(default_factory=lambda: DERIVED)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What a stage costs at the largest clip; sizes in bytes, `flops` of one call."""

    name: str
    number: Number
    parameters: int
    disk: int
    export_memory: int
    build_memory: int
    engine: int
    costs: Costs

    @property
    def most_elements(self) -> int:
        """Of the largest end of a convolution."""
        return max((conv.elements for conv in self.costs.convolutions), default=0)


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
class Plan:
    order: Order
    shape: VideoShape
    stages: tuple[StagePlan, ...]
    verdicts: tuple[Verdict, ...]

    def run_seconds(self, verdict: Verdict) -> float | None:
        """A whole clip: the prompt once, every step, the decoder; None where it cannot be built."""
        calls = {"text_encoder": 1, "transformer": self.order.steps, "vae_decoder": 1}
        known = verdict.seconds
        return sum(known.get(name, 0.0) * n for name, n in calls.items()) if known else None

    @property
    def exit_code(self) -> int:
        """3 when a GPU that was asked for says no."""
        return 3 if self.order.gpus and not all(v.fits for v in self.verdicts) else 0


def parts(found: Sources, order: Order, stages: Iterable[str]) -> dict[str, Part]:
    """The stages of a checkpoint as the engines' builder will get them.

    Raises:
        UserError: a stage has no files, or they do not fit their configuration.
    """
    model = found.model()
    graphs = Graphs(model)
    chosen = tuple(stages)
    check_fit(found, chosen, graphs)
    made = {}
    for stage in chosen:
        weights = found.weights(stage)
        tensors = {name: weights[name].info for name in graphs.weights(stage)}
        graph = graphs.graph(stage, float_type(stage, order, tensors), max(OPSETS))
        made[stage] = Part(graph, tensors, model.derived())
    return made


def make(order: Order, parts: Mapping[str, Part]) -> Plan:
    """
    Raises:
        UserError: the order names a shape, a precision or a GPU that there is not.
        ValueError, AssertionError: a graph is not one that can be counted.
    """
    shape = largest(order.shapes)
    cards = [targets.find(name) for name in order.gpus or (*SHOWN, *SHOWN_SERVERS)]
    workshop = _Workshop(order, shape, parts)
    stages = tuple(_stage(name, workshop) for name in parts)
    verdicts = tuple(_verdict(card, stages, workshop) for card in cards)
    return Plan(order, shape, stages, verdicts)


@dataclass(slots=True)
class _Workshop:
    """The order's graphs, and what was counted of them already."""

    order: Order
    shape: VideoShape
    parts: Mapping[str, Part]
    counted: dict[tuple[str, Grid], Costs] = field(default_factory=dict)

    def costs(self, stage: str, grid: Grid) -> Costs:
        if (stage, grid) not in self.counted:
            part = self.parts[stage]
            self.counted[stage, grid] = cost(part.model, self.axes(stage, grid))
        return self.counted[stage, grid]

    def axes(self, stage: str, grid: Grid) -> dict[str, int]:
        frames, rows, columns = grid
        batch = {"transformer": self.order.branches, "text_encoder": min(self.order.branches, 2)}
        axes = {
            "batch": batch.get(stage, 1),
            "text": self.order.text,
            "tokens": frames * rows * columns,
            "latent_frames": frames,
            "latent_height": rows,
            "latent_width": columns,
        }
        for name, rule in self.parts[stage].derived.items():
            axes[name] = rule.factor * axes[rule.root] + rule.offset
        return axes if self.order.per_token else axes | {"timesteps": 1}


def _stage(name: str, workshop: _Workshop) -> StagePlan:
    part, costs = workshop.parts[name], workshop.costs(name, workshop.shape.latent)
    form = number(name, workshop.order, part.tensors)
    missing = sorted(costs.weights.keys() - part.tensors.keys())
    if missing:
        raise AssertionError(f"{name}: weights of the graph are in no file: {missing[:3]}")
    files = [part.tensors[weight] for weight in costs.weights]
    sizes = {weight: _stored(weight, array, form) for weight, array in costs.weights.items()}
    weights = sum(sizes.values())
    return StagePlan(
        name,
        form,
        sum(array.elements for array in costs.weights.values()),
        sum(info.end - info.begin for info in files),
        EXPORT_BASE + _conversion(part, costs, form),
        BUILD_BASE + weights + int(weights * BUILD_FACTOR[_kind(form, costs)]),
        weights + KERNEL_BYTES * len(costs.kernels),
        costs,
    )


def _stored(weight: str, array: Array, form: Number) -> int:
    """Bytes of a weight in the engine. Tables and vectors keep the graph's type."""
    small = _is_small(weight, array, form)
    return ceil(array.elements * STORED[form.stored]) if small else array.bytes


def _is_small(weight: str, array: Array, form: Number) -> bool:
    return form.quantized and len(array.shape) == 2 and bool(QUANTIZED.search(weight))


def _conversion(part: Part, costs: Costs, form: Number) -> int:
    """Memory for the largest tensor in its own type, in float32 and in the new one; 0 for none."""
    converted = (
        part.tensors[name]
        for name, array in costs.weights.items()
        if OWN.get(part.tensors[name].dtype)
        != (form.stored if _is_small(name, array, form) else form.base)
    )
    return max(
        (info.end - info.begin + prod(info.shape) * (4 + 4) for info in converted), default=0
    )


def _kind(form: Number, costs: Costs) -> str:
    if form.quantized:
        return "small"
    return "conv" if costs.convolutions else "float"


def _verdict(target: Target, stages: Sequence[StagePlan], workshop: _Workshop) -> Verdict:
    """Everything at once if it fits, else one stage after another, else no, with the reason."""
    illegal = _illegal(stages, target)
    budget = target.memory - RESERVED
    together = sum(stage.engine for stage in stages)
    for residency in RESIDENCIES:
        engines = {s.name: together if residency == "all resident" else s.engine for s in stages}
        tilings = {s.name: _tiling(s, budget - engines[s.name], workshop) for s in stages}
        memory = {name: engines[name] + working(tilings[name].costs) for name in engines}
        if short := [stage for stage in stages if _lacks(stage, tilings, memory, budget)]:
            continue
        break
    reasons = (*illegal, *(_shortage(s, tilings[s.name], target, budget) for s in short))
    seconds = {} if illegal else {s.name: _seconds(s, tilings[s.name], target) for s in stages}
    return Verdict(target, None if reasons else residency, reasons, memory, tilings, seconds)


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
    if reason := target.refusal(form.stored, choices):
        yield reason
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


def _tiling(stage: StagePlan, budget: int, workshop: _Workshop) -> Tiling:
    """The fewest tiles that fit; if none do, the last ones tried. Only a VAE is tiled."""
    pieces, tile, costs = (1, 1, 1), workshop.shape.latent, stage.costs
    while budget > 0 and not (_counts(costs) and working(costs) <= budget):
        if not stage.name.startswith("vae_") or max(tile) <= SMALLEST_TILE:
            break
        pieces = _halved(pieces, tile)
        tile = _tile(workshop.shape.latent, pieces)
        costs = workshop.costs(stage.name, tile)
    return Tiling(tile, prod(pieces), costs)


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


def _lacks(
    stage: StagePlan, tilings: Mapping[str, Tiling], memory: Mapping[str, int], budget: int
) -> bool:
    return memory[stage.name] > budget or not _counts(tilings[stage.name].costs)


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
    small = any(_is_small(name, costs.weights[name], form) for name in kernel.weights)
    computed = form.computed if small else COMPUTED.get(kernel.dtype, form.base)
    weights = sum(_stored(name, costs.weights[name], form) for name in kernel.weights)
    arithmetic = kernel.flops / target.rate(computed)
    return max(arithmetic, (kernel.traffic + weights) / target.bandwidth)
