"""One engine for all blocks of a kind, whose weights are given at run time (an experiment).

    transformer.onnx   prologue, then the blocks, then epilogue; weights are initializers
    -> prologue        what the blocks read, computed once a step
       block           one for each kind: blocks that differ in nothing but their weights
       epilogue        from the last block's output to the velocity

In these graphs every weight and scale is an input. A block's has its name without the block's
(`attn1.to_q.weight`), so its engine knows neither weights nor how many blocks there are: it serves
any checkpoint, LoRA and depth of that width.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ltx_engines.errors import UserError
from ltx_engines.weight_inputs import BLOCK, EPILOGUE, HIDDEN, HIDDEN_OUT, NUMBER, PROLOGUE, SKIP
from ltx_export import concrete_shapes, weight_input_products
from ltx_export.axes import EXAMPLE
from ltx_export.graphs import BLOCKS

PREFIX = f"{BLOCKS['transformer']}."
OF_BLOCK = re.compile(rf"{re.escape(PREFIX)}(\d+)([./])")

LATENTS = "latents"
"""The input of the stage that only the hidden states follow from."""

MASK = frozenset({SKIP})

UNFIT = frozenset({ir.DataType.INT4, ir.DataType.FLOAT4E2M1})
"""TensorRT has no inputs of four bits."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A graph whose weights are inputs. `weights` has the tensor of the checkpoint that each of
    these takes, with `{block}` where the block's number stands; `blocks` are those that it
    computes."""

    name: str
    model: ir.Model
    weights: Mapping[str, str]
    blocks: tuple[int, ...] = ()


@dataclass(slots=True)
class _Draft:
    """The nodes of a graph in the making; `inputs` are the values that it does not compute."""

    results: dict[ir.Value, str]
    inputs: dict[str, ir.Value] = field(default_factory=dict)
    weights: dict[str, ir.Value] = field(default_factory=dict)
    constants: dict[str, ir.Value] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)
    values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """Those of the whole graph, and what stands for them here."""
    model: ir.Model | None = None

    def close(self, whole: ir.Model) -> ir.Model:
        """The graph is complete; its values belong to it from now on."""
        if self.model is None:
            self.model = self._made(whole)
        return self.model

    def _made(self, whole: ir.Model) -> ir.Model:
        weights = [self.weights[name] for name in sorted(self.weights)]
        graph = ir.Graph(
            [*self.inputs.values(), *weights],
            [self.values[value] for value in self.results],
            nodes=self.nodes,
            initializers=list(self.constants.values()),
            opset_imports=dict(whole.graph.opset_imports),
            name=whole.graph.name,
        )
        return ir.Model(
            graph,
            ir_version=whole.ir_version,
            producer_name=whole.producer_name,
            producer_version=whole.producer_version,
        )


Axes = tuple[int | str, ...]
Known = dict[str, tuple[ir.DataType, Axes]]
"""The element types and axes of the tensors that go from one piece to another."""


def cut(whole: ir.Model) -> tuple[Piece, ...]:
    """The transformer's pieces, in order; the model stays as it is.

    Raises:
        UserError: a weight is of a type that no engine takes as an input.
        AssertionError: the graph is not one of our transformers.
    """
    _check_types(whole)
    cutter = _Cutter(whole)
    kinds: dict[bytes, tuple[_Draft, list[int]]] = {}
    for number in range(cutter.layers):
        draft = cutter.block(number)
        digest = ir.to_proto(draft.close(whole)).SerializeToString(deterministic=True)
        kinds.setdefault(digest, (draft, []))[1].append(number)
    prologue, epilogue = cutter.ends([draft for draft, _ in kinds.values()])
    known = {str(value.name): _stated(value) for value in whole.graph.inputs}
    pieces = [_finished(PROLOGUE, prologue, whole, known)]
    for index, (draft, numbers) in enumerate(kinds.values()):
        name = BLOCK if len(kinds) == 1 else f"{BLOCK}_{index}"
        rows = known | {SKIP: (known[SKIP][0], (1, "batch"))}
        pieces.append(_finished(name, draft, whole, rows, tuple(numbers)))
        known[HIDDEN_OUT] = rows[HIDDEN_OUT]
        if rows[HIDDEN_OUT] != rows[HIDDEN]:
            raise AssertionError(f"a block makes {rows[HIDDEN_OUT]} of {rows[HIDDEN]}")
    return *pieces, _finished(EPILOGUE, epilogue, whole, known)


def _check_types(whole: ir.Model) -> None:
    for name, value in whole.graph.initializers.items():
        if value.dtype in UNFIT:
            raise UserError(
                f"{name} has four bits, which no engine takes as an input; build with "
                "--engine-weights embedded, or quantize to fp8 or int8"
            )


def block_of(name: str | None) -> int | None:
    """The block of a node or of a weight."""
    found = OF_BLOCK.match(name or "")
    return int(found[1]) if found else None


def relative(name: str | None) -> str:
    """A name without its block's."""
    found = OF_BLOCK.match(name or "")
    if found is None:
        return str(name)
    rest = str(name)[found.end() :]
    return rest if found[2] == "." else f"{BLOCK}/{rest}"


class _Cutter:
    """Finds in the whole graph what belongs to a piece, and copies it."""

    def __init__(self, whole: ir.Model) -> None:
        self.whole = whole
        self.follows = _follows(whole)
        owners = {number for node in whole.graph if (number := block_of(node.name)) is not None}
        self.layers = len(owners)
        if not owners or owners != set(range(self.layers)):
            raise AssertionError(f"blocks {sorted(owners)} are not a row from 0")
        self.hidden = list(self._hidden())

    def block(self, number: int) -> _Draft:
        draft = _Draft({self.hidden[number + 1]: HIDDEN_OUT})
        _Copying(self, draft, number).run()
        return draft

    def ends(self, blocks: Collection[_Draft]) -> tuple[_Draft, _Draft]:
        """Prologue and epilogue; what both need, the prologue hands on."""
        names = {str(v.name): v for v in self.follows if block_of(str(v.name)) is None}
        read = [name for draft in blocks for name in draft.inputs if name not in (HIDDEN, SKIP)]
        results = {self.hidden[0]: HIDDEN} | {names[name]: name for name in dict.fromkeys(read)}
        cone = _ancestors(results)
        velocity = {value: str(value.name) for value in self.whole.graph.outputs}
        epilogue = _Draft(velocity)
        _Copying(self, epilogue, None, {self.hidden[-1]: HIDDEN}, cone).run()
        handed = [name for name in epilogue.inputs if name != HIDDEN]
        prologue = _Draft(results | {names[name]: name for name in handed})
        for value in [v for v in prologue.results if v.producer() is None]:
            del prologue.results[value]  # an input of the stage
        _Copying(self, prologue, None).run()
        return prologue, epilogue

    def _hidden(self) -> Iterator[ir.Value]:
        """The hidden states before each block, and behind the last."""
        first = {
            value
            for node in self._nodes(0)
            for value in node.inputs
            if value is not None and LATENTS in self.follows.get(value, ()) and _is_global(value)
        }
        last = {
            value
            for node in self._nodes(None)
            for value in node.inputs
            if value is not None and not value.is_initializer() and not _is_global(value)
        }
        if len(first) != 1 or len(last) != 1:
            raise AssertionError(f"{len(first)} tensors go into the blocks, {len(last)} come out")
        (before,), (after,) = first, last
        made = {str(v.name): v for v in self.follows}
        rest = str(after.name).removeprefix(f"{PREFIX}{self.layers - 1}")
        yield before
        yield from (made[f"{PREFIX}{number}{rest}"] for number in range(self.layers))

    def _nodes(self, number: int | None) -> Iterator[ir.Node]:
        return (node for node in self.whole.graph if block_of(node.name) == number)


@dataclass(slots=True)
class _Copying:
    """Copies what a draft's results follow from, in an order that only the graph decides.

    `given` are values that are inputs, by their names; so are those of `elsewhere`.
    """

    cutter: _Cutter
    draft: _Draft
    number: int | None
    given: dict[ir.Value, str] = field(default_factory=dict)
    elsewhere: Collection[ir.Value] = ()

    def run(self) -> None:
        if self.number is not None:
            self.given[self.cutter.hidden[self.number]] = HIDDEN
        for value, name in self.draft.results.items():
            self.value(value).name = name

    def value(self, value: ir.Value) -> ir.Value:
        done = self.draft.values
        if value not in done:
            if (name := self._as_input(value)) is not None:
                done[value] = self.draft.inputs[name] = _like(value, name)
            elif value.is_initializer():
                done[value] = self._initializer(value)
            else:
                self._node(value)
        return done[value]

    def _as_input(self, value: ir.Value) -> str | None:
        if value in self.given:
            return self.given[value]
        if value.is_initializer():
            return None
        if value.producer() is None:
            return str(value.name)
        if self.number is None:
            return str(value.name) if value in self.elsewhere else None
        if value in self.cutter.hidden:
            if value not in self.draft.results:
                raise AssertionError(f"block {self.number} reads {value.name}")
            return None
        return str(value.name) if _is_global(value) and not self._is_mask(value) else None

    def _is_mask(self, value: ir.Value) -> bool:
        """Rows for all blocks."""
        return _is_global(value) and self.cutter.follows.get(value) == MASK

    def _initializer(self, value: ir.Value) -> ir.Value:
        if not isinstance(value.const_value, ir.ExternalTensor):
            return self._constant(value, value.const_value)
        name = relative(value.name)
        known = self.draft.weights
        if name not in known:
            known[name] = _like(value, name)
            known[name].shape = value.const_value.shape
        return known[name]

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol | None) -> ir.Value:
        copy = _like(value, str(value.name))
        copy.const_value = tensor
        return self.draft.constants.setdefault(str(value.name), copy)

    def _node(self, value: ir.Value) -> None:
        node = value.producer()
        if node is None:
            raise AssertionError(f"{value.name} comes from nowhere")
        inputs = [None if v is None else self.value(v) for v in self._inputs(node)]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=relative(node.name),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = relative(old.name), old.type, old.shape
            self.draft.values[old] = new
        self.draft.nodes.append(copy)

    def _inputs(self, node: ir.Node) -> list[ir.Value | None]:
        """A block takes its row of the mask as the only one."""
        inputs = list(node.inputs)
        masks = [v for v in inputs if v is not None and self._is_mask(v)]
        if not masks or self.number is None or block_of(node.name) is None:
            return inputs
        index = inputs[1] if node.op_type == "Gather" and inputs[0] in masks else None
        tensor = None if index is None else index.const_value
        if index is None or tensor is None or (tensor.numpy() != self.number).any():
            raise AssertionError(f"{node.name} does not take the row of its block")
        row = ir.Value(name="row", type=index.type, shape=index.shape)
        row.const_value = ir.Tensor(np.zeros_like(tensor.numpy()), name="row")
        self.draft.values[row] = self.draft.constants.setdefault("row", row)
        return [inputs[0], row]


def _is_global(value: ir.Value) -> bool:
    producer = value.producer()
    return block_of(value.name if producer is None else producer.name) is None


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape)


def _follows(whole: ir.Model) -> dict[ir.Value, frozenset[str]]:
    """From which of the stage's inputs each value follows."""
    found = {value: frozenset({str(value.name)}) for value in whole.graph.inputs}
    for node in whole.graph:
        sources = (found.get(value, frozenset()) for value in node.inputs if value is not None)
        found |= dict.fromkeys(node.outputs, frozenset[str]().union(*sources))
    return found


def _ancestors(values: Collection[ir.Value]) -> set[ir.Value]:
    """These values, and those that they follow from; no inputs."""
    found: set[ir.Value] = set()
    left = list(values)
    while left:
        value = left.pop()
        producer = value.producer()
        if value not in found and producer is not None:
            found.update(producer.outputs)
            left += [source for source in producer.inputs if source is not None]
    return found


def _stated(value: ir.Value) -> tuple[ir.DataType, Axes]:
    if value.dtype is None or value.shape is None:
        raise AssertionError(f"{value.name} has no type or no shape")
    return value.dtype, tuple(a if isinstance(a, int) else str(a.value) for a in value.shape)


def _finished(
    name: str, draft: _Draft, whole: ir.Model, known: Known, blocks: tuple[int, ...] = ()
) -> Piece:
    """With types and axes at its borders; `known` gets those of its results."""
    model = draft.close(whole)
    for value in draft.inputs.values():
        dtype, axes = known[str(value.name)]
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(axes)
    walks = [concrete_shapes.walk(model, EXAMPLE | {"timesteps": n}) for n in TIMESTEPS]
    results = [_axes(*(walk.arrays[value] for walk in walks)) for value in model.graph.outputs]
    for value, array in walks[0].arrays.items():
        value.type = ir.TensorType(array.dtype)
        value.shape = value.shape or ir.Shape([None] * len(array.shape))
    weight_input_products.rewrite(model)
    for value, axes in zip(model.graph.outputs, results, strict=True):
        value.shape = ir.Shape(axes)
        known[str(value.name)] = _stated(value)
    prefix = f"{PREFIX}{NUMBER}." if blocks else ""
    return Piece(name, model, {name: prefix + name for name in sorted(draft.weights)}, blocks)


TIMESTEPS = (1, EXAMPLE["tokens"])
"""One for the clip, or one for each token."""


def _axes(one: concrete_shapes.Array, each: concrete_shapes.Array) -> Axes:
    """An axis has a name if its size is that axis's example, for either of TIMESTEPS."""
    names = {(size, size): name for name, size in EXAMPLE.items()} | {TIMESTEPS: "timesteps"}
    pairs = zip(one.shape, each.shape, strict=True)
    return tuple(names.get(pair, pair[0]) for pair in pairs)
