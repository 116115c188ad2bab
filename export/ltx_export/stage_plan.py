"""What each stage of a model costs, on the disk, on the host that builds it, and in its graph."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil
from types import MappingProxyType

import onnx_ir as ir

from ltx_engines.errors import UserError
from ltx_engines.shapes import ENLARGES, TIME, VideoShape
from ltx_engines.stages import DECODER, OPTIONAL, STAGES, STREAM
from ltx_engines.targets import Precision
from ltx_export.axes import DERIVED, Derived
from ltx_export.concrete_shapes import Array
from ltx_export.graph_costs import Costs, cost
from ltx_export.graphs import OPSETS, Graphs
from ltx_export.plan_question import OWN, Number, Question, float_type, number
from ltx_export.sources import PREFIXES, Sources, check_fit
from ltx_ref import quantization
from ltx_ref.checkpoint import TensorInfo
from ltx_ref.ltx_video.vae_stream_config import delay
from ltx_ref.quantization import Layer

# TensorRT-RTX 1.7.1 for SM89 on 2 CPU cores, 2026-11, benchmarks/plan.py.
KERNEL_BYTES = 40_000
"""An engine is its weights and this much code for each kernel (2B: 54 MB of 3,901)."""
BUILD_BASE = 220_000_000
"""Bytes of a builder's process without a model."""
BUILD_FACTOR: Mapping[str, float] = MappingProxyType(
    {"float": 1.18, "small": 1.19, "text": 1.72, "conv": 1.89}
)
"""Bytes that a build allocates for one byte of weights, beside the mapped file and BUILD_BASE: the
2B transformer, in bf16 and in fp8 (SM89; 0.99 for SM120), and its VAE decoder
(benchmarks/engines.py). All weights are copied once, and a second time those that are merged: q, k
and v of a layer, 3 of 16 parts of a block of the transformer; of T5 also both that its gate reads,
0.74 of a block (four blocks of T5-XXL were built: 1.54 with the table of words). That is with the
text's keys and values apart (text_products.py), with a stream writer and with what is freed given
back at once (build.py)."""
EXPORT_BASE = 160_000_000
"""Bytes of a process that exports graphs and copies no weights (13B with T5-XXL: 155 MB)."""
CONVERSION = 16_000_000
"""More bytes when weights are converted, piece by piece (2B to fp16: 13 MB)."""

STORED: Mapping[Precision, float] = MappingProxyType(
    {
        **{"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0},
        **{"int4": 0.5 + 2 / 128, "nvfp4": 0.5 + 1 / 16},
    }
)
"""Bytes of one weight. int4 has a bf16 scale for 128 of them, nvfp4 an fp8 scale for 16."""

QUANTIZED = re.compile(r"(^|\.)transformer_blocks\.\d+\..*\.weight$")
"""The weights (of two axes) that a quantized transformer has small: those of the published fp8
files. The rest stays bf16."""

Grid = tuple[int, int, int]
"""Latent frames, rows and columns."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stage's graph, in the type that `float_type` gives, and its weights' entries in the files.

    `derived` are the axes that follow from others; `layers` are quantized in the files, by the
    names of their weights; `delay` are frames, of a decoder that goes on.
    """

    model: ir.Model
    tensors: Mapping[str, TensorInfo]
    derived: Mapping[str, Derived] = field(default_factory=lambda: DERIVED)
    layers: Mapping[str, Layer] = field(default_factory=dict)
    delay: int = 0


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
class Choice:
    """The stages that are planned, and, by name, why others are not."""

    stages: tuple[str, ...]
    left_out: Mapping[str, str]


def choose(found: Sources, wanted: Iterable[str] | None, question: Question) -> Choice:
    """The stages that were asked for; for None all that have their weights in a file.

    Raises:
        UserError: no stage has, or of two decoders the other one is asked for.
    """
    choice = _choose(found, wanted)
    if question.vae_stream is None:
        if STREAM in choice.stages:
            raise UserError(f"{STREAM} takes so many frames at a time: give --vae-stream 16")
        return choice
    if not {DECODER, STREAM} & set(choice.stages):
        raise UserError(
            "--vae-stream is for the VAE's decoder, which is not among the stages; leave it out"
        )
    if wanted is None:  # as build-engine has it
        stages = tuple(STREAM if stage == DECODER else stage for stage in choice.stages)
    else:
        stages = tuple(dict.fromkeys((*choice.stages, STREAM)))
    return Choice(stages, choice.left_out)


def _choose(found: Sources, wanted: Iterable[str] | None) -> Choice:
    absent = _absent(found)
    known = STAGES if found.upsampler is None else (*STAGES, *OPTIONAL)
    stages = tuple(s for s in known if s not in absent) if wanted is None else tuple(wanted)
    if not stages:
        raise UserError(
            f"{found.checkpoint.path} has no stage: none of its {len(found.checkpoint.tensors):,} "
            f"tensors begins with one of {', '.join(PREFIXES.values())}; give the original "
            "single-file checkpoint"
        )
    others = [stage for stage in known if stage not in stages]
    if wanted is None:
        return Choice(stages, {stage: absent[stage] for stage in others})
    return Choice(stages, dict.fromkeys(others, "not among --stages"))


def _absent(found: Sources) -> dict[str, str]:
    """The stages without weights, and where these could come from."""
    names, file = found.checkpoint.tensors, found.checkpoint.path.name
    none = {
        stage: f"not in {file}"
        for stage, prefix in PREFIXES.items()
        if not any(name.startswith(prefix) for name in names)
    }
    return none if found.text else none | {"text_encoder": "give --text-encoder FOLDER"}


def parts(found: Sources, question: Question, stages: Iterable[str]) -> dict[str, Part]:
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
        layers = _layers(found, stage, tensors)
        graph = graphs.graph(stage, float_type(stage, question, tensors, layers), max(OPSETS))
        late = delay(found.config.vae) if stage == STREAM else 0
        made[stage] = Part(graph, tensors, model.derived(), layers, late)
    return made


def _layers(found: Sources, stage: str, tensors: Mapping[str, TensorInfo]) -> dict[str, Layer]:
    """Those whose weights the stage reads, by the weights' names."""
    known = {path: i for h in found.headers(stage) for path, i in quantization.layers(h).items()}
    named = {f"{path}.weight": layer for path, layer in known.items()}
    return {name: layer for name, layer in named.items() if name in tensors}


@dataclass(slots=True)
class Workshop:
    """The question's graphs, and what was counted of them already."""

    question: Question
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
        if stage == "latent_upsampler" and self.question.first_steps:  # it reads the pass before
            rows, columns = rows // ENLARGES, columns // ENLARGES
        if stage == STREAM:
            frames = (self.question.vae_stream or TIME) // TIME
        branches = self.question.branches
        batch = {"transformer": branches, "text_encoder": min(branches, 2)}
        axes = {
            "batch": batch.get(stage, 1),
            "text": self.question.text_tokens,
            "tokens": (frames + (self.question.conditioning or 0)) * rows * columns,
            "latent_frames": frames,
            "latent_height": rows,
            "latent_width": columns,
        }
        for name, rule in self.parts[stage].derived.items():
            axes[name] = rule.factor * axes[rule.root] + rule.offset
        return axes | {"timesteps": 1} if self.question.conditioning is None else axes


def stage_plan(name: str, workshop: Workshop) -> StagePlan:
    part, costs = workshop.parts[name], workshop.costs(name, workshop.shape.latent)
    form = number(name, workshop.question, part.tensors, part.layers)
    missing = sorted(costs.weights.keys() - part.tensors.keys())
    if missing:
        raise AssertionError(f"{name}: weights of the graph are in no file: {missing[:3]}")
    files = [part.tensors[weight] for weight in costs.weights]
    files += [info for w in costs.weights if w in part.layers for _, info in part.layers[w].parts()]
    sizes = {weight: stored(weight, array, form) for weight, array in costs.weights.items()}
    weights = sum(sizes.values())
    return StagePlan(
        name,
        form,
        sum(array.elements for array in costs.weights.values()),
        sum(info.end - info.begin for info in files),
        EXPORT_BASE + CONVERSION * _is_converted(part, costs, form),
        BUILD_BASE + weights + int(weights * BUILD_FACTOR[_kind(name, form, costs)]),
        weights + KERNEL_BYTES * len(costs.kernels),
        costs,
    )


def stored(weight: str, array: Array, form: Number) -> int:
    """Bytes of a weight in the engine. Tables and vectors keep the graph's type."""
    if weight in form.coded:
        return form.coded[weight].bytes
    small = is_small(weight, array, form)
    return ceil(array.elements * STORED[form.stored]) if small else array.bytes


def is_small(weight: str, array: Array, form: Number) -> bool:
    if form.coded:
        return weight in form.coded
    return form.quantized and len(array.shape) == 2 and bool(QUANTIZED.search(weight))


def _is_converted(part: Part, costs: Costs, form: Number) -> bool:
    """Whether a weight is stored in another type than its file has."""
    for name, array in costs.weights.items():
        if name in form.coded:
            continue
        wanted = form.stored if is_small(name, array, form) else form.base
        if OWN.get(part.tensors[name].dtype) != wanted:
            return True
    return False


def _kind(name: str, form: Number, costs: Costs) -> str:
    if form.quantized:
        return "small"
    if costs.convolutions:
        return "conv"
    return "text" if name == "text_encoder" else "float"
