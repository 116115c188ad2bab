"""What invalidates an engine, with the reason in words."""

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field

from ltx_engines.file_entry import Count, FileEntry, Frozen, Sha256
from ltx_engines.targets import Flavour

Range = tuple[Count, Count, Count]
"""The smallest size of an axis, the one that kernels are chosen for, and the largest."""

Profile = dict[str, Range]
"""What an engine accepts at once: the sizes of each named axis of its stage."""


WAY_OF_BUILDING = "way of building"
"""The option that counts how often ltx-export came to make other engines of the same job."""


class Part(Frozen):
    """Which of a transformer's blocks an engine computes: `first` to `end` - 1. It is number
    `index`, from 0, in a chain `of` so many engines."""

    index: Annotated[int, Field(ge=0)]
    of: Count
    first: Annotated[int, Field(ge=0)]
    end: Count


class EngineKey(Frozen):
    """Everything that went into an engine. Two engines with one key do the same.

    `graph` is of the whole stage, also in the key of a part, which follows from it; `weights` are
    the files that it points into; `recipe` is how they are quantized;
    `targets` are compute capabilities, 89 for SM89; `options` is what else the builder was told.
    """

    stage: str
    graph: Sha256
    weights: dict[str, FileEntry]
    recipe: str | None = None
    profiles: tuple[Profile, ...]
    flavour: Flavour
    version: str
    targets: tuple[Count, ...]
    options: dict[str, int] = Field(default_factory=dict)
    part: Part | None = None


def difference(old: EngineKey, new: EngineKey) -> list[str]:
    """Why the old engine is not the new one, a sentence for each cause; nothing if it is.

    A graph and weights that changed because the recipe did are not named beside it.
    """
    if old.stage != new.stage:
        raise ValueError(f"an engine of {old.stage} is not one of {new.stage}")
    recipe = list(_recipe(old, new))
    made_of = recipe or contents(old, new.graph, new.weights)
    return [*made_of, *_building(old, new)]


def _recipe(old: EngineKey, new: EngineKey) -> Iterator[str]:
    if old.recipe != new.recipe:
        yield f"the recipe was {old.recipe or 'none'}, now it is {new.recipe or 'none'}"


def contents(old: EngineKey, graph: str | None, weights: Mapping[str, FileEntry]) -> Iterator[str]:
    """Why an engine is not one of this graph and these weights.

    A graph says where its weights are, so it has to be made again when that changes. None is the
    hash of a graph that nobody has read.
    """
    yield from (f"the weights in {name} are new" for name in weights.keys() - old.weights)
    yield from (f"{name} holds no weights now" for name in old.weights.keys() - weights)
    for name in sorted(old.weights.keys() & weights):
        if not old.weights[name].is_same(weights[name]):
            yield f"the weights in {name} changed"
    if graph is not None and old.graph != graph:
        yield "the graph changed"


def _building(old: EngineKey, new: EngineKey) -> Iterator[str]:
    yield from _parts(old.part, new.part)
    yield from _profiles(old.profiles, new.profiles)
    if old.flavour != new.flavour:
        yield f"it was built by {old.flavour}, now by {new.flavour}"
    elif old.version != new.version:
        yield f"it was built by {old.flavour} {old.version}, now by {new.version}"
    if missing := sorted(set(new.targets) - set(old.targets)):
        yield f"it is not for {targets(missing)}, only for {targets(old.targets)}"
    yield from _options(old.options, new.options)


def _parts(old: Part | None, new: Part | None) -> Iterator[str]:
    was, now = (part.of if part else 1 for part in (old, new))
    if was == 1 != now:
        yield f"it was whole, now it is split in {now}"
    elif was != now:
        yield f"it was split in {was}, now {'it is whole' if now == 1 else f'in {now}'}"
    elif old and new and old != new:
        yield f"it had {_blocks(old)}, now it has {_blocks(new)}"


def _blocks(part: Part) -> str:
    return f"blocks {part.first} to {part.end - 1}"


def targets(capabilities: tuple[int, ...] | list[int]) -> str:
    return ", ".join(f"SM{capability}" for capability in capabilities)


def _profiles(old: tuple[Profile, ...], new: tuple[Profile, ...]) -> Iterator[str]:
    if old == new:
        return
    if len(old) != len(new):
        are = "is" if len(new) == 1 else "are"
        yield f"it has {_number(len(old), 'profile')}, now there {are} {len(new)}"
        return
    for index, (before, after) in enumerate(zip(old, new, strict=True)):
        for axis in sorted(before.keys() | after.keys()):
            if before.get(axis) != after.get(axis):
                was, now = _said(before.get(axis)), _said(after.get(axis))
                yield f"profile {index} has {axis} {was}, now it is {now}"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _said(sizes: Range | None) -> str:
    if sizes is None:
        return "free"
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{sizes[0]} to {sizes[2]} for {sizes[1]}"


def _options(old: Mapping[str, int], new: Mapping[str, int]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        if name == WAY_OF_BUILDING:
            yield "this ltx-export builds it differently"
        else:
            was, now = old.get(name, "the builder's"), new.get(name, "the builder's")
            yield f"{name} was {was}, now it is {now}"
