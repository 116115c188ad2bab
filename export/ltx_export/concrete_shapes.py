"""The type and the shape of every tensor of a graph, inferred from numbers and never from symbols.

Node by node: what computes a shape (`Shape`, `Slice`, `Concat`, arithmetic) is a small tensor whose
values are known, so it is evaluated; the rest goes through ONNX's own inference, which is given
those values. Weights need a type and a shape, and not one byte.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs, shape_inference
from onnx.reference import ReferenceEvaluator

KNOWN_LIMIT = 4096
"""Elements of a tensor whose values are worth knowing: shapes and indices, not tables."""

VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
REFUSALS = (defs.SchemaError, shape_inference.InferenceError, onnx.checker.ValidationError)
"""How ONNX says that a node breaks its operator's rules."""

LIKE_INPUT = frozenset({"GroupNormalization"})
"""Operators without a shape inference in ONNX, whose output is as their first input."""

Axes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Array:
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return -(-self.elements * self.dtype.bitwidth // 8)


@dataclass(slots=True)
class Walk:
    """A graph with numbers; it grows node by node.

    `known` are values of small tensors, `weights` what a tensor is computed from when that is
    weights alone, `whole` the tensor of which one is another view.
    """

    graph: ir.Graph
    opsets: Mapping[str, int]
    arrays: dict[ir.Value, Array] = field(default_factory=dict)
    known: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    weights: dict[ir.Value, tuple[str, ...]] = field(default_factory=dict)
    whole: dict[ir.Value, ir.Value] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)
    """Those that do something with activations, in the graph's order."""

    def root(self, value: ir.Value) -> ir.Value:
        return self.whole.get(value, value)

    def is_activation(self, value: ir.Value | None) -> bool:
        return value is not None and value not in self.known and value not in self.weights

    def reads(self, node: ir.Node) -> Iterator[ir.Value]:
        """The activations that it reads, views replaced by what they are views of."""
        roots = (self.root(v) for v in node.inputs if v is not None and self.is_activation(v))
        yield from dict.fromkeys(roots)


def walk(model: ir.Model, axes: Axes) -> Walk:
    """
    Raises:
        ValueError: an input's axis has no size in `axes`.
        AssertionError: a node's shape does not follow from its inputs', or breaks them.
    """
    if model.functions:
        raise AssertionError(f"functions were not inlined: {len(model.functions)}")
    found = Walk(model.graph, model.opset_imports)
    for value in model.graph.inputs:
        found.arrays[value] = _input(value, axes)
    for value in model.graph.initializers.values():
        _add_initializer(found, value)
    for node in model.graph:
        _step(found, node)
    for value in model.graph.outputs:
        _check_output(value, found.arrays[value], axes)
    return found


def _input(value: ir.Value, axes: Axes) -> Array:
    if value.dtype is None or value.shape is None:
        raise AssertionError(f"input {value.name} has no element type or no shape")
    return Array(value.dtype, tuple(_size(axis, value, axes) for axis in value.shape))


def _size(axis: int | ir.SymbolicDim, value: ir.Value, axes: Axes) -> int:
    if isinstance(axis, int):
        return axis
    if axis.value is None or axis.value not in axes:
        raise ValueError(f"{value.name}: axis {axis.value} has no size among {sorted(axes)}")
    return axes[axis.value]


def _add_initializer(walk: Walk, value: ir.Value) -> None:
    tensor = value.const_value
    dtype, shape = (value.dtype, value.shape) if tensor is None else (tensor.dtype, tensor.shape)
    sizes = tuple(size for size in shape or () if isinstance(size, int))
    if dtype is None or shape is None or len(sizes) != len(shape):
        raise AssertionError(f"initializer {value.name} has no element type or no fixed shape")
    walk.arrays[value] = array = Array(dtype, sizes)
    # Weights lie in other files, which are not opened here.
    inside = tensor is not None and not isinstance(tensor, ir.ExternalTensor)
    if tensor is not None and inside and array.elements <= KNOWN_LIMIT:
        walk.known[value] = tensor.numpy()
    else:
        walk.weights[value] = (name_of(value),)


def _check_output(value: ir.Value, array: Array, axes: Axes) -> None:
    """What is inferred must be what the graph promises, as far as it promises sizes."""
    if value.shape is None:
        return
    promised = [a if isinstance(a, int) else axes.get(a.value or "") for a in value.shape]
    pairs = zip(promised, array.shape, strict=False)
    if len(promised) != len(array.shape) or any(p not in (None, size) for p, size in pairs):
        raise AssertionError(
            f"output {value.name} comes out as {list(array.shape)}, the graph says {value.shape}"
        )


def _step(walk: Walk, node: ir.Node) -> None:
    """Give the outputs of one node their types, shapes and, where they are known, values."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _own(node)):
        raise AssertionError(f"{where(node)}: what it costs depends on values")
    inputs = [value for value in node.inputs if value is not None]
    values = _evaluate(walk, node, inputs)
    arrays = _infer_node(walk, node, inputs) if values is None else map(_array, values)
    for index, (output, array) in enumerate(zip(node.outputs, arrays, strict=True)):
        walk.arrays[output] = array
        if values is not None and array.elements <= KNOWN_LIMIT:
            walk.known[output] = values[index]
    if values is not None:
        return
    if not any(walk.is_activation(value) for value in inputs):
        names = (name for value in inputs for name in walk.weights.get(value, ()))
        walk.weights |= dict.fromkeys(node.outputs, tuple(dict.fromkeys(names)))
    elif node.op_type in VIEWS:
        walk.whole[node.outputs[0]] = walk.root(inputs[0])
    else:
        walk.nodes.append(node)


def _own(node: ir.Node) -> Iterator[ir.Attr]:
    yield from (a for a in node.attributes.values() if isinstance(a, ir.Attr))


def _array(value: np.ndarray) -> Array:
    return Array(ir.DataType.from_numpy(value.dtype), value.shape)


def _evaluate(walk: Walk, node: ir.Node, inputs: Sequence[ir.Value]) -> Sequence[np.ndarray] | None:
    """The node's results, when they follow from known values alone and are small."""
    if node.op_type == "Shape":
        start = node.attributes.get_int("start", 0)
        shape = walk.arrays[inputs[0]].shape[start : node.attributes.get_int("end")]
        return [np.asarray(shape, dtype=np.int64)]
    if node.op_type == "Size":
        return [np.asarray(walk.arrays[inputs[0]].elements)]
    if not all(value in walk.known for value in inputs):
        return None
    if any(array.elements > KNOWN_LIMIT for array in _infer_node(walk, node, inputs)):
        return None
    opsets = dict(walk.opsets)
    feeds = {name_of(value): walk.known[value] for value in inputs}
    with np.errstate(all="ignore"):  # infinities of tables that Where throws away
        results = ReferenceEvaluator(ir.to_proto(node), opsets=opsets).run(None, feeds)
    return [np.asarray(result) for result in results]


def _infer_node(walk: Walk, node: ir.Node, inputs: Sequence[ir.Value]) -> list[Array]:
    if node.domain == "" and node.op_type in LIKE_INPUT:
        return [walk.arrays[inputs[0]]]
    opset = walk.opsets.get(node.domain, 0)
    data = {
        name_of(v): onnx.numpy_helper.from_array(walk.known[v]) for v in inputs if v in walk.known
    }
    try:
        found = shape_inference.infer_node_outputs(
            defs.get_schema(node.op_type, opset, node.domain),
            ir.to_proto(node),
            {name_of(value): _type(walk.arrays[value]) for value in inputs},
            data,
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in walk.opsets.items()],
        )
    except REFUSALS as error:
        raise AssertionError(f"{where(node)}: {' '.join(str(error).split())}") from None
    return [_concrete(node, value, found) for value in node.outputs]


def _type(array: Array) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(int(array.dtype), array.shape)


def _concrete(node: ir.Node, value: ir.Value, found: Mapping[str, onnx.TypeProto]) -> Array:
    tensor = found[name_of(value)].tensor_type if name_of(value) in found else None
    if tensor is None or not tensor.HasField("shape") or not tensor.elem_type:
        raise AssertionError(f"{where(node)}: nothing is known of its output {value.name}")
    if not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        raise AssertionError(
            f"{where(node)}: the shape of its output {value.name} is not known: "
            f"{[dim.dim_value if dim.HasField('dim_value') else None for dim in tensor.shape.dim]}"
        )
    sizes = tuple(dim.dim_value for dim in tensor.shape.dim)
    return Array(ir.DataType(tensor.elem_type), sizes)


def where(node: ir.Node) -> str:
    return f"node {node.name or '(without a name)'} ({node.op_type})"


def name_of(value: ir.Value) -> str:
    if value.name is None:
        raise AssertionError(f"{value} has no name")
    return value.name
