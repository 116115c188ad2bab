"""Guidance and one step of the sampler as a graph without weights, so that latents stay on the GPU.

    velocity = guidance of the branches' velocities          as StepGuidance.combine in ltx_trt
    next     = a latents + b velocity + c previous + d noise as Step.apply
    clean    = latents - sigma velocity                      as Step.clean

One graph serves every step, sampler and set of branches: what differs is a row of coefficients and
which addresses are bound. A branch that is not run is bound to the text's velocity, and a tensor
that is not used to any finite one. A coefficient of 0 does not silence what is not finite.

TensorRT has no float64. The sums of a clip, of which the host takes care in double precision, are
taken over the channels first and then over the tokens, the deviation around the mean.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ltx_engines import bundle, stages
from ltx_engines.bundle import Bundle, FileEntry, Precision, StageEntry, tensor_entries
from ltx_engines.stages import BRANCHES, COEFFICIENTS, FLOAT, SAMPLER_STEP, Tensor

IR_VERSION = 10
OPSETS = (20, 23)
"""ONNX Runtime's and TensorRT's; they differ in number only for what is used here."""

TYPES: dict[Precision, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}

TOKENS, CHANNELS = 1, 2
"""Axes."""

NOT_ZERO = 1e-30
"""Keeps 0 / 0 out of CFG-star. The original adds 1e-8 to a sum, this is added to a mean: float32
has no digit for either, unless a whole clip's velocity is below 1e-4."""


def add(opened: Bundle) -> Bundle:
    """The bundle with the stage `sampler_step` beside its transformer; the same one if it has it.

    The graph's file has its hash in its name, so that none is replaced that a manifest names.
    """
    described, graph = stage(opened.stage("transformer"))
    old = opened.manifest.stages.get(SAMPLER_STEP)
    if old == described:
        return opened
    _write(opened.path / described.file, graph)
    files = {n: file for n, file in opened.manifest.files.items() if not old or n != old.file}
    files[described.file] = FileEntry(bytes=len(graph), sha256=hashlib.sha256(graph).hexdigest())
    changes = {"files": files, "stages": opened.manifest.stages | {SAMPLER_STEP: described}}
    manifest = opened.manifest.model_copy(update=changes)
    bundle.update(opened.path, manifest)
    if old is not None:
        (opened.path / old.file).unlink(missing_ok=True)
    return Bundle(opened.path, manifest)


def _write(path: Path, graph: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_bytes(graph)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stage(transformer: StageEntry) -> tuple[StageEntry, bytes]:
    """What goes with a transformer: its manifest entry and the graph, of the same opset and type.

    Raises:
        ValueError: latents and velocities of this transformer differ in channels or type.
    """
    (velocity,) = transformer.outputs
    (latents,) = (tensor for tensor in transformer.inputs if tensor.name == "latents")
    if (latents.axes, latents.dtype) != (velocity.axes, velocity.dtype):
        raise ValueError(f"velocity is {velocity}, latents are {latents}")
    channels = velocity.axes[-1]
    precision = next((known for known in TYPES if known == velocity.dtype), None)
    if not isinstance(channels, int) or precision is None:
        raise ValueError(f"no sampler step for velocities that are {velocity}")
    opset = transformer.opset or OPSETS[-1]
    graph: bytes = model(channels, precision, opset).SerializeToString(deterministic=True)
    return entry(channels, precision, graph, opset), graph


def entry(channels: int, precision: Precision, graph: bytes, opset: int) -> StageEntry:
    table, digest = stages.sampler_step(channels), hashlib.sha256(graph).hexdigest()
    return StageEntry(
        file=f"{SAMPLER_STEP}.{digest[:8]}.onnx",
        inputs=tensor_entries(table.inputs, precision),
        outputs=tensor_entries(table.outputs, precision),
        opset=opset,
    )


def model(channels: int, precision: Precision, opset: int) -> onnx.ModelProto:
    """`precision` is the element type of velocities and of `batch`; inside, all is float32."""
    table, graph = stages.sampler_step(channels), _Graph(TYPES[precision])
    coefficients = graph.coefficients()
    latents, previous, noise = map(graph.value, ("latents", "previous", "noise"))

    velocity = _guide(graph, coefficients)
    c = coefficients
    moved = c["latents"] * latents + c["velocity"] * velocity
    moved = moved + c["previous"] * previous + c["noise"] * noise
    graph.output("next_latents", "Identity", moved)
    graph.output("clean", "Identity", latents - c["sigma"] * velocity)
    rows = graph.node("Expand", moved, graph.shape(len(BRANCHES), 1, 1))
    graph.output("batch", "Cast", rows, to=TYPES[precision])

    made = helper.make_graph(
        graph.nodes,
        SAMPLER_STEP,
        [_border(tensor, precision) for tensor in table.inputs],
        [_border(tensor, precision) for tensor in table.outputs],
        graph.constants,
    )
    opsets = [helper.make_opsetid("", opset)]
    whole = helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(whole, full_check=True)
    return whole


def _guide(graph: "_Graph", c: dict[str, "_Value"]) -> "_Value":
    """Where nothing is to be guided, this is the text's velocity, bit for bit."""
    uncond, text, perturbed = map(graph.widened, BRANCHES)
    uncond = graph.chosen(c["cfg_star_rescale"], _projection(graph, text, uncond)) * uncond
    guided = uncond + c["guidance_scale"] * (text - uncond)
    guided = guided + c["stg_scale"] * (text - perturbed)
    scale, one = c["rescaling_scale"], graph.number(1)
    factor = graph.node("Sqrt", _variance(graph, text) / _variance(graph, guided))
    return guided * graph.chosen(scale, scale * factor + (one - scale))


def _projection(graph: "_Graph", text: "_Value", uncond: "_Value") -> "_Value":
    """text . uncond / uncond . uncond, as its difference from 1: the two are much alike, and
    guidance multiplies this number's error. Means stand for sums, whose ratio is the same; a sum's
    number of elements would come from the host."""
    more = graph.mean((text - uncond) * uncond)
    return graph.number(1) + more / (graph.mean(uncond * uncond) + graph.number(NOT_ZERO))


def _variance(graph: "_Graph", value: "_Value") -> "_Value":
    """But for a factor that depends on the number of elements alone."""
    away = value - graph.mean(value)
    return graph.mean(away * away)


def _border(tensor: Tensor, precision: Precision) -> onnx.ValueInfoProto:
    dtype = TYPES[precision if tensor.dtype == FLOAT else "float32"]
    return helper.make_tensor_value_info(tensor.name, dtype, tensor.axes)


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor of the graph that is being written, with the arithmetic of numbers."""

    graph: "_Graph"
    name: str

    def __add__(self, other: "_Value") -> "_Value":
        return self.graph.node("Add", self, other)

    def __sub__(self, other: "_Value") -> "_Value":
        return self.graph.node("Sub", self, other)

    def __mul__(self, other: "_Value") -> "_Value":
        return self.graph.node("Mul", self, other)

    def __truediv__(self, other: "_Value") -> "_Value":
        return self.graph.node("Div", self, other)


@dataclass(slots=True)
class _Graph:
    """Nodes in order of use. `narrow` is the type of velocities."""

    narrow: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def value(self, name: str) -> _Value:
        return _Value(self, name)

    def node(self, operator: str, *inputs: _Value, **attributes: Any) -> _Value:
        return self.output(f"{operator}_{len(self.nodes)}", operator, *inputs, **attributes)

    def output(self, name: str, operator: str, *inputs: _Value, **attributes: Any) -> _Value:
        names = [value.name for value in inputs]
        self.nodes.append(helper.make_node(operator, names, [name], f"/{name}", **attributes))
        return _Value(self, name)

    def constant(self, array: Any, name: str) -> _Value:
        if name not in [known.name for known in self.constants]:
            self.constants.append(numpy_helper.from_array(array, name))
        return _Value(self, name)

    def number(self, number: float) -> _Value:
        return self.constant(np.array([number], np.float32), f"number_{number:g}")

    def shape(self, *sizes: int) -> _Value:
        return self.constant(np.array(sizes, np.int64), f"sizes_{'_'.join(map(str, sizes))}")

    def coefficients(self) -> dict[str, _Value]:
        """By name, each [1]."""
        names = [f"coefficient_{name}" for name in COEFFICIENTS]
        ones = self.shape(*[1] * len(names))
        inputs = ["coefficients", ones.name]
        self.nodes.append(helper.make_node("Split", inputs, names, "/coefficients", axis=0))
        return {c: self.value(name) for c, name in zip(COEFFICIENTS, names, strict=True)}

    def widened(self, name: str) -> _Value:
        value = self.value(name)
        wide = self.narrow == TensorProto.FLOAT
        return value if wide else self.node("Cast", value, to=TensorProto.FLOAT)

    def chosen(self, switch: _Value, value: _Value) -> _Value:
        """1 where the switch is 0, whatever the value."""
        on = self.node("Greater", switch, self.number(0))
        return self.node("Where", on, value, self.number(1))

    def mean(self, value: _Value) -> _Value:
        """[1, tokens, C] -> [1, 1, 1]: over the channels, over the tokens, and what that lost."""
        rows = self._mean(value, CHANNELS)
        first = self._mean(rows, TOKENS)
        return first + self._mean(rows - first, TOKENS)

    def _mean(self, value: _Value, axis: int) -> _Value:
        return self.node("ReduceMean", value, self.shape(axis), keepdims=1)
