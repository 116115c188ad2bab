"""The reference, run once on tensors without bytes, as an ONNX graph without weights.

Every named axis of the stage table stays an axis: it is traced at a large prime, so that a size
which was baked into the graph is a number that nothing else in a model explains
(`invariants.py` looks for it).
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from ltx_engines.stages import FLOAT, Stage, Tensor
from ltx_export import passes

OPSET = 20
"""ONNX Runtime's CPU kernels and TensorRT 10 and 11 all run it."""

EXAMPLE = MappingProxyType(
    {
        "batch": 1009,
        "tokens": 10007,
        "text": 1013,
        "latent_frames": 1019,
        "latent_height": 1021,
        "latent_width": 1031,
    }
)
"""The axes that are free, and the size at which each is traced: primes, above any model's widths'
odd factors."""


@dataclass(frozen=True, slots=True)
class Derived:
    """An axis that follows another one: factor * root + offset."""

    root: str
    factor: int = 1
    offset: int = 0

    @property
    def example(self) -> int:
        return self.factor * EXAMPLE[self.root] + self.offset


DERIVED: Mapping[str, Derived] = MappingProxyType(
    {
        # At run time this axis is 1 or `tokens`. The model never reshapes it, so a graph traced
        # with one timestep for each token also broadcasts a single one.
        "timesteps": Derived("tokens"),
        "frames": Derived("latent_frames", 8, -7),
        "height": Derived("latent_height", 32),
        "width": Derived("latent_width", 32),
    }
)


def noise_axes(scales: Mapping[int, int]) -> dict[str, Derived]:
    """The axes of a noise input, `scales[block]` times the latent grid's."""
    return {
        f"{side}_{block}": Derived(f"latent_{side}", scale)
        for block, scale in scales.items()
        for side in ("height", "width")
    }


def trace(
    module: nn.Module, stage: Stage, precision: str, derived: Mapping[str, Derived] = DERIVED
) -> ir.Model:
    """The module as a graph. Its weights are initializers without values, under their own names.

    Inputs and outputs have the names, axes and element types of the stage table.

    Raises:
        AssertionError: the traced graph has other borders than the table.
    """
    dtype = getattr(torch, precision)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _fill(module, dtype)
        examples = tuple(_example(tensor, precision, derived) for tensor in stage.inputs)
    weights = set(module.state_dict())
    with _quiet():
        program = torch.export.export(
            module, examples, dynamic_shapes=_dynamic_shapes(module, stage, derived), strict=False
        )
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
        )
    if exported is None:
        raise AssertionError("torch.onnx.export(dynamo=True) returned nothing")
    model = exported.model
    for name in weights & set(model.graph.initializers):
        model.graph.initializers[name].const_value = None
    passes.run(model, passes.ALL)
    set_borders(model, stage, precision)
    return model


def set_borders(model: ir.Model, stage: Stage, precision: str) -> None:
    """Name the graph, its inputs, outputs and their axes as in the table.

    Raises:
        AssertionError: a number of tensors, a rank, a fixed size or an element type differs.
    """
    model.graph.name = stage.name
    for tensors, values in (
        (stage.inputs, model.graph.inputs),
        (stage.outputs, model.graph.outputs),
    ):
        if len(tensors) != len(values):
            raise AssertionError(f"{stage.name}: {len(values)} tensors traced, not {len(tensors)}")
        for tensor, value in zip(tensors, values, strict=True):
            _set_border(tensor, value, precision, stage.name)


def element_type(tensor: Tensor, precision: str) -> str:
    """The concrete type of a tensor in a stage of this precision."""
    return precision if tensor.dtype == FLOAT else tensor.dtype


ONNX_TYPES = MappingProxyType(
    {
        "float32": ir.DataType.FLOAT,
        "float16": ir.DataType.FLOAT16,
        "bfloat16": ir.DataType.BFLOAT16,
        "int64": ir.DataType.INT64,
    }
)


def _set_border(tensor: Tensor, value: ir.Value, precision: str, stage: str) -> None:
    found = list(value.shape or ())
    wrong = len(found) != len(tensor.axes) or any(
        isinstance(axis, int) != isinstance(size, int) or (isinstance(axis, int) and axis != size)
        for axis, size in zip(tensor.axes, found, strict=True)
    )
    if wrong or value.dtype != ONNX_TYPES[element_type(tensor, precision)]:
        raise AssertionError(
            f"{stage}: {tensor.name} was traced as {value.dtype} {found}, the table says "
            f"{element_type(tensor, precision)} {list(tensor.axes)}"
        )
    value.name = tensor.name
    value.shape = ir.Shape(tensor.axes)


def _fill(module: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters and buffers fake tensors of the stage's type; shared ones stay shared."""
    fakes: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(weight.shape, dtype=dtype), requires_grad=False)
            part.register_parameter(name, fakes.setdefault(id(weight), fake))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=dtype))


def _example(tensor: Tensor, precision: str, derived: Mapping[str, Derived]) -> torch.Tensor:
    sizes = [
        axis
        if isinstance(axis, int)
        else derived[axis].example
        if axis in derived
        else EXAMPLE[axis]
        for axis in tensor.axes
    ]
    return torch.empty(sizes, dtype=getattr(torch, element_type(tensor, precision)))


def _dynamic_shapes(module: nn.Module, stage: Stage, derived: Mapping[str, Derived]) -> Any:
    """As `torch.export` wants it: one tuple, or two where the module takes `*rest`."""
    dims: dict[str, Any] = {axis: torch.export.Dim(axis, min=1) for axis in EXAMPLE}
    for axis, rule in derived.items():
        scaled = dims[rule.root] * rule.factor if rule.factor != 1 else dims[rule.root]
        dims[axis] = scaled + rule.offset if rule.offset else scaled
    shapes = tuple(
        {index: dims[axis] for index, axis in enumerate(tensor.axes) if isinstance(axis, str)}
        for tensor in stage.inputs
    )
    named = module.forward.__code__.co_argcount - 1
    return shapes if named == len(shapes) else (*shapes[:named], shapes[named:])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks about its own deprecations and about torchvision."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
