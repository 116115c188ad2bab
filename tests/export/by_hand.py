"""Graphs written down as ONNX text, and two ways to run them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]


def parsed(text: str, opset: int = 23, weights: Sequence[str] = ()) -> ir.Model:
    """The graph, whose `weights` are initializers without values, as a trace leaves them."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    for value in [value for node in model.graph for value in node.inputs]:
        if value is not None and (name := str(value.name)) in weights:
            model.graph.initializers[name] = value
    return model


def fill(model: ir.Model, weights: Mapping[str, Array]) -> ir.Model:
    """Give the initializers that have no value one, in their own element type."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None and value.dtype is not None:
            numbers = weights[name].astype(value.dtype.numpy())
            value.const_value = ir.Tensor(numbers, dtype=value.dtype, name=name)
    return model


def evaluated(model: ir.Model, feeds: Mapping[str, Array]) -> Array:
    """The first output, by ONNX's own definition of the operators."""
    with np.errstate(divide="ignore", invalid="ignore"):  # T5 takes log(0) and does not use it
        (result,) = ReferenceEvaluator(ir.to_proto(model)).run(None, dict(feeds))
    assert isinstance(result, np.ndarray)
    return result


def computed(model: ir.Model, feeds: Mapping[str, Array]) -> Array:
    """The first output, by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, dict(feeds))
    assert isinstance(result, np.ndarray)
    return result


def text_of(model: ir.Model) -> list[tuple[Any, ...]]:
    """Every node, with names and attributes, in the order of the names."""
    rows = []
    for node in model.graph:
        attributes = sorted((name, str(a.value)) for name, a in node.attributes.items())
        inputs = [value and value.name for value in node.inputs]
        outputs = [value.name for value in node.outputs]
        rows.append((str(node.name), node.op_type, inputs, outputs, attributes))
    return sorted(rows, key=lambda row: row[0])
