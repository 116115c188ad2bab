"""In how many groups of blocks a transformer is built: as few as host and GPU have room for.

Only the sizes of the weights and of the activations decide, both as the plan counts them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ltx_engines import host
from ltx_engines.byte_sizes import said
from ltx_engines.cache_key import Part, Profile
from ltx_engines.errors import UserError
from ltx_engines.targets import Target

if TYPE_CHECKING:
    import onnx_ir as ir

STAGE = "transformer"

Split = int | Literal["auto"]

SHARE = 0.8
"""Of the memory that is free, what a build may take unless it is told."""


@dataclass(frozen=True, slots=True)
class Room:
    """`memory` is of the host, in bytes; None where the system does not say."""

    memory: int | None
    cards: tuple[Target, ...]
    profiles: tuple[Profile, ...]


def parse(word: str) -> Split:
    """
    Raises:
        UserError: it is neither `auto` nor a number.
    """
    if word == "auto":
        return "auto"
    if not (word.isascii() and word.isdecimal() and int(word) > 0):
        raise UserError(f"--split {word}: give auto, or in how many parts")
    return int(word)


def room_of_host(wish: int | None) -> int | None:
    free = host.free_memory()
    if wish is not None or free is None:
        return wish
    return int(SHARE * free)


def evenly(layers: int, of: int) -> tuple[Part, ...]:
    """
    Raises:
        ValueError: there are fewer blocks than parts.
    """
    if not 1 <= of <= layers:
        raise ValueError(f"{layers} blocks in {of} parts")
    ends = [index * layers // of for index in range(of + 1)]
    return tuple(
        Part(index=index, of=of, first=first, end=end)
        for index, (first, end) in enumerate(pairwise(ends))
    )


def number(graph: Path, layers: int, room: Room) -> int:
    """The fewest groups that can be built and, two at a time, run.

    Raises:
        UserError: even groups of one block cannot.
    """
    sizes = _sizes(graph, room.profiles)
    for of in range(1, layers + 1):
        if not sizes.problem(parts := evenly(layers, of), room):
            return of
    helps = "ask for a smaller clip or fewer branches"
    if sizes.of_host(parts, room):  # which no clip changes
        helps = "give more with --host-memory, or build on a machine that has more"
    raise UserError(
        f"one block in each of {layers} groups is too much: {sizes.problem(parts, room)}; {helps}, "
        "or say with --split how many groups are wanted all the same"
    )


def fits(graph: Path, layers: int, of: int, room: Room) -> bool:
    """Whether so many groups can be built and run."""
    return of <= layers and not _sizes(graph, room.profiles).problem(evenly(layers, of), room)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """In bytes: `blocks` are the weights of each, `rest` those of no block, nearly all of which the
    first part has; `kernels` is the code of the whole, `activations` are of the largest profile.
    `factor` is what a build takes for each byte of weights, beside the mapped file."""

    blocks: Mapping[int, int]
    rest: int
    kernels: int
    activations: int
    factor: float

    def problem(self, parts: Sequence[Part], room: Room) -> str:
        """What there is too little of, or an empty string."""
        return self.of_host(parts, room) or self.of_card(parts, room)

    def of_host(self, parts: Sequence[Part], room: Room) -> str:
        from ltx_export import stage_plan

        largest = max(map(self.weights, parts))
        build = stage_plan.BUILD_BASE + int(largest * (1 + self.factor))
        if room.memory is not None and build > room.memory:
            return f"a build takes {said(build)} of host memory, of {said(room.memory)}"
        return ""

    def of_card(self, parts: Sequence[Part], room: Room) -> str:
        from ltx_export import fitting

        weights = [self.weights(part) for part in parts]
        together = min(len(parts), 2)
        engines = sum(sorted(weights)[-together:]) + self.kernels * together // len(parts)
        for card in room.cards:
            if engines + self.activations > (free := card.memory - fitting.RESERVED):
                return (
                    f"the largest engines take {said(engines)} and activations "
                    f"{said(self.activations)}, of {said(free)} of {card.name}"
                )
        return ""

    def weights(self, part: Part) -> int:
        own = sum(self.blocks[block] for block in range(part.first, part.end))
        return own + (self.rest if part.index == 0 else 0)


def _sizes(graph: Path, profiles: Sequence[Profile]) -> _Sizes:
    import onnx_ir as ir

    from ltx_export import engine_needs, fitting, graph_costs, stage_plan

    model = ir.load(graph)
    blocks, rest = _weights(model)
    largest = [{axis: most for axis, (_, _, most) in profile.items()} for profile in profiles]
    costs = [graph_costs.cost(model, axes) for axes in largest]
    quantized = engine_needs.QUANTIZED & {node.op_type for node in model.graph}
    return _Sizes(
        blocks,
        rest,
        stage_plan.KERNEL_BYTES * max(len(cost.kernels) for cost in costs),
        max(fitting.working(cost) for cost in costs),
        stage_plan.BUILD_FACTOR["small" if quantized else "float"],
    )


def _weights(model: "ir.Model") -> tuple[dict[int, int], int]:
    """Of each block, and of no block."""
    from ltx_export import weights
    from ltx_export.graphs import BLOCKS

    prefix = f"{BLOCKS[STAGE]}."
    found: dict[int, int] = {}
    rest = 0
    for name in weights.names(model):
        tensor = model.graph.initializers[name].const_value
        size = 0 if tensor is None else tensor.nbytes
        if name.startswith(prefix):
            block = int(name.removeprefix(prefix).partition(".")[0])
            found[block] = found.get(block, 0) + size
        else:
            rest += size
    return found, rest
