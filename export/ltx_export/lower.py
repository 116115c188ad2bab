"""From opset 23 to opset 20, for runtimes whose CPU kernels know neither Attention nor its mask.

Each operator that is newer is written out in older ones, in the form that ONNX Runtime fuses again.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from ltx_export.edits import take_place

OPSET = 20
"""The newest whose operators ONNX Runtime's CPU kernels, and TensorRT before 10.14, all have."""


def lower(model: ir.Model) -> int:
    """Write out what opset 20 does not have; returns how many nodes that were.

    Raises:
        AssertionError: a node is not in the form that our graphs have.
    """
    edits = 0
    for node in list(model.graph):
        write_out = NEWER.get(node.op_type)
        if write_out is None:
            continue
        writer = Writer(model, node)
        result = write_out(writer, node)
        model.graph.insert_before(node, writer.nodes)
        take_place(result, node.outputs[0])
        model.graph.remove(node, safe=True)
        edits += 1
    model.graph.opset_imports[""] = OPSET
    return edits


class Writer:
    """Makes the nodes that stand for one node, named after it."""

    def __init__(self, model: ir.Model, origin: ir.Node) -> None:
        self.model, self.origin, self.nodes = model, origin, list[ir.Node]()

    def __call__(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """The first input's type is the output's, but for a Cast, or if it is given."""
        node = ir.node(op_type, inputs, attributes, domain=domain)
        node.name = f"{self.origin.name}/{op_type}_{len(self.nodes)}"
        value = node.outputs[0]
        first = None if inputs[0] is None else inputs[0].dtype
        dtype = ir.DataType(attributes["to"]) if op_type == "Cast" else dtype or first
        if dtype is None:
            raise AssertionError(f"{node.name}: the element type is not known")
        value.name, value.dtype = f"{node.name}:0", dtype
        self.nodes.append(node)
        return value

    def constant(self, numbers: float | Sequence[int], dtype: ir.DataType) -> ir.Value:
        array = np.array(numbers).astype(dtype.numpy())
        listed = np.atleast_1d(numbers)
        same = f"{listed[0]}_x{len(listed)}" if len(set(listed)) == 1 < len(listed) else ""
        name = f"constant_{dtype.name.lower()}_{same or '_'.join(map(str, listed))}"
        known = self.model.graph.initializers
        if name not in known:
            tensor = ir.Tensor(array, dtype=dtype, name=name)
            known[name] = ir.Value(
                name=name,
                type=ir.TensorType(dtype),
                shape=ir.Shape(array.shape),
                const_value=tensor,
            )
        return known[name]


def _attention(write: Writer, node: ir.Node) -> ir.Value:
    """softmax(scale * Q K^T + mask) V, over inputs of batch, tokens, heads * channels."""
    query, key, value = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if query is None or query.dtype is None or "q_num_heads" not in node.attributes:
        raise AssertionError(f"{node.name} does not split its heads by itself")
    heads = node.attributes["q_num_heads"].as_int()
    split = write.constant([0, 0, heads, -1], ir.DataType.INT64)
    scale = write.constant(node.attributes["scale"].as_float(), query.dtype)
    scaled = write("Mul", [query, scale])
    q, k, v = (
        write("Transpose", [write("Reshape", [part, split])], perm=order)
        for part, order in ((scaled, (0, 2, 1, 3)), (key, (0, 2, 3, 1)), (value, (0, 2, 1, 3)))
    )
    scores = write("MatMul", [q, k])
    if mask is not None:
        scores = write("Add", [scores, mask])
    mixed = write("MatMul", [write("Softmax", [scores], axis=-1), v])
    merged = write("Transpose", [mixed], perm=(0, 2, 1, 3))
    return write("Reshape", [merged, write.constant([0, 0, -1], ir.DataType.INT64)])


def _rms_normalization(write: Writer, node: ir.Node) -> ir.Value:
    """x / sqrt(mean(x^2) + eps) in float32, rounded, times the scale."""
    source, scale = node.inputs
    if source is None or source.dtype is None or node.attributes["axis"].as_int() != -1:
        raise AssertionError(f"{node.name} does not normalise its last axis")
    full, own = ir.DataType.FLOAT, source.dtype
    wide = source if own == full else write("Cast", [source], to=int(full))
    square = write("Pow", [wide, write.constant(2.0, full)])
    mean = write("ReduceMean", [square, write.constant([-1], ir.DataType.INT64)], keepdims=1)
    epsilon = write.constant(node.attributes["epsilon"].as_float(), full)
    root = write("Sqrt", [write("Add", [mean, epsilon])])
    normed = write("Div", [wide, root])
    rounded = normed if own == full else write("Cast", [normed], to=int(own))
    return write("Mul", [rounded, scale])


def _group_normalization(write: Writer, node: ir.Node) -> ir.Value:
    """Each group of channels to mean 0 and deviation 1, then every channel's weight and bias.

    Opset 20's own operator has a weight for each group, not each channel.
    """
    source, weight, bias = node.inputs
    if source is None or source.dtype is None or weight is None or weight.shape is None:
        raise AssertionError(f"{node.name}: the number of channels is not known")
    groups, channels = node.attributes["num_groups"].as_int(), weight.shape.numpy()[0]
    shape = write("Shape", [source], ir.DataType.INT64)
    grouped = write("Reshape", [source, write.constant([0, groups, -1], ir.DataType.INT64)])
    ones, zeros = (write.constant([number] * groups, source.dtype) for number in (1, 0))
    epsilon = node.attributes["epsilon"].as_float()
    normed = write("InstanceNormalization", [grouped, ones, zeros], epsilon=epsilon)
    flat = write("Reshape", [normed, write.constant([0, channels, -1], ir.DataType.INT64)])
    column = write.constant([1], ir.DataType.INT64)
    scaled = write("Mul", [flat, write("Unsqueeze", [weight, column])])
    moved = write("Add", [scaled, write("Unsqueeze", [bias, column])])
    return write("Reshape", [moved, shape])


NEWER: MappingProxyType[str, Callable[[Writer, ir.Node], ir.Value]] = MappingProxyType(
    {
        "Attention": _attention,
        "GroupNormalization": _group_normalization,
        "RMSNormalization": _rms_normalization,
    }
)
