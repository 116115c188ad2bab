"""Edits to a traced graph: fewer nodes, honest names, nothing about the machine that made it.

The graph's weights have no values here, so no edit can fold, merge or rename one.
"""

import ast
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as library
from onnxscript import optimizer
from onnxscript.rewriter import pattern, rewrite
from onnxscript.rewriter.rules import common as rules

Pass = Callable[[ir.Model], int]

log = logging.getLogger(__name__)

RULES: tuple[pattern.RewriteRule, ...] = (
    rules.add_0_rule,
    rules.cast_cast_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.div_by_1_rule,
    rules.materialize_reshape_shape_rule,
    rules.mul_by_1_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.sub_0_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
)
"""onnxscript's simplifications that can apply here. Left out on purpose: slice_split_rule indexes
the whole graph for each node (2B: 76 s of 90, and it finds nothing), batch norm folds weights."""

FOLD_LIMIT = 4096
"""Elements of a constant that folding may write into the graph: rotary frequencies, not tables."""


def run(model: ir.Model, passes: Sequence[Pass]) -> None:
    """Apply the passes in order. Each must leave the borders of the graph as they were.

    Raises:
        AssertionError: a pass broke that promise.
    """
    borders = _borders(model)
    for edit in passes:
        count = edit(model)
        log.info("%s: %d edits", edit.__name__, count)
        if _borders(model) != borders:
            raise AssertionError(f"{edit.__name__} changed the graph's inputs or outputs")


def _borders(model: ir.Model) -> list[tuple[str | None, ir.DataType | None]]:
    return [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)]


def fold_constants(model: ir.Model) -> int:
    """Compute what does not depend on an input or a weight."""
    before = len(model.graph)
    optimizer.fold_constants_ir(model, onnx_shape_inference=True, output_size_limit=FOLD_LIMIT)
    return before - len(model.graph)


def simplify(model: ir.Model) -> int:
    before = len(model.graph)
    rewrite(model, RULES)
    return before - len(model.graph)


def straighten_transposes(model: ir.Model) -> int:
    """Swap the last two axes in one node where the exporter flattens, swaps and unfolds.

    That is how it writes the keys' transpose in attention, with three slices of a shape each:
    Reshape(Transpose(Reshape(x, [-1, L, D]), 0 2 1), [B, H, D, L]).
    """
    edits = 0
    for swap in list(model.graph):
        if swap.op_type != "Transpose" or list(swap.attributes["perm"].as_ints()) != [0, 2, 1]:
            continue
        flatten, uses = _maker(swap.inputs[0]), swap.outputs[0].uses()
        unfold = next(iter(uses)).node if len(uses) == 1 else None
        if flatten is None or unfold is None or {flatten.op_type, unfold.op_type} != {"Reshape"}:
            continue
        source = flatten.inputs[0]
        if source is None or source.shape is None or len(source.shape) != 4:
            continue
        if _sliced_by(flatten) != [source] * 2 or _sliced_by(unfold) != [source] * 3:
            continue
        swap.replace_input_with(0, source)
        swap.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 3, 2])
        swap.outputs[0].shape = unfold.outputs[0].shape
        ir.convenience.replace_all_uses_with(unfold.outputs[0], swap.outputs[0])
        edits += 1
    return edits


def _maker(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _sliced_by(reshape: ir.Node) -> list[ir.Value | None]:
    """The tensors of whose shapes a Reshape's new shape is put together."""
    concat = _maker(reshape.inputs[1])
    parts = () if concat is None or concat.op_type != "Concat" else concat.inputs
    slices = [node for part in parts if (node := _maker(part)) and node.op_type == "Slice"]
    shapes = [node for s in slices if (node := _maker(s.inputs[0])) and node.op_type == "Shape"]
    return [shape.inputs[0] for shape in shapes]


def remove_unused(model: ir.Model) -> int:
    before = len(model.graph)
    library.RemoveUnusedNodesPass()(model)
    return before - len(model.graph)


def lift_constants(model: ir.Model) -> int:
    """Make initializers of Constant nodes, each value once."""
    before = len(model.graph)
    library.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    kept: dict[tuple[object, ...], ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        if (tensor := value.const_value) is None:
            continue
        same = kept.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if same is not value and value.name is not None:
            ir.convenience.replace_all_uses_with(value, same)
            model.graph.initializers.pop(value.name)
    return before - len(model.graph)


def merge_equal_nodes(model: ir.Model) -> int:
    before = len(model.graph)
    library.CommonSubexpressionEliminationPass()(model)
    return before - len(model.graph)


def shorten_slices(model: ir.Model) -> int:
    """Write "from the start" and "to the end" in 32 bits: TensorRT warns of larger numbers."""
    limits = np.iinfo(np.int32)
    edits = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.INT64:
            continue
        numbers = tensor.numpy()
        short = np.clip(numbers, limits.min, limits.max)
        bounds = all(use.node.op_type == "Slice" and use.idx in (1, 2) for use in value.uses())
        if bounds and (short != numbers).any():
            value.const_value = ir.tensor(short, name=value.name)
            edits += 1
    return edits


def name_nodes(model: ir.Model) -> int:
    """Name each node after the module it was traced in: `vae.decoder.conv_in.conv/Conv`."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module = scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""
        name = f"{module}/{node.op_type}".removeprefix("/")
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
    return len(model.graph)


def name_constants(model: ir.Model) -> int:
    """Number the small constants; a module's name in front of one would look like a weight."""
    constants = [value for value in model.graph.initializers.values() if value.const_value]
    for index, value in enumerate(constants):
        value.name = f"constant_{index}"
    return len(constants)


def forget_inner_shapes(model: ir.Model) -> int:
    """Inside the graph, shapes were found for as many timesteps as tokens; one is allowed too."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    inner = [value for node in model.graph for value in node.outputs if value not in kept]
    known = [value for value in inner if value.shape is not None or value.type is not None]
    for value in known:
        value.shape = value.type = None
    return len(known)


def strip_metadata(model: ir.Model) -> int:
    """Remove stack traces (most of a traced file, with its maker's paths) and doc strings."""
    graph = model.graph
    values = (*graph.inputs, *graph.outputs, *graph.initializers.values())
    outputs = (value for node in graph for value in node.outputs)
    carriers: list[ir.Model | ir.Graph | ir.Node | ir.Value] = [
        model,
        graph,
        *graph,
        *values,
        *outputs,
    ]
    edits = 0
    for carrier in carriers:
        edits += bool(carrier.metadata_props or carrier.doc_string)
        carrier.metadata_props.clear()
        carrier.doc_string = None
    return edits


ALL: tuple[Pass, ...] = (
    fold_constants,
    simplify,
    straighten_transposes,
    fold_constants,
    simplify,
    remove_unused,
    lift_constants,
    merge_equal_nodes,
    remove_unused,
    shorten_slices,
    name_nodes,
    name_constants,
    forget_inner_shapes,
    strip_metadata,
)
