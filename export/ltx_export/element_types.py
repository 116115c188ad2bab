"""From a traced graph to one precision: float64 gives way to the type that the weights have.

Graphs are traced with float64 wherever the stage's own precision is meant. No model uses that type
for anything else, and no constant is rounded to less than float32, so one trace serves them all.
"""

from types import MappingProxyType

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ltx_engines.bundle import Precision
from ltx_engines.stages import FLOAT, Tensor

OWN = ir.DataType.DOUBLE
"""Stands for the stage's own precision until `settle`."""

ONNX_TYPES = MappingProxyType(
    {
        "float64": OWN,
        "float32": ir.DataType.FLOAT,
        "float16": ir.DataType.FLOAT16,
        "bfloat16": ir.DataType.BFLOAT16,
        "int64": ir.DataType.INT64,
    }
)


def element_type(tensor: Tensor, precision: str) -> str:
    """The concrete type of a tensor in a stage of this precision."""
    return precision if tensor.dtype == FLOAT else tensor.dtype


def settle(model: ir.Model, precision: Precision) -> int:
    """Replace float64 by this type, and remove the casts that thereby lose their meaning."""
    dtype = ONNX_TYPES[precision]
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        _settle_attributes(node, dtype)
        values.extend(node.outputs)
    own = [value for value in values if value.dtype == OWN]
    for value in own:
        value.dtype = dtype
        if value.const_value is not None:
            value.const_value = _rounded(value.const_value, dtype)
    return len(own) + drop_idle_casts(model)


def drop_idle_casts(model: ir.Model) -> int:
    """Remove casts to the type that their input already has; they split fusions."""
    edits = 0
    for node in list(model.graph):
        if node.op_type != "Cast":
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source is None or source.dtype is None or result.is_graph_output():
            continue
        if source.dtype == node.attributes["to"].as_int():
            ir.convenience.replace_all_uses_with(result, source)
            model.graph.remove(node, safe=True)
            edits += 1
    return edits


def _settle_attributes(node: ir.Node, dtype: ir.DataType) -> None:
    for name, attribute in list(node.attributes.items()):
        if name == "to" and attribute.value == OWN:
            node.attributes[name] = ir.AttrInt64("to", dtype)
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == OWN:
            node.attributes[name] = ir.AttrTensor(name, _rounded(attribute.value, dtype))


def _rounded(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """To the nearest number; the lowest number of float64, which the exporter writes as minus
    infinity, means the lowest of the type."""
    numbers = tensor.numpy()
    lowest = float(ml_dtypes.finfo(dtype.numpy()).min)  # type: ignore[no-untyped-call]
    numbers = np.where(numbers <= np.finfo(np.float64).min, lowest, numbers)
    return ir.Tensor(numbers.astype(dtype.numpy()), dtype=dtype, name=tensor.name)
