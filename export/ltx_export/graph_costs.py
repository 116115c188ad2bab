"""What a graph costs at given sizes: kernels, FLOP, traffic, the largest sum of live activations.

    cost(model, {"batch": 3, "tokens": 13376, ...}) -> Costs

**The memory model.** An engine does not run nodes but kernels. Here a kernel is one heavy node
(matrix product, convolution, attention) with the elementwise nodes behind it, or a run of
elementwise nodes and reductions (norms, softmax); its inner tensors, each used once, are never in
memory. Reshapes are names for their input. All else is kept from the kernel that writes it until
the last one that reads it. Kernels run as late as they can, and all of one level together, as an
engine runs queries, keys and values on streams of their own; `activations` is the largest sum at
any level. That is what the builder's log calls "Total Activation Memory" (and an engine
`device_memory_size_v2`): TensorRT-RTX 1.7.1 wants 2.27 GB for the 2B transformer at 2 x 16,384
tokens, this says 2.28; one kernel at a time in the order of the file it would be 1.61.
`benchmarks/plan.py` measures the difference.

`Attention` is one kernel whose table of scores is never in memory; a softmax between two products
is counted with its table, as it would be built. Inputs and outputs belong to the caller and are
counted as `io`; what depends on weights alone is computed when the engine is built.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import onnx_ir as ir

from ltx_export import concrete_shapes
from ltx_export.concrete_shapes import Array, Axes, Walk, name_of, where

INT32_MAX = 2**31 - 1
"""Elements that a convolution of TensorRT can count (NVIDIA/TensorRT#4123)."""

REDUCTIONS = frozenset(
    {"GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax"}
    | {"LpNormalization", "MeanVarianceNormalization", "RMSNormalization", "ReduceL2", "ReduceMax"}
    | {"ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare", "Softmax"}
)
POINTWISE = frozenset(
    {"Abs", "Add", "And", "BitShift", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Cos", "Div"}
    | {"DequantizeLinear", "Elu", "Equal", "Erf", "Exp", "Expand", "Floor", "Gelu", "Greater"}
    | {"GreaterOrEqual", "HardSigmoid", "HardSwish", "IsNaN", "LeakyRelu", "Less", "LessOrEqual"}
    | {"Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pad", "Pow"}
    | {"QuantizeLinear", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin"}
    | {"Softplus", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "Where", "Xor"}
)
"""Each result from a few elements; Concat and Pad are written by whatever makes their parts."""
UNCOUNTED = frozenset(
    {"ConvInteger", "DeformConv", "Einsum", "GRU", "LSTM", "MatMulInteger", "QLinearConv"}
    | {"QLinearMatMul", "RNN"}
)
"""Heavy operators that no graph of ours has and for which there is no formula here."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """`elements` is the larger one of its input's and its output's counts."""

    name: str
    elements: int


@dataclass(frozen=True, slots=True)
class Attention:
    name: str
    dtype: ir.DataType
    head_dim: int
    queries: int
    keys: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """`traffic` is bytes of activations read and written; `weights` are names, read as well."""

    name: str
    heavy: str | None
    dtype: ir.DataType
    flops: int
    traffic: int
    weights: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Costs:
    kernels: tuple[Kernel, ...]
    activations: int
    io: int
    weights: Mapping[str, Array]
    convolutions: tuple[Convolution, ...]
    attentions: tuple[Attention, ...]

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)


def cost(model: ir.Model, axes: Axes) -> Costs:
    """
    Raises:
        ValueError, AssertionError: as `walk`; or no formula is known for a heavy operator.
    """
    walk = concrete_shapes.walk(model, axes)
    uses = _uses(walk)
    groups = _groups(walk, uses)
    borders = {*walk.graph.inputs, *walk.graph.outputs}
    weights = {
        name_of(v): walk.arrays[v] for v in walk.graph.initializers.values() if v not in walk.known
    }
    return Costs(
        tuple(_kernel(walk, group) for group in groups),
        _peak(walk, groups),
        sum(walk.arrays[value].bytes for value in borders),
        weights,
        tuple(_convolutions(walk)),
        tuple(_attentions(walk)),
    )


def convolutions(model: ir.Model, axes: Axes) -> tuple[Convolution, ...]:
    """
    Raises:
        ValueError, AssertionError: as `walk`.
    """
    return tuple(_convolutions(concrete_shapes.walk(model, axes)))


@dataclass(slots=True)
class _Group:
    """Nodes that run as one kernel when all but the last have no other reader."""

    nodes: list[ir.Node]
    heavy: ir.Node | None
    reduces: bool

    def absorb(self, before: "_Group") -> None:
        self.nodes[:0] = before.nodes
        self.heavy = self.heavy or before.heavy
        self.reduces = self.reduces or before.reduces


def _uses(walk: Walk) -> dict[ir.Value, list[ir.Node]]:
    uses: dict[ir.Value, list[ir.Node]] = {}
    for node in walk.nodes:
        for value in walk.reads(node):
            uses.setdefault(value, []).append(node)
    return uses


def _groups(walk: Walk, uses: Mapping[ir.Value, Sequence[ir.Node]]) -> list[_Group]:
    """The nodes as kernels. A group is a tree: what it makes within is read once, also within."""
    outputs = {walk.root(value) for value in walk.graph.outputs}
    group_of: dict[ir.Node, _Group] = {}
    for node in walk.nodes:
        heavy = node if node.op_type in FLOPS else None
        group = _Group([node], heavy, node.op_type in REDUCTIONS)
        for value in walk.reads(node):
            maker = value.producer()
            before = group_of.get(maker) if maker is not None else None
            single = len(uses[value]) == 1 and value not in outputs
            if before is not None and single and _joins(before, group, node):
                group.absorb(before)
                group_of |= dict.fromkeys(before.nodes, group)
        group_of[node] = group
    return [group for node, group in group_of.items() if group.nodes[-1] is node]


def _joins(before: _Group, group: _Group, node: ir.Node) -> bool:
    """Whether `node` can be computed while the kernel before it still has its result at hand."""
    last = before.nodes[-1]
    if len(last.outputs) > 1 or last.op_type not in POINTWISE | REDUCTIONS | FLOPS.keys():
        return False
    if node.op_type not in POINTWISE | REDUCTIONS:
        return False
    heavies = (before.heavy is not None) + (group.heavy is not None)
    reduces = before.reduces or group.reduces
    return heavies == 0 or (heavies == 1 and not reduces)


def _touched(walk: Walk, group: _Group) -> tuple[list[ir.Value], list[ir.Value]]:
    """What the kernel reads from memory and what it writes there."""
    made = [output for node in group.nodes for output in node.outputs]
    read = dict.fromkeys(value for node in group.nodes for value in walk.reads(node))
    return [value for value in read if value not in set(made)], list(group.nodes[-1].outputs)


def _kernel(walk: Walk, group: _Group) -> Kernel:
    read, written = _touched(walk, group)
    last, heavy = group.nodes[-1], group.heavy
    inputs = (value for node in group.nodes for value in node.inputs if value is not None)
    weights = (name for value in inputs for name in walk.weights.get(value, ()))
    first = (heavy or last).inputs[0]
    if first is None:
        raise AssertionError(f"{where(last)} has no first input")
    return Kernel(
        (heavy or last).name or last.op_type,
        heavy.op_type if heavy else None,
        walk.arrays[first].dtype,
        _flops(walk, group),
        sum(walk.arrays[value].bytes for value in (*read, *written)),
        tuple(dict.fromkeys(weights)),
    )


def _peak(walk: Walk, groups: Sequence[_Group]) -> int:
    """The largest sum of what is in memory while the kernels of one level run."""
    borders = {walk.root(value) for value in (*walk.graph.inputs, *walk.graph.outputs)}
    touched = [_touched(walk, group) for group in groups]
    levels = _levels(touched)
    last_read: dict[ir.Value, int] = {}
    for level, (read, _) in zip(levels, touched, strict=True):
        last_read |= {value: max(level, last_read.get(value, level)) for value in read}
    change: Counter[int] = Counter()
    for level, (_, written) in zip(levels, touched, strict=True):
        for value in written:
            if value not in borders:
                change[level] += walk.arrays[value].bytes
                change[last_read.get(value, level) + 1] -= walk.arrays[value].bytes
    return max(accumulate(change[level] for level in sorted(change)), default=0)


def _levels(touched: Sequence[tuple[Sequence[ir.Value], Sequence[ir.Value]]]) -> list[int]:
    """When each kernel runs: one level before the first kernel that reads what it writes. One that
    only gives out a piece of what others read runs with the first of these."""
    used = {value for read, _ in touched for value in read}
    ends = [not used.intersection(written) for _, written in touched]
    rows = list(zip(touched, ends, strict=True))
    within = {value for (read, _), end in rows if not end for value in read}
    first_read: dict[ir.Value, int] = {}
    levels: list[int | None] = []
    for (read, written), end in reversed(rows):
        if end and read and within.issuperset(read):
            levels.append(None)
            continue
        level = min((first_read[v] - 1 for v in written if v in first_read), default=0)
        first_read |= {value: min(level, first_read.get(value, level)) for value in read}
        levels.append(level)
    return [
        min(first_read[value] for value in read) if level is None else level
        for (read, _), level in zip(touched, reversed(levels), strict=True)
    ]


def _flops(walk: Walk, group: _Group) -> int:
    for node in group.nodes:
        if node.op_type in UNCOUNTED:
            raise AssertionError(f"{where(node)}: no formula for its FLOP")
    if group.heavy is None:
        return 0
    inputs = [None if v is None else walk.arrays[v].shape for v in group.heavy.inputs]
    return FLOPS[group.heavy.op_type](
        group.heavy, [shape or () for shape in inputs], walk.arrays[group.heavy.outputs[0]].shape
    )


Shapes = Sequence[tuple[int, ...]]


def _matmul(_: ir.Node, inputs: Shapes, output: tuple[int, ...]) -> int:
    return 2 * prod(output) * inputs[0][-1]


def _gemm(node: ir.Node, inputs: Shapes, output: tuple[int, ...]) -> int:
    return 2 * prod(output) * inputs[0][0 if node.attributes.get_int("transA", 0) else 1]


def _conv(_: ir.Node, inputs: Shapes, output: tuple[int, ...]) -> int:
    """A weight is [outputs, inputs of the group, *kernel]."""
    return 2 * prod(output) * prod(inputs[1][1:])


def _conv_transpose(_: ir.Node, inputs: Shapes, __: tuple[int, ...]) -> int:
    """A weight is [inputs, outputs of the group, *kernel]."""
    return 2 * prod(inputs[0]) * prod(inputs[1][1:])


def _attention(node: ir.Node, inputs: Shapes, _: tuple[int, ...]) -> int:
    heads, queries, keys, width, value_width = _attention_sizes(node, inputs)
    return 2 * inputs[0][0] * heads * queries * keys * (width + value_width)


FLOPS = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
"""The heavy operators: FLOP from the input shapes and the output's, two for each multiply-add."""


def _attention_sizes(node: ir.Node, inputs: Shapes) -> tuple[int, int, int, int, int]:
    """Heads, queries, keys, and the widths of a key and of a value, in one head.

    Inputs are [B, heads, length, width], or [B, length, heads * width] with attributes; keys may
    be continued from a cache, which no graph of ours has.
    """
    query, key, value = inputs[:3]
    if len(inputs) > 4 and inputs[4]:
        raise AssertionError(f"{where(node)}: no formula for attention with a cache")
    if len(query) == 4:
        return query[1], query[2], key[2], query[3], value[3]
    heads = node.attributes.get_int("q_num_heads")
    key_heads = node.attributes.get_int("kv_num_heads")
    if heads is None or key_heads is None:
        raise AssertionError(f"{where(node)}: three axes and no number of heads")
    return heads, query[1], key[1], query[2] // heads, value[2] // key_heads


def _convolutions(walk: Walk) -> Iterator[Convolution]:
    for node in walk.nodes:
        if node.op_type in ("Conv", "ConvTranspose"):
            ends = (node.inputs[0], node.outputs[0])
            most = max(walk.arrays[value].elements for value in ends if value is not None)
            yield Convolution(node.name or node.op_type, most)


def _attentions(walk: Walk) -> Iterator[Attention]:
    for node in walk.nodes:
        if node.op_type == "Attention":
            shapes = [() if v is None else walk.arrays[v].shape for v in node.inputs]
            _, queries, keys, width, value_width = _attention_sizes(node, shapes)
            dtype = walk.arrays[node.outputs[0]].dtype
            head_dim = max(width, value_width)
            yield Attention(node.name or node.op_type, dtype, head_dim, queries, keys)
