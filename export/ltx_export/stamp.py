"""A model's identical blocks, traced three times and stamped out as often as the model has them.

The first traced block may own what all share. The second and the third must be the same graph: what
differs between their inputs is the previous block's output, their own weights, and constants that
count the blocks. That is checked each time, and then the third one is copied.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

TRACED = 3
"""Blocks of a graph that can be stamped."""

Slot = tuple[int, int]
"""An input: the place of its node in the block, and its place among the node's inputs."""


def stamp(model: ir.Model, blocks: str, layers: int) -> int:
    """Give the model this many blocks, named `blocks`.0, `blocks`.1, ...; returns the new nodes.

    Raises:
        ValueError: fewer than were traced.
        AssertionError: the traced blocks are not of one kind.
    """
    if layers < TRACED:
        raise ValueError(f"{layers} blocks, but {TRACED} were traced")
    press = Press(model, blocks)
    after = list(press.uses_after())
    last, made = press.pattern[-1], 0
    for layer in range(TRACED, layers):
        copies = press.copy(layer)
        model.graph.insert_after(last, copies)
        last, made = copies[-1], made + len(copies)
    for node, index, value in after:
        node.replace_input_with(index, press.latest[value])
    return made


class Press:
    """Copies the last traced block; `latest` has each of its values in the newest copy."""

    def __init__(self, model: ir.Model, blocks: str) -> None:
        self.model, self.blocks = model, blocks
        self.before = list(_nodes(model, blocks, TRACED - 2))
        self.pattern = list(_nodes(model, blocks, TRACED - 1))
        if [_kind(node) for node in self.before] != [_kind(node) for node in self.pattern]:
            raise AssertionError(f"{blocks}: the second and the third block differ")
        pairs = zip(_outputs(self.before), _outputs(self.pattern), strict=True)
        self.twin = dict(pairs)
        self.latest = {value: value for value in _outputs(self.pattern)}
        self.counts = frozenset(self._counts())

    def uses_after(self) -> Iterator[tuple[ir.Node, int, ir.Value]]:
        """Where the blocks' output is read behind them.

        Raises:
            AssertionError: what is inside the second block is read there too.
        """
        inside = {*self.before, *self.pattern}
        for value in self.twin:
            if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                raise AssertionError(f"{value.name} is read behind the blocks")
        for value in self.latest:
            for use in tuple(value.uses()):
                if use.node not in inside:
                    yield use.node, use.idx, value

    def copy(self, layer: int) -> list[ir.Node]:
        """The block once more, reading from the newest one; it becomes the newest."""
        here: dict[ir.Value, ir.Value] = {}
        copies = []
        for place, node in enumerate(self.pattern):
            inputs = [
                here[value] if value in here else self._input((place, index), value, layer)
                for index, value in enumerate(node.inputs)
            ]
            copies.append(self._copy(node, inputs, layer))
            here |= zip(node.outputs, copies[-1].outputs, strict=True)
        self.latest = here
        return copies

    def _input(self, slot: Slot, value: ir.Value | None, layer: int) -> ir.Value | None:
        if value is None:
            return None
        if value in self.twin:
            return self.latest[self.twin[value]]
        if slot in self.counts:
            return self._count(value, layer)
        return self._weight(value, layer) if self._is_own(value, TRACED - 1) else value

    def _copy(self, node: ir.Node, inputs: Sequence[ir.Value | None], layer: int) -> ir.Node:
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=self._renamed(node.name, layer),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = self._renamed(old.name, layer), old.type, old.shape
        return copy

    def _weight(self, value: ir.Value, layer: int) -> ir.Value:
        return self._initializer(self._renamed(value.name, layer), value, None)

    def _count(self, value: ir.Value, layer: int) -> ir.Value:
        old = value.const_value
        if old is None:
            raise AssertionError(f"{value.name} has no value")
        number = ir.Tensor(np.full(old.shape.numpy(), layer, old.dtype.numpy()))
        return self._initializer(f"layer_{layer}_{old.dtype.name}_{len(old.shape)}", value, number)

    def _initializer(self, name: str, like: ir.Value, tensor: ir.TensorProtocol | None) -> ir.Value:
        known = self.model.graph.initializers
        if name not in known:
            value = ir.Value(name=name, type=like.type, shape=like.shape, const_value=tensor)
            known[name] = value
        return known[name]

    def _renamed(self, name: str | None, layer: int) -> str:
        old = f"{self.blocks}.{TRACED - 1}"
        if name is None or not name.startswith(old):
            raise AssertionError(f"{name} is not of block {old}")
        return f"{self.blocks}.{layer}{name.removeprefix(old)}"

    def _is_own(self, value: ir.Value, layer: int) -> bool:
        """Whether it is a weight of that block."""
        return value.is_initializer() and str(value.name).startswith(f"{self.blocks}.{layer}.")

    def _counts(self) -> Iterator[Slot]:
        """The inputs that are the block's own number.

        Raises:
            AssertionError: two inputs differ in another way.
        """
        made = set(self.latest)
        carried: dict[ir.Value, ir.Value] = {}
        for place, pair in enumerate(zip(self.before, self.pattern, strict=True)):
            inputs = zip(pair[0].inputs, pair[1].inputs, strict=True)
            for index, (old, new) in enumerate(inputs):
                if old is new or old is None or new is None:
                    fits = old is new
                elif _number(old) == TRACED - 2 and _number(new) == TRACED - 1:
                    yield place, index
                    fits = True
                elif self._is_own(new, TRACED - 1):
                    short = str(new.name).removeprefix(f"{self.blocks}.{TRACED - 1}")
                    fits = old.name == f"{self.blocks}.{TRACED - 2}{short}"
                elif new in self.twin:  # each value of a block is handed on as one of the next
                    fits = carried.setdefault(old, new) is new
                else:
                    fits = new in made and self.twin.get(old) is new
                if not fits:
                    raise AssertionError(f"{pair[1].name}: input {index} differs between blocks")


def _nodes(model: ir.Model, blocks: str, layer: int) -> Iterator[ir.Node]:
    name = f"{blocks}.{layer}"
    return (node for node in model.graph if str(node.name).startswith((f"{name}.", f"{name}/")))


def _outputs(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    return [value for node in nodes for value in node.outputs]


def _kind(node: ir.Node) -> tuple[object, ...]:
    """What two nodes must have in common to be one node of a block."""
    attributes = sorted((name, str(attribute)) for name, attribute in node.attributes.items())
    return node.domain, node.op_type, len(node.inputs), len(node.outputs), tuple(attributes)


def _number(value: ir.Value) -> int | None:
    """The integer in a constant of one element."""
    tensor = value.const_value
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size != 1:
        return None
    return int(tensor.numpy().item()) if tensor.dtype.is_integer() else None
