"""What every graph promises that leaves this package; a broken promise is a bug of ours."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from ltx_engines.stages import Stage
from ltx_export import onnxruntime_graph, quantized_graph
from ltx_export.axes import DERIVED, EXAMPLE, Derived
from ltx_export.element_types import ONNX_TYPES, OWN, element_type

INLINE_LIMIT = 32 * 1024
"""Bytes of a constant inside the graph. The largest is a row of ones as wide as the model (13B:
16 KiB, the affine part that ONNX wants of a LayerNormalization without one)."""

RANK_LIMIT = 8
"""TensorRT's."""

FOREIGN = frozenset(
    {
        (quantized_graph.TENSORRT, "TRT_FP4DynamicQuantize", False),
        (onnxruntime_graph.DOMAIN, "MultiHeadAttention", True),
        (onnxruntime_graph.DOMAIN, "QGemm", True),
    }
)
"""Operators that are not ONNX's: domain, name, and whether they are for graphs that are written out
for ONNX Runtime, or for the others."""

RANDOM = frozenset(
    {"Bernoulli", "Dropout", "Multinomial"}
    | {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def check(model: ir.Model, stage: Stage, precision: str, derived: Mapping[str, Derived]) -> None:
    """
    Raises:
        AssertionError: the first broken promise, naming stage and tensor or node.
    """
    for problem in _problems(model, stage, precision, derived):
        raise AssertionError(f"{stage.name}: {problem}")


def _problems(
    model: ir.Model, stage: Stage, precision: str, derived: Mapping[str, Derived]
) -> Iterator[str]:
    yield from _border_problems(model, stage, precision)
    yield from _node_problems(model)
    yield from _value_problems(model)
    yield from _constant_problems(model, derived)
    if model.functions:
        yield f"functions were not inlined: {len(model.functions)}"


def _border_problems(model: ir.Model, stage: Stage, precision: str) -> Iterator[str]:
    for tensors, values in (
        (stage.inputs, model.graph.inputs),
        (stage.outputs, model.graph.outputs),
    ):
        wanted = [
            (t.name, ONNX_TYPES[element_type(t, precision)], ir.Shape(t.axes)) for t in tensors
        ]
        found = [(value.name, value.dtype, value.shape) for value in values]
        if found != wanted:
            yield f"borders are {found}, the table says {wanted}"


def _node_problems(model: ir.Model) -> Iterator[str]:
    written_out = model.graph.opset_imports.get("", 0) <= quantized_graph.INT4_OPSET
    for node in model.graph:
        if node.op_type in RANDOM:
            yield f"{node.name} draws random numbers; noise is an input"
        foreign = node.domain and (node.domain, node.op_type, written_out) not in FOREIGN
        if foreign or "Sequence" in node.op_type:
            yield f"{node.name} is a {node.domain}:{node.op_type}, which TensorRT does not have"
        if node.metadata_props or node.doc_string:
            yield f"{node.name} carries metadata, which may hold local paths"
        if any(str(attr.value) == str(int(ir.DataType.DOUBLE)) for attr in _casts(node)):
            yield f"{node.name} computes in float64"


def _value_problems(model: ir.Model) -> Iterator[str]:
    for node in model.graph:
        if "Scatter" in node.op_type:
            yield f"{node.name} is a {node.op_type}, for which TensorRT has no fast kernel"
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == OWN:
                yield f"{node.name}: {name} is float64"
        if any(value.dtype == OWN for value in node.outputs):
            yield f"{node.name} computes in float64"
        if (rank := _rank(node)) > RANK_LIMIT:
            yield f"{node.name} has {rank} axes, TensorRT has {RANK_LIMIT}"


def _rank(node: ir.Node) -> int:
    """The axes of a tensor that a node makes, where the node itself says it."""
    if node.op_type == "Transpose":
        return len(node.attributes["perm"].as_ints())
    target = node.inputs[1] if node.op_type == "Reshape" else None
    known = None if target is None else target.const_value
    return 0 if known is None else known.size


def _casts(node: ir.Node) -> list[ir.Attr]:
    return [node.attributes["to"]] if node.op_type == "Cast" else []


def _constant_problems(model: ir.Model, derived: Mapping[str, Derived]) -> Iterator[str]:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            yield f"{name} has no value"
        elif tensor.dtype == ir.DataType.DOUBLE:
            yield f"{name} is float64"
        elif isinstance(tensor, ir.ExternalTensor):
            continue
        elif tensor.nbytes > INLINE_LIMIT:
            yield f"{name} has {tensor.nbytes} bytes inside the graph"
        elif tensor.dtype == ir.DataType.INT64:
            yield from _size_problems(name, tensor.numpy(), derived)


def _size_problems(name: str, numbers: np.ndarray, derived: Mapping[str, Derived]) -> Iterator[str]:
    limits = np.iinfo(np.int32)
    if (numbers > limits.max).any() or (numbers < limits.min).any():
        yield f"{name} holds {numbers.tolist()}, more than 32 bits"
    followers = {DERIVED[axis].example for axis in DERIVED} | {d.example for d in derived.values()}
    for number in map(int, numbers.ravel()):
        for axis, size in EXAMPLE.items():
            if number and number % size == 0:
                yield f"{name} holds {number}: the size of {axis} was baked into the graph"
        if number in followers:
            yield f"{name} holds {number}: the size of an axis was baked into the graph"
