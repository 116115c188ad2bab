"""A graph's weights as byte ranges of the files that they came in; not one byte is copied."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from ltx_engines.bundle import Precision
from ltx_export.element_types import ONNX_TYPES
from ltx_ref.checkpoint import Header, TensorInfo

TYPES = MappingProxyType(
    {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
)
PLAIN = MappingProxyType({"F8_E4M3": ir.DataType.FLOAT8E4M3FN})
"""8-bit types whose numbers are the weights' values; the graph widens them where they are used."""

ONE = "one"
"""The scale of weights that have none."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a file; `file` is its key in the manifest: a path inside the bundle, or an
    absolute one of a file that stays where it is."""

    file: str
    info: TensorInfo


Weights = Mapping[str, Weight]


def weights_of(header: Header, file: str) -> dict[str, Weight]:
    """The tensors of a safetensors file that has this key."""
    return {name: Weight(file, info) for name, info in header.tensors.items()}


def location(file: str) -> str:
    """Where a graph says that the file is: inside the bundle, or in a folder that a session knows.

    Raises:
        ValueError: a relative path leads out of the bundle, where no ONNX runtime would follow it.
    """
    path = PurePosixPath(file)
    if ".." in path.parts or str(path) != file:
        raise ValueError(f"{file!r} is not a path inside the bundle")
    return path.name if path.is_absolute() else file


def bind(model: ir.Model, weights: Weights, precision: Precision) -> tuple[str, ...]:
    """Point every initializer without a value into the file that has a tensor of its name.

    Returns the files that are needed.

    Raises:
        AssertionError: one of the graph's weights is not in a file, or has another shape or type.
    """
    files = set()
    for value in list(model.graph.initializers.values()):
        if value.const_value is not None:
            continue
        name = str(value.name)
        if name not in weights:
            raise AssertionError(f"{name} is a weight of the graph and not of the checkpoint")
        weight = weights[name]
        if weight.info.dtype in PLAIN:
            _widen(model, value, precision, PLAIN[weight.info.dtype])
        value.const_value = _external(value, weight)
        files.add(weight.file)
    return tuple(sorted(files))


def _external(value: ir.Value, weight: Weight) -> ir.ExternalTensor:
    shape, dtype = list(value.shape or ()), (TYPES | PLAIN).get(weight.info.dtype)
    if shape != list(weight.info.shape) or value.dtype != dtype or dtype is None:
        raise AssertionError(
            f"{value.name} was traced as {value.dtype} {shape}, "
            f"{weight.file} has {weight.info.dtype} {list(weight.info.shape)}"
        )
    return ir.ExternalTensor(
        location=location(weight.file),
        offset=weight.info.begin,
        length=weight.info.end - weight.info.begin,
        dtype=dtype,
        shape=ir.Shape(weight.info.shape),
        name=str(value.name),
    )


def _widen(model: ir.Model, value: ir.Value, precision: Precision, stored: ir.DataType) -> None:
    """Dequantize an 8-bit weight, in the graph, to the type of the stage."""
    node = ir.node("DequantizeLinear", [value, _one(model, precision)])
    node.name = f"{str(value.name).rpartition('.')[0]}/DequantizeLinear"
    wide = node.outputs[0]
    wide.name, wide.type, wide.shape = f"{node.name}:0", value.type, value.shape
    for use in tuple(value.uses()):
        if use.node is not node:
            use.node.replace_input_with(use.idx, wide)
    value.type = ir.TensorType(stored)  # a new one: stamped weights share theirs
    model.graph.insert_before(model.graph[0], node)


def _one(model: ir.Model, precision: Precision) -> ir.Value:
    known = model.graph.initializers
    if ONE not in known:
        dtype = ONNX_TYPES[precision]
        tensor = ir.Tensor(np.ones((), dtype.numpy()), dtype=dtype, name=ONE)
        known[ONE] = ir.Value(
            name=ONE, type=ir.TensorType(dtype), shape=ir.Shape([]), const_value=tensor
        )
    return known[ONE]


def names(model: ir.Model) -> set[str]:
    """The initializers that lie in a file beside the graph."""
    return {
        name
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def missing(wanted: Iterable[str], model: ir.Model) -> list[str]:
    """The names that the graph should have as weights and has not."""
    return sorted(set(wanted) - names(model))
