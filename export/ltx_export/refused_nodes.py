"""Which nodes of a graph a builder refuses: the smallest run of consecutive ones, by halving.

A cut is a graph of its own. Its inputs are the activations that come from before it, with the
types and sizes that they have at one size of the model; its outputs are those that go on behind.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from ltx_export import concrete_shapes
from ltx_export.concrete_shapes import Array, Walk, name_of

Judge = Callable[[ir.Model, str], Generator[str, None, str | None]]
"""Why a graph is refused, in the builder's words; None if it is not. The text says which."""


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    op: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """Consecutive nodes of which the builder refuses all together, and none fewer at either end."""

    nodes: tuple[Node, ...]
    words: str
    """Of the builder, about them alone."""
    attempts: int
    of: int
    """Nodes of the whole graph."""


@dataclass(slots=True)
class Cuts:
    """A graph with the sizes of one call; what its shapes are made of has become numbers."""

    model: ir.Model
    walk: Walk
    nodes: tuple[ir.Node, ...]
    place: dict[ir.Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.place = {node: index for index, node in enumerate(self.nodes)}

    @classmethod
    def of(cls, model: ir.Model, axes: Mapping[str, int]) -> "Cuts":
        walk = concrete_shapes.walk(model, axes)
        _fold(model, walk)
        nodes = (n for n in model.graph if any(map(walk.is_activation, n.outputs)))
        return cls(model, walk, tuple(nodes))

    def cut(self, begin: int, end: int) -> ir.Model:
        """The nodes from `begin` to `end` - 1, as a graph of its own."""
        inputs, outputs = list(self._inputs(begin, end)), list(self._outputs(begin, end))
        graph = ir.convenience.extract(self.model.graph, inputs, outputs)
        for copies, values in ((graph.inputs, inputs), (graph.outputs, outputs)):
            for copy, value in zip(copies, values, strict=True):
                array = self.walk.arrays[value]
                copy.dtype, copy.shape = array.dtype, ir.Shape(array.shape)
        return ir.Model(graph, ir_version=self.model.ir_version)

    def _inputs(self, begin: int, end: int) -> Iterator[ir.Value]:
        inside = set(self.nodes[begin:end])
        read = (value for node in self.nodes[begin:end] for value in node.inputs)
        for value in dict.fromkeys(read):
            if value is None or not self.walk.is_activation(value):
                continue
            if value.producer() not in inside:
                yield value

    def _outputs(self, begin: int, end: int) -> Iterator[ir.Value]:
        inside = set(self.nodes[begin:end])
        for node in self.nodes[begin:end]:
            for value in node.outputs:
                goes_on = any(use.node not in inside for use in value.uses())
                if goes_on or value.is_graph_output():
                    yield value

    def described(self, node: ir.Node) -> Node:
        inputs = tuple(self._tensor(value) for value in node.inputs if value is not None)
        outputs = tuple(map(self._tensor, node.outputs))
        return Node(node.name or "", node.op_type, inputs, outputs)

    def _tensor(self, value: ir.Value) -> Tensor:
        array = self.walk.arrays[value]
        return Tensor(name_of(value), array.dtype.name.lower(), array.shape)


def _fold(model: ir.Model, walk: Walk) -> None:
    """Numbers that follow from the sizes of inputs become initializers."""
    for value, number in list(walk.known.items()):
        if value.producer() is None or not any(value.uses()):
            continue
        constant = ir.Value(name=f"{name_of(value)}/known", const_value=ir.tensor(number))
        dtype = constant.dtype = ir.DataType.from_numpy(number.dtype)
        constant.shape = ir.Shape(number.shape)
        model.graph.register_initializer(constant)
        walk.known[constant] = number
        walk.arrays[constant] = Array(dtype, number.shape)
        ir.convenience.replace_all_uses_with(value, constant)


def find(cuts: Cuts, judge: Judge) -> Generator[str, None, Refused | None]:
    """None if the builder takes the whole graph."""
    search = _Search(cuts, judge)
    count = len(cuts.nodes)
    if (yield from search.words(0, count)) is None:
        return None
    end = yield from search.first_end(count)
    begin = yield from search.last_begin(end)
    words = search.seen[begin, end]
    if words is None:
        raise AssertionError(f"the nodes {begin} to {end} were refused, and are not")
    nodes = tuple(map(cuts.described, cuts.nodes[begin:end]))
    return Refused(nodes, words, len(search.seen), count)


@dataclass(slots=True)
class _Search:
    cuts: Cuts
    judge: Judge
    seen: dict[tuple[int, int], str | None] = field(default_factory=dict)

    def words(self, begin: int, end: int) -> Generator[str, None, str | None]:
        if (begin, end) not in self.seen:
            text = f"nodes {begin} to {end - 1} of {len(self.cuts.nodes)}"
            self.seen[begin, end] = yield from self.judge(self.cuts.cut(begin, end), text)
        return self.seen[begin, end]

    def first_end(self, count: int) -> Generator[str, None, int]:
        """The fewest nodes from the beginning that are refused. Small graphs come first: they are
        built in a second."""
        taken, refused = 0, count
        step = 1
        while taken + step < refused:
            if (yield from self.words(0, taken + step)) is None:
                taken, step = taken + step, 2 * step
            else:
                refused = taken + step
                break
        while refused - taken > 1:
            middle = (taken + refused) // 2
            if (yield from self.words(0, middle)) is None:
                taken = middle
            else:
                refused = middle
        return refused

    def last_begin(self, end: int) -> Generator[str, None, int]:
        """The fewest nodes up to `end` that are refused."""
        taken, refused = end, 0
        step = 1
        while taken - step > refused:
            if (yield from self.words(taken - step, end)) is None:
                taken, step = taken - step, 2 * step
            else:
                refused = taken - step
                break
        while taken - refused > 1:
            middle = (taken + refused) // 2
            if (yield from self.words(middle, end)) is None:
                taken = middle
            else:
                refused = middle
        return refused


def said(refused: Refused) -> Iterator[str]:
    """For a person: one node with its types, or where a run of them begins and ends."""
    yield f"refused: {len(refused.nodes)} of {refused.of} nodes, after {refused.attempts} builds"
    for node in shown(refused.nodes):
        inputs, outputs = (", ".join(map(_typed, part)) for part in (node.inputs, node.outputs))
        yield f"  {node.name or '(without a name)'}: {node.op}({inputs}) -> {outputs}"
    yield f"  the builder: {refused.words}"


SHOWN = 6


def shown(nodes: Sequence[Node]) -> Sequence[Node]:
    """Not more than fit a screen: from both ends."""
    half = SHOWN // 2
    return nodes if len(nodes) <= SHOWN else (*nodes[:half], *nodes[-half:])


def _typed(tensor: Tensor) -> str:
    return f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"
