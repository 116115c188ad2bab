"""A graph's weights as byte ranges of the files that they came in; not one byte is copied."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType

import onnx_ir as ir

from ltx_ref.checkpoint import Header, TensorInfo

STORED: Mapping[str, tuple[ir.DataType, ...]] = MappingProxyType(
    {
        "F32": (ir.DataType.FLOAT,),
        "F16": (ir.DataType.FLOAT16,),
        "BF16": (ir.DataType.BFLOAT16,),
        "F8_E4M3": (ir.DataType.FLOAT8E4M3FN,),
        "I8": (ir.DataType.INT8,),
        "U8": (ir.DataType.INT4, ir.DataType.FLOAT4E2M1),
    }
)
"""What the bytes of a safetensors file may be in a graph; a U8 is two numbers of four bits."""

PLAIN = frozenset({"F8_E4M3"})
"""8-bit types whose numbers are the weights' values; the graph widens them where they are used."""


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


def bind(model: ir.Model, weights: Weights) -> tuple[str, ...]:
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
        value.const_value = _external(value, weight)
        files.add(weight.file)
    return tuple(sorted(files))


def _external(value: ir.Value, weight: Weight) -> ir.ExternalTensor:
    shape, dtype, info = list(value.shape or ()), value.dtype, weight.info
    if dtype is None or dtype not in STORED.get(info.dtype, ()) or shape != _numbers(info):
        raise AssertionError(
            f"{value.name} was traced as {dtype} {shape}, "
            f"{weight.file} has {info.dtype} {list(info.shape)}"
        )
    return ir.ExternalTensor(
        location=location(weight.file),
        offset=info.begin,
        length=info.end - info.begin,
        dtype=dtype,
        shape=ir.Shape(shape),
        name=str(value.name),
    )


def _numbers(info: TensorInfo) -> list[int]:
    """The shape in numbers: of four bits, two are in a byte."""
    shape = list(info.shape)
    return [*shape[:-1], 2 * shape[-1]] if info.dtype == "U8" and shape else shape


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
