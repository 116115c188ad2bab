"""What a graph costs at given sizes, exactly: shapes, FLOP, traffic, memory of activations.

    axes = {"batch": 3, "tokens": 13376, ...}
    infer(model, axes)   -> the element type and the shape of every tensor
    cost(model, axes)    -> Costs: kernels, FLOP, the largest sum of live activations, ...

Shapes are inferred node by node from numbers, never from symbols: what computes a shape (`Shape`,
`Slice`, `Concat`, arithmetic) is a small tensor whose values are known, so it is evaluated; the
rest goes through ONNX's own inference. Weights need a shape and a type only, not one byte.

**The memory model.** An engine does not run nodes but kernels. Here a kernel is one heavy node
(matrix product, convolution, attention) with the elementwise nodes behind it, or a run of
elementwise nodes and reductions (norms, softmax); its inner tensors, each used once, are never in
memory. Reshapes are names for their input. All else is kept from the kernel that writes it until
the last one that reads it. Kernels run as late as they can, and all of one level together, as an
engine runs queries, keys and values on streams of their own; `activations` is the largest sum at
any level. That is what the builder's log calls "Total Activation Memory" (and an engine
`device_memory_size_v2`): TensorRT-RTX 1.7.1 wants 2.15 GB for the 2B transformer at 2 x 16,384
tokens, this says 2.15; in the order of the graph's nodes it would be 1.36. `benchmarks/plan.py`
measures the difference.

`Attention` is one kernel whose table of scores is never in memory; a softmax between two products
is counted with its table, as it would be built. Inputs and outputs belong to the caller and are
counted as `io`; what depends on weights alone is computed when the engine is built.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs, shape_inference
from onnx.reference import ReferenceEvaluator

INT32_MAX = 2**31 - 1
"""Elements that a convolution of TensorRT can count (NVIDIA/TensorRT#4123)."""

KNOWN_LIMIT = 4096
"""Elements of a tensor whose values are worth knowing: shapes and indices, not tables."""

VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
REDUCTIONS = frozenset(
    {"GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax"}
    | {"LpNormalization", "MeanVarianceNormalization", "RMSNormalization", "ReduceL2", "ReduceMax"}
    | {"ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare", "Softmax"}
)
POINTWISE = frozenset(
    {"Abs", "Add", "And", "BitShift", "Cast", "CastLike", "Ceil", "Clip", "Cos", "Div", "Elu"}
    | {"DequantizeLinear", "Equal", "Erf", "Exp", "Expand", "Floor", "Gelu", "Greater"}
    | {"GreaterOrEqual", "HardSigmoid", "HardSwish", "IsNaN", "LeakyRelu", "Less", "LessOrEqual"}
    | {"Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow"}
    | {"QuantizeLinear", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin"}
    | {"Softplus", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "Where", "Xor"}
)
UNCOUNTED = frozenset(
    {"ConvInteger", "DeformConv", "Einsum", "GRU", "LSTM", "MatMulInteger", "QLinearConv"}
    | {"QLinearMatMul", "RNN"}
)
"""Heavy operators that no graph of ours has and for which there is no formula here."""

REFUSALS = (defs.SchemaError, shape_inference.InferenceError, onnx.checker.ValidationError)
"""How ONNX says that a node breaks its operator's rules."""

Axes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Array:
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return -(-self.elements * self.dtype.bitwidth // 8)


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

    @property
    def weight_bytes(self) -> dict[ir.DataType, int]:
        found: Counter[ir.DataType] = Counter()
        for weight in self.weights.values():
            found[weight.dtype] += weight.bytes
        return dict(found)


def infer(model: ir.Model, axes: Axes) -> dict[str, Array]:
    """The element type and shape of every tensor of the graph, by name.

    Raises:
        ValueError: an input's axis has no size in `axes`.
        AssertionError: a node's shape does not follow from its inputs', or breaks them.
    """
    walk = _walk(model, axes)
    return {_name(value): array for value, array in walk.arrays.items()}


def cost(model: ir.Model, axes: Axes) -> Costs:
    """
    Raises:
        ValueError, AssertionError: as `infer`; or no formula is known for a heavy operator.
    """
    walk = _walk(model, axes)
    uses = _uses(walk)
    groups = _groups(walk, uses)
    borders = {*walk.graph.inputs, *walk.graph.outputs}
    weights = {
        _name(v): walk.arrays[v] for v in walk.graph.initializers.values() if v not in walk.known
    }
    return Costs(
        tuple(_kernel(walk, group) for group in groups),
        _peak(walk, groups),
        sum(walk.arrays[value].bytes for value in borders),
        weights,
        tuple(_convolutions(walk)),
        tuple(_attentions(walk)),
    )


@dataclass(slots=True)
class _Walk:
    """A graph with numbers; it grows node by node.

    `known` are values of small tensors, `weights` what a tensor is computed from when that is
    weights alone, `whole` the tensor of which one is another view.
    """

    graph: ir.Graph
    opsets: Mapping[str, int]
    arrays: dict[ir.Value, Array] = field(default_factory=dict)
    known: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    weights: dict[ir.Value, tuple[str, ...]] = field(default_factory=dict)
    whole: dict[ir.Value, ir.Value] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)
    """Those that do something with activations, in the graph's order."""

    def root(self, value: ir.Value) -> ir.Value:
        return self.whole.get(value, value)

    def is_activation(self, value: ir.Value | None) -> bool:
        return value is not None and value not in self.known and value not in self.weights

    def reads(self, node: ir.Node) -> Iterator[ir.Value]:
        """The activations that it reads, views replaced by what they are views of."""
        roots = (self.root(v) for v in node.inputs if v is not None and self.is_activation(v))
        yield from dict.fromkeys(roots)


def _walk(model: ir.Model, axes: Axes) -> _Walk:
    if model.functions:
        raise AssertionError(f"functions were not inlined: {len(model.functions)}")
    walk = _Walk(model.graph, model.opset_imports)
    for value in model.graph.inputs:
        walk.arrays[value] = _input(value, axes)
    for value in model.graph.initializers.values():
        _add_initializer(walk, value)
    for node in model.graph:
        _step(walk, node)
    for value in model.graph.outputs:
        _check_output(value, walk.arrays[value], axes)
    return walk


def _input(value: ir.Value, axes: Axes) -> Array:
    if value.dtype is None or value.shape is None:
        raise AssertionError(f"input {value.name} has no element type or no shape")
    return Array(value.dtype, tuple(_size(axis, value, axes) for axis in value.shape))


def _size(axis: int | ir.SymbolicDim, value: ir.Value, axes: Axes) -> int:
    if isinstance(axis, int):
        return axis
    if axis.value is None or axis.value not in axes:
        raise ValueError(f"{value.name}: axis {axis.value} has no size among {sorted(axes)}")
    return axes[axis.value]


def _add_initializer(walk: _Walk, value: ir.Value) -> None:
    tensor = value.const_value
    dtype, shape = (value.dtype, value.shape) if tensor is None else (tensor.dtype, tensor.shape)
    sizes = tuple(size for size in shape or () if isinstance(size, int))
    if dtype is None or shape is None or len(sizes) != len(shape):
        raise AssertionError(f"initializer {value.name} has no element type or no fixed shape")
    walk.arrays[value] = array = Array(dtype, sizes)
    # Weights lie in other files, which are not opened here.
    inside = tensor is not None and not isinstance(tensor, ir.ExternalTensor)
    if tensor is not None and inside and array.elements <= KNOWN_LIMIT:
        walk.known[value] = tensor.numpy()
    else:
        walk.weights[value] = (_name(value),)


def _check_output(value: ir.Value, array: Array, axes: Axes) -> None:
    """What is inferred must be what the graph promises, as far as it promises sizes."""
    if value.shape is None:
        return
    promised = [a if isinstance(a, int) else axes.get(a.value or "") for a in value.shape]
    pairs = zip(promised, array.shape, strict=False)
    if len(promised) != len(array.shape) or any(p not in (None, size) for p, size in pairs):
        raise AssertionError(
            f"output {value.name} comes out as {list(array.shape)}, the graph says {value.shape}"
        )


def _step(walk: _Walk, node: ir.Node) -> None:
    """Give the outputs of one node their types, shapes and, where they are known, values."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _own(node)):
        raise AssertionError(f"{_where(node)}: what it costs depends on values")
    inputs = [value for value in node.inputs if value is not None]
    values = _evaluate(walk, node, inputs)
    arrays = _infer_node(walk, node, inputs) if values is None else map(_array, values)
    for index, (output, array) in enumerate(zip(node.outputs, arrays, strict=True)):
        walk.arrays[output] = array
        if values is not None and array.elements <= KNOWN_LIMIT:
            walk.known[output] = values[index]
    if values is not None:
        return
    if not any(walk.is_activation(value) for value in inputs):
        names = (name for value in inputs for name in walk.weights.get(value, ()))
        walk.weights |= dict.fromkeys(node.outputs, tuple(dict.fromkeys(names)))
    elif node.op_type in VIEWS:
        walk.whole[node.outputs[0]] = walk.root(inputs[0])
    else:
        walk.nodes.append(node)


def _own(node: ir.Node) -> Iterator[ir.Attr]:
    yield from (a for a in node.attributes.values() if isinstance(a, ir.Attr))


def _array(value: np.ndarray) -> Array:
    return Array(ir.DataType.from_numpy(value.dtype), value.shape)


def _evaluate(
    walk: _Walk, node: ir.Node, inputs: Sequence[ir.Value]
) -> Sequence[np.ndarray] | None:
    """The node's results, when they follow from known values alone and are small."""
    if node.op_type == "Shape":
        start = node.attributes.get_int("start", 0)
        shape = walk.arrays[inputs[0]].shape[start : node.attributes.get_int("end")]
        return [np.asarray(shape, dtype=np.int64)]
    if node.op_type == "Size":
        return [np.asarray(walk.arrays[inputs[0]].elements)]
    if not all(value in walk.known for value in inputs):
        return None
    if any(array.elements > KNOWN_LIMIT for array in _infer_node(walk, node, inputs)):
        return None
    opsets = dict(walk.opsets)
    feeds = {_name(value): walk.known[value] for value in inputs}
    with np.errstate(all="ignore"):  # infinities of tables that Where throws away
        results = ReferenceEvaluator(ir.to_proto(node), opsets=opsets).run(None, feeds)
    return [np.asarray(result) for result in results]


def _infer_node(walk: _Walk, node: ir.Node, inputs: Sequence[ir.Value]) -> list[Array]:
    opset = walk.opsets.get(node.domain, 0)
    data = {
        _name(v): onnx.numpy_helper.from_array(walk.known[v]) for v in inputs if v in walk.known
    }
    try:
        found = shape_inference.infer_node_outputs(
            defs.get_schema(node.op_type, opset, node.domain),
            ir.to_proto(node),
            {_name(value): _type(walk.arrays[value]) for value in inputs},
            data,
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in walk.opsets.items()],
        )
    except REFUSALS as error:
        raise AssertionError(f"{_where(node)}: {' '.join(str(error).split())}") from None
    return [_concrete(node, value, found) for value in node.outputs]


def _type(array: Array) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(int(array.dtype), array.shape)


def _concrete(node: ir.Node, value: ir.Value, found: Mapping[str, onnx.TypeProto]) -> Array:
    tensor = found[_name(value)].tensor_type if _name(value) in found else None
    if tensor is None or not tensor.HasField("shape") or not tensor.elem_type:
        raise AssertionError(f"{_where(node)}: nothing is known of its output {value.name}")
    if not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        raise AssertionError(
            f"{_where(node)}: the shape of its output {value.name} is not known: "
            f"{[dim.dim_value if dim.HasField('dim_value') else None for dim in tensor.shape.dim]}"
        )
    sizes = tuple(dim.dim_value for dim in tensor.shape.dim)
    return Array(ir.DataType(tensor.elem_type), sizes)


def _where(node: ir.Node) -> str:
    return f"node {node.name or '(without a name)'} ({node.op_type})"


def _name(value: ir.Value) -> str:
    if value.name is None:
        raise AssertionError(f"{value} has no name")
    return value.name


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


def _uses(walk: _Walk) -> dict[ir.Value, list[ir.Node]]:
    uses: dict[ir.Value, list[ir.Node]] = {}
    for node in walk.nodes:
        for value in walk.reads(node):
            uses.setdefault(value, []).append(node)
    return uses


def _groups(walk: _Walk, uses: Mapping[ir.Value, Sequence[ir.Node]]) -> list[_Group]:
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


def _touched(walk: _Walk, group: _Group) -> tuple[list[ir.Value], list[ir.Value]]:
    """What the kernel reads from memory and what it writes there."""
    made = [output for node in group.nodes for output in node.outputs]
    read = dict.fromkeys(value for node in group.nodes for value in walk.reads(node))
    return [value for value in read if value not in set(made)], list(group.nodes[-1].outputs)


def _kernel(walk: _Walk, group: _Group) -> Kernel:
    read, written = _touched(walk, group)
    last, heavy = group.nodes[-1], group.heavy
    inputs = (value for node in group.nodes for value in node.inputs if value is not None)
    weights = (name for value in inputs for name in walk.weights.get(value, ()))
    first = (heavy or last).inputs[0]
    if first is None:
        raise AssertionError(f"{_where(last)} has no first input")
    return Kernel(
        (heavy or last).name or last.op_type,
        heavy.op_type if heavy else None,
        walk.arrays[first].dtype,
        _flops(walk, group),
        sum(walk.arrays[value].bytes for value in (*read, *written)),
        tuple(dict.fromkeys(weights)),
    )


def _peak(walk: _Walk, groups: Sequence[_Group]) -> int:
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
    """When each kernel runs: one level before the first kernel that reads what it writes."""
    first_read: dict[ir.Value, int] = {}
    levels: list[int] = []
    for read, written in reversed(touched):
        level = min((first_read[v] - 1 for v in written if v in first_read), default=0)
        first_read |= {value: min(level, first_read.get(value, level)) for value in read}
        levels.append(level)
    return levels[::-1]


def _flops(walk: _Walk, group: _Group) -> int:
    for node in group.nodes:
        if node.op_type in UNCOUNTED:
            raise AssertionError(f"{_where(node)}: no formula for its FLOP")
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
        raise AssertionError(f"{_where(node)}: no formula for attention with a cache")
    if len(query) == 4:
        return query[1], query[2], key[2], query[3], value[3]
    heads = node.attributes.get_int("q_num_heads")
    key_heads = node.attributes.get_int("kv_num_heads")
    if heads is None or key_heads is None:
        raise AssertionError(f"{_where(node)}: three axes and no number of heads")
    return heads, query[1], key[1], query[2] // heads, value[2] // key_heads


def _convolutions(walk: _Walk) -> Iterator[Convolution]:
    for node in walk.nodes:
        if node.op_type in ("Conv", "ConvTranspose"):
            ends = (node.inputs[0], node.outputs[0])
            most = max(walk.arrays[value].elements for value in ends if value is not None)
            yield Convolution(node.name or node.op_type, most)


def _attentions(walk: _Walk) -> Iterator[Attention]:
    for node in walk.nodes:
        if node.op_type == "Attention":
            shapes = [() if v is None else walk.arrays[v].shape for v in node.inputs]
            _, queries, keys, width, value_width = _attention_sizes(node, shapes)
            dtype = walk.arrays[node.outputs[0]].dtype
            head_dim = max(width, value_width)
            yield Attention(node.name or node.op_type, dtype, head_dim, queries, keys)
