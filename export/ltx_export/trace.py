"""The reference, run once on tensors without bytes, as an ONNX graph without weights."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from ltx_engines.stages import Stage, Tensor
from ltx_export import passes
from ltx_export.axes import DERIVED, EXAMPLE, Derived
from ltx_export.element_types import ONNX_TYPES, element_type

OPSET = 23
"""The first with Attention and RMSNormalization, which TensorRT runs as one kernel each."""

OWN = "float64"
"""What the stage's own precision is called while it is traced (`element_types.py`)."""


def trace(module: nn.Module, stage: Stage, derived: Mapping[str, Derived] = DERIVED) -> ir.Model:
    """The module as a graph. Its weights are initializers without values, under their own names.

    Inputs and outputs have the names and axes of the stage table. Whatever is of the stage's own
    precision is float64 until `element_types.settle`.

    Raises:
        AssertionError: the traced graph has other borders than the table.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _fill(module)
        examples = tuple(_example(tensor, derived) for tensor in stage.inputs)
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
    set_borders(model, stage)
    return model


def set_borders(model: ir.Model, stage: Stage) -> None:
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
            _set_border(tensor, value, stage.name)


def _set_border(tensor: Tensor, value: ir.Value, stage: str) -> None:
    found = list(value.shape or ())
    wrong = len(found) != len(tensor.axes) or any(
        isinstance(axis, int) != isinstance(size, int) or (isinstance(axis, int) and axis != size)
        for axis, size in zip(tensor.axes, found, strict=True)
    )
    if wrong or value.dtype != ONNX_TYPES[element_type(tensor, OWN)]:
        raise AssertionError(
            f"{stage}: {tensor.name} was traced as {value.dtype} {found}, the table says "
            f"{element_type(tensor, OWN)} {list(tensor.axes)}"
        )
    value.name = tensor.name
    value.shape = ir.Shape(tensor.axes)


def _fill(module: nn.Module) -> None:
    """Give parameters and buffers fake tensors of the own type; shared ones stay shared."""
    fakes: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(weight.shape, dtype=torch.float64), requires_grad=False)
            part.register_parameter(name, fakes.setdefault(id(weight), fake))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=torch.float64))


def _example(tensor: Tensor, derived: Mapping[str, Derived]) -> torch.Tensor:
    sizes = [
        axis
        if isinstance(axis, int)
        else derived[axis].example
        if axis in derived
        else EXAMPLE[axis]
        for axis in tensor.axes
    ]
    return torch.empty(sizes, dtype=getattr(torch, element_type(tensor, OWN)))


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
