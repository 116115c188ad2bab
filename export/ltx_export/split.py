"""A transformer as a chain of graphs of consecutive blocks, each to be an engine of its own.

    first     latents, coords, timestep, text  -> hidden states, and what all blocks share
    middle    hidden states, what they share   -> hidden states
    last      hidden states, what they share   -> velocity

They share the modulation by the noise level, the rotary tables and the projected text. What follows
from constants, weights or masks alone is not passed on but repeated in each part. No weight is
read: each part points to its own byte ranges of the files.

The hidden states before block 14 are called `hidden_states_14`, so that no two tensors of a chain
have one name, and what a part reads is what an earlier one wrote under that name.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from ltx_engines.bundle import StageEntry, TensorEntry
from ltx_engines.cache_key import Part
from ltx_export.block_groups import STAGE
from ltx_export.graphs import BLOCKS
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX

HIDDEN = "hidden_states"
PATCHES = "patchify_proj"
"""The layer that makes the first of them."""

SHARED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "modulation": ("adaln_single.linear", "timesteps"),
        "embedded_timestep": ("adaln_single.emb.timestep_embedder.linear_2", "timesteps"),
        "text_states": ("caption_projection.linear_2", "text"),
    }
)
"""What more than one part reads: the layer that makes it, and its axis between batch and width."""

POSITIONS = "coords"
ROTARY: Mapping[str, str] = MappingProxyType({"Cos": "rope_cos", "Sin": "rope_sin"})
"""What the blocks read that is made of positions alone, by the operator that made it."""

FLOAT32 = "float32"

MASKS = frozenset({"prompt_mask", "skip_layer_mask"})
"""Inputs that all parts read."""


@dataclass(frozen=True, slots=True)
class Group:
    """A part's graph, and its own table of tensors."""

    part: Part
    model: ir.Model
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


def split(model: ir.Model, entry: StageEntry, parts: Sequence[Part]) -> Iterator[Group]:
    """The parts' graphs. Values of the model are renamed, and it stays as it is otherwise.

    Raises:
        ValueError: it has not so many blocks.
        AssertionError: it is not a transformer of ours.
    """
    cuts = Cuts(model, entry)
    if wrong := [part for part in parts if part.end > len(cuts.hidden)]:
        raise ValueError(f"{wrong[0]} of {len(cuts.hidden)} blocks")
    for part in parts:
        yield cuts.group(part)


class Cuts:
    """Where a graph can be cut: `hidden` are the hidden states that block 0, 1, ... hands on."""

    def __init__(self, model: ir.Model, entry: StageEntry) -> None:
        self.model = model
        self.ends = {tensor.name: tensor for tensor in (*entry.inputs, *entry.outputs)}
        self.hidden = [nodes[-1].outputs[0] for nodes in _blocks(model)]
        self.shared = {name: _sum(model, layer) for name, (layer, _) in SHARED.items()}
        self.shared |= _rotary(model)
        for block, value in enumerate(self.hidden, start=1):
            value.name = f"{HIDDEN}_{block}"
        for name, value in self.shared.items():
            value.name = name

    def group(self, part: Part) -> Group:
        """
        Raises:
            AssertionError: a later part reads an input that is no mask.
        """
        outputs = self._outputs(part)
        if part.first == 0:
            inputs = list(self.model.graph.inputs)
        else:
            inputs = self._read(outputs, self.hidden[part.first - 1])
        extracted = ir.convenience.extract(self.model.graph, inputs, outputs)
        read, written = (tuple(map(self._entry, values)) for values in (inputs, outputs))
        _type(extracted.inputs, read)
        _type(extracted.outputs, written)
        return Group(part, ir.Model(extracted, ir_version=self.model.ir_version), read, written)

    def _outputs(self, part: Part) -> list[ir.Value]:
        if part.end == len(self.hidden):
            return list(self.model.graph.outputs)
        handed_on = self.hidden[part.end - 1]
        if part.first > 0:
            return [handed_on]
        later = self._read(self.model.graph.outputs, handed_on)
        return [handed_on, *(value for value in later if value in self.shared.values())]

    def _read(self, outputs: Iterable[ir.Value], hidden: ir.Value) -> list[ir.Value]:
        """What the outputs are made of, from these hidden states on."""
        cuts = [hidden, *self.shared.values(), *self.model.graph.inputs]
        reached = set(_ancestors(outputs, cuts))
        found = [value for value in cuts if value in reached]
        for value in found:
            if value.is_graph_input() and value.name not in MASKS:
                raise AssertionError(f"{value.name} is read behind {hidden.name}")
        return found

    def _entry(self, value: ir.Value) -> TensorEntry:
        name = str(value.name)
        if name in self.ends:
            return self.ends[name]
        layer, between = SHARED.get(name, (PATCHES, "tokens"))
        bias = self.model.graph.initializers[f"{TRANSFORMER_PREFIX}{layer}.bias"]
        if bias.shape is None or not isinstance(width := bias.shape[0], int):
            raise AssertionError(f"{bias.name} has no width")
        dtype = _dtype(value if name in ROTARY.values() else bias)
        return TensorEntry(name=name, dtype=dtype, axes=("batch", between, width))


def _type(values: Sequence[ir.Value], tensors: Sequence[TensorEntry]) -> None:
    for value, tensor in zip(values, tensors, strict=True):
        dtype = "FLOAT" if tensor.dtype == FLOAT32 else tensor.dtype.upper()
        value.type, value.shape = ir.TensorType(ir.DataType[dtype]), ir.Shape(tensor.axes)


def _dtype(value: ir.Value) -> str:
    """A file has the types of its ends only; the operators that make positions waves keep them."""
    while value.dtype is None:
        node = value.producer()
        if node is None or node.op_type == "Cast" or node.inputs[0] is None:
            raise AssertionError(f"{value.name} has no element type")
        value = node.inputs[0]
    return FLOAT32 if value.dtype == ir.DataType.FLOAT else value.dtype.name.lower()


def _blocks(model: ir.Model) -> list[list[ir.Node]]:
    """The nodes of each block."""
    found: dict[int, list[ir.Node]] = {}
    for node in model.graph:
        if (block := _block(node)) is not None:
            found.setdefault(block, []).append(node)
    return [found[block] for block in range(len(found))]


def _block(node: ir.Node | None) -> int | None:
    """The block that a node is of; None if it is of none."""
    prefix = f"{BLOCKS[STAGE]}."
    name = "" if node is None else str(node.name)
    if not name.startswith(prefix):
        return None
    return int(name.removeprefix(prefix).replace("/", ".").partition(".")[0])


def _sum(model: ir.Model, layer: str) -> ir.Value:
    """What a linear layer gives: the sum with its bias."""
    bias = model.graph.initializers.get(f"{TRANSFORMER_PREFIX}{layer}.bias")
    nodes = [] if bias is None else [use.node for use in bias.uses()]
    if [node.op_type for node in nodes] != ["Add"]:
        raise AssertionError(f"{layer} has no bias that is added once")
    return nodes[0].outputs[0]


def _rotary(model: ir.Model) -> dict[str, ir.Value]:
    found = {}
    for value in _read_by_blocks(model):
        made_of = list(_ancestors([value]))
        if [v.name for v in made_of if v.is_graph_input()] == [POSITIONS]:
            kinds = {node.op_type for v in made_of if (node := v.producer())}
            (name,) = (word for kind, word in ROTARY.items() if kind in kinds)
            found[name] = value
    if found.keys() != set(ROTARY.values()):
        raise AssertionError(f"the blocks read {sorted(found)} of the positions")
    return {name: found[name] for name in ROTARY.values()}


def _read_by_blocks(model: ir.Model) -> dict[ir.Value, None]:
    """What nodes outside of the blocks make, in the order of its use."""
    nodes = [node for node in model.graph if _block(node) is not None]
    values = (value for node in nodes for value in node.inputs if value is not None)
    return {v: None for v in values if v.producer() is not None and _block(v.producer()) is None}


def _ancestors(
    outputs: Iterable[ir.Value], cuts: Collection[ir.Value] = ()
) -> dict[ir.Value, None]:
    """The outputs and whatever they are made of, but nothing that is behind a cut."""
    found: dict[ir.Value, None] = {}
    waiting = list(outputs)
    stops = set(cuts)
    while waiting:
        value = waiting.pop()
        if value in found:
            continue
        found[value] = None
        node = value.producer()
        if node is not None and value not in stops:
            waiting += [source for source in node.inputs if source is not None]
    return found
