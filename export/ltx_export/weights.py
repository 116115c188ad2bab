"""A graph's weights as byte ranges of the files that they came in; not one byte is copied."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType

import onnx_ir as ir
from torch import nn

from ltx_ref.checkpoint import Header, TensorInfo

TYPES = MappingProxyType(
    {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
)


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a file; `file` is its place relative to the bundle's folder."""

    file: str
    info: TensorInfo


Weights = Mapping[str, Weight]


def weights_of(header: Header, file: str) -> dict[str, Weight]:
    """The tensors of a safetensors file that lies at `file` in the bundle."""
    return {name: Weight(inside(file), info) for name, info in header.tensors.items()}


def inside(file: str) -> str:
    """The same path.

    Raises:
        ValueError: it leads out of the bundle, where no ONNX runtime would follow it.
    """
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or str(path) != file:
        raise ValueError(f"{file!r} is not a path inside the bundle")
    return file


def twins(module: nn.Module) -> dict[str, str]:
    """For each weight with two names in the module, both ways: one name to the other."""
    names: dict[int, list[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    pairs = [pair for pair in names.values() if len(pair) > 1]
    return {a: b for first, second in pairs for a, b in ((first, second), (second, first))}


def bind(model: ir.Model, weights: Weights, wanted: Iterable[str], twin: Mapping[str, str]) -> None:
    """Point every initializer without a value into the file that has a tensor of its name.

    Raises:
        AssertionError: one of the `wanted` weights is not in the graph, or one of the graph's is
            not in a file or has another shape or type there.
    """
    initializers = model.graph.initializers
    for value in list(initializers.values()):
        if value.const_value is not None:
            continue
        if value.name not in weights and (other := twin.get(str(value.name))) in weights:
            value.name = other
        value.const_value = _external(value, weights)
    bound = names(model)
    for name in wanted:
        if name not in bound and twin.get(name) not in bound:
            raise AssertionError(f"{name} is not a weight of the {model.graph.name} graph")


def _external(value: ir.Value, weights: Weights) -> ir.ExternalTensor:
    name = str(value.name)
    if name not in weights:
        raise AssertionError(f"{name} is a weight of the graph and not of the checkpoint")
    weight = weights[name]
    shape = list(value.shape or ())
    if shape != list(weight.info.shape) or value.dtype != TYPES.get(weight.info.dtype):
        raise AssertionError(
            f"{name} was traced as {value.dtype} {shape}, "
            f"{weight.file} has {weight.info.dtype} {list(weight.info.shape)}"
        )
    return ir.ExternalTensor(
        location=inside(weight.file),
        offset=weight.info.begin,
        length=weight.info.end - weight.info.begin,
        dtype=TYPES[weight.info.dtype],
        shape=ir.Shape(weight.info.shape),
        name=name,
    )


def names(model: ir.Model) -> set[str]:
    """The initializers that lie in a file beside the graph."""
    return {
        name
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def files(model: ir.Model) -> tuple[str, ...]:
    """The files that the graph points into."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return tuple(sorted({str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}))
