"""Edits to a traced graph: fewer nodes, honest names, nothing about the machine that made it.

The graph's weights have no values here, so no edit can fold, merge or rename one.
"""

import ast
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as library
from onnxscript import optimizer
from onnxscript.rewriter import pattern, rewrite
from onnxscript.rewriter.rules import common as rules

from ltx_export.edits import take_place
from ltx_export.element_types import OWN

Pass = Callable[[ir.Model], int]

log = logging.getLogger(__name__)

RULES: tuple[pattern.RewriteRule, ...] = (
    rules.cast_cast_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
)
"""onnxscript's simplifications that can apply here. Left out on purpose: add_0 and its like compare
with a tolerance, and would drop an epsilon of 1e-8; slice_split_rule indexes the whole graph for
each node (2B: 76 s of 90, and it finds nothing); batch norm folds weights."""

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


def fuse_rms_norms(model: ir.Model) -> int:
    """One RMSNormalization for x * rsqrt(mean(x^2) + eps), in float32, with or without a scale.

    Rounding stays where it was: after the norm and before the scale, as the operator does it.
    """
    edits = 0
    for root in [node for node in model.graph if node.op_type == "Reciprocal"]:
        norm = _rms_norm(root)
        if norm is None:
            continue
        _replace_norm(model, norm)
        edits += 1
    return edits


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """A norm spelled out: `source` goes in, the output of `last` comes out."""

    source: ir.Value
    last: ir.Node
    scale: ir.Value | None
    epsilon: float


def _rms_norm(reciprocal: ir.Node) -> RMSNorm | None:
    """The norm around a Reciprocal; None if it is something else."""
    chain = [reciprocal]
    for op_type in ("Sqrt", "Add", "ReduceMean", "Pow", "Cast"):
        if (node := _maker(chain[-1].inputs[0], op_type)) is None:
            return None
        chain.append(node)
    _, _, total, mean, square, wide = chain
    if _numbers(mean.inputs[1]) != [-1] or _numbers(square.inputs[1]) != [2.0]:
        return None
    epsilon, last = _numbers(total.inputs[1]), _normed(reciprocal, wide)
    if epsilon is None or last is None or wide.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    if wide.inputs[0] is None:
        return None
    after = _only_user(last.outputs[0], "Mul")
    factors = [] if after is None else [v for v in after.inputs if v is not last.outputs[0]]
    if after is None or len(factors) != 1 or not _is_vector_weight(factors[0]):
        return RMSNorm(wide.inputs[0], last, None, epsilon[0])
    return RMSNorm(wide.inputs[0], after, factors[0], epsilon[0])


def _normed(reciprocal: ir.Node, wide: ir.Node) -> ir.Node | None:
    """The node that has the normed tensor in the type of the source.

    Either wide * rsqrt, rounded; or, as T5 writes it, source * rounded rsqrt, which torch's type
    promotion turns into float32 whenever the source is narrower.
    """
    product = _only_user(reciprocal.outputs[0], "Mul")
    if product is not None and wide.outputs[0] in product.inputs:
        return _only_user(product.outputs[0], "Cast")
    rounded = _only_user(reciprocal.outputs[0], "Cast")
    product = rounded and _only_user(rounded.outputs[0], "Mul")
    return product if product is not None and wide.inputs[0] in product.inputs else None


def _replace_norm(model: ir.Model, norm: RMSNorm) -> None:
    scale = norm.scale or _ones(model, norm.source)
    fused = ir.node(
        "RMSNormalization",
        [norm.source, scale],
        {"axis": -1, "epsilon": norm.epsilon, "stash_type": int(ir.DataType.FLOAT)},
        metadata_props=dict(norm.last.metadata_props),
    )
    model.graph.insert_after(norm.last, fused)
    take_place(fused.outputs[0], norm.last.outputs[0])


def _ones(model: ir.Model, source: ir.Value) -> ir.Value:
    """A row of ones as wide as the source: ONNX has no norm without a scale."""
    width = None if source.shape is None else source.shape[-1]
    if not isinstance(width, int):
        raise AssertionError(f"a norm over an axis of unknown size: {source}")
    name = f"ones_{width}"
    if name not in model.graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(np.ones(width), name=name))
        value.type, value.shape = ir.TensorType(OWN), ir.Shape([width])
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def _is_vector_weight(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is None
        and value.shape is not None
        and len(value.shape) == 1
    )


def _maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    uses = value.uses()
    node = next(iter(uses)).node if len(uses) == 1 else None
    return node if node is not None and node.op_type == op_type else None


def _numbers(value: ir.Value | None) -> list[float] | None:
    """The elements of a constant of at most one axis."""
    if value is None or (tensor := ir.convenience.get_const_tensor(value)) is None:
        return None
    return [float(n) for n in tensor.numpy().ravel()]


def join_heads(model: ir.Model) -> int:
    """Attention over [batch, tokens, width], which splits the heads by itself.

    Three Reshapes and Transposes before it and one after it go; the number of heads becomes an
    attribute, which no shape inference can lose.
    """
    edits = 0
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        sources = [_before_heads(value) for value in node.inputs[:3]]
        merge = _only_user(node.outputs[0], "Transpose")
        flat = merge and _only_user(merge.outputs[0], "Reshape")
        if flat is None or any(source is None for source in sources):
            continue
        heads = _axis(node.inputs[0], 1)
        if heads != _axis(node.inputs[2], 1) or flat.outputs[0].shape is None:
            continue
        if "scale" not in node.attributes:  # the default, which needs a shape to be computed
            scale = _axis(node.inputs[0], 3) ** -0.5
            node.attributes["scale"] = ir.AttrFloat32("scale", scale)
        for index, source in enumerate(sources):
            node.replace_input_with(index, source)
        node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads)
        node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads)
        node.outputs[0].shape = flat.outputs[0].shape
        ir.convenience.replace_all_uses_with(flat.outputs[0], node.outputs[0])
        edits += 1
    return edits


def _before_heads(value: ir.Value | None) -> ir.Value | None:
    """What was split into heads and turned: [batch, tokens, width]."""
    turn = _maker(value, "Transpose")
    if turn is None or list(turn.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    split = _maker(turn.inputs[0], "Reshape")
    source = None if split is None else split.inputs[0]
    flat = source is not None and source.shape is not None and len(source.shape) == 3
    return source if flat else None


def _axis(value: ir.Value | None, index: int) -> int:
    size = value.shape[index] if value is not None and value.shape is not None else None
    if not isinstance(size, int):
        raise AssertionError(f"axis {index} should have a fixed size: {value}")
    return size


def settle_reshapes(model: ir.Model) -> int:
    """Reshape by a constant where at most one axis is neither fixed nor the input's at its place.

    0 keeps the input's axis, -1 is what remains. No shape is computed, and none is taken from
    another block's tensor.
    """
    edits = 0
    for node in [node for node in model.graph if node.op_type == "Reshape"]:
        source, target = node.inputs[0], node.outputs[0]
        if _numbers(node.inputs[1]) is not None or source is None:
            continue
        if source.shape is None or target.shape is None:
            continue
        sizes = _settled(list(source.shape), list(target.shape))
        if sizes is None:
            continue
        constant = ir.node("Constant", [], {"value": ir.tensor(np.array(sizes, np.int64))})
        model.graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)
        edits += 1
    return edits


def _settled(before: list[Any], after: list[Any]) -> list[int] | None:
    sizes = []
    for index, axis in enumerate(after):
        if isinstance(axis, int):
            sizes.append(axis)
        else:
            kept = index < len(before) and str(before[index]) == str(axis)
            sizes.append(0 if kept else -1)
    return sizes if sizes.count(-1) <= 1 else None


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
        name = f"{_module(node)}/{node.op_type}".removeprefix("/")
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
    return len(model.graph)


def _module(node: ir.Node) -> str:
    """Where the node was traced; a node that folding made stands where its input was made."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    if len(scopes) > 1:
        return "" if scopes[-2].startswith("_") else str(scopes[-2])
    makers = (value.producer() for value in node.inputs if value is not None)
    return next((_module(maker) for maker in makers if maker is not None), "")


def name_constants(model: ir.Model) -> int:
    """Number the small constants; a module's name in front of one would look like a weight."""
    constants = [value for value in model.graph.initializers.values() if value.const_value]
    for index, value in enumerate(constants):
        value.name = f"constant_{index}"
    return len(constants)


def name_values(model: ir.Model) -> int:
    """Name what a node computes after the node: that is what an engine's inspector shows."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        for index, value in enumerate(node.outputs):
            if value not in kept:
                value.name = f"{node.name}:{index}"
    return len(model.graph)


def forget_inner_shapes(model: ir.Model) -> int:
    """Inside the graph, shapes were found for as many timesteps as tokens; one is allowed too."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    inner = [value for node in model.graph for value in node.outputs if value not in kept]
    known = [value for value in inner if value.shape is not None]
    for value in known:
        value.shape = None
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
    join_heads,
    settle_reshapes,
    fold_constants,
    simplify,
    remove_unused,
    lift_constants,
    merge_equal_nodes,
    fuse_rms_norms,
    remove_unused,
    shorten_slices,
    name_nodes,
    name_constants,
    name_values,
    forget_inner_shapes,
    strip_metadata,
)
