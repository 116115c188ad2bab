"""What invalidates an engine, with the reason in words."""

from collections.abc import Iterator, Mapping

from pydantic import Field

from ltx_engines.file_entry import Count, FileEntry, Frozen, Sha256
from ltx_engines.targets import Flavour

Range = tuple[Count, Count, Count]
"""The smallest size of an axis, the one that kernels are chosen for, and the largest."""

Profile = dict[str, Range]
"""What an engine accepts at once: the sizes of each named axis of its stage."""


class EngineKey(Frozen):
    """Everything that went into an engine. Two engines with one key do the same.

    `weights` are the files that the graph points into; `recipe` is how they are quantized;
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


def difference(old: EngineKey, new: EngineKey) -> list[str]:
    """Why the old engine is not the new one, a sentence for each cause; nothing if it is.

    A graph and weights that changed because the recipe did are not named beside it.
    """
    if old.stage != new.stage:
        raise ValueError(f"an engine of {old.stage} is not one of {new.stage}")
    recipe = list(_recipe(old, new))
    return [*(recipe or _contents(old, new)), *_building(old, new)]


def _recipe(old: EngineKey, new: EngineKey) -> Iterator[str]:
    if old.recipe != new.recipe:
        yield f"the recipe was {old.recipe or 'none'}, now it is {new.recipe or 'none'}"


def _contents(old: EngineKey, new: EngineKey) -> Iterator[str]:
    """A graph says where its weights are, so it has to be made again when that changes."""
    yield from (f"the weights in {name} are new" for name in new.weights.keys() - old.weights)
    yield from (f"{name} holds no weights now" for name in old.weights.keys() - new.weights)
    for name in sorted(old.weights.keys() & new.weights):
        if not old.weights[name].is_same(new.weights[name]):
            yield f"the weights in {name} changed"
    if old.graph != new.graph:
        yield "the graph changed"


def _building(old: EngineKey, new: EngineKey) -> Iterator[str]:
    yield from _profiles(old.profiles, new.profiles)
    if old.flavour != new.flavour:
        yield f"it was built by {old.flavour}, now by {new.flavour}"
    elif old.version != new.version:
        yield f"it was built by {old.flavour} {old.version}, now by {new.version}"
    if missing := sorted(set(new.targets) - set(old.targets)):
        yield f"it is not for {targets(missing)}, only for {targets(old.targets)}"
    yield from _options(old.options, new.options)


def targets(capabilities: tuple[int, ...] | list[int]) -> str:
    return ", ".join(f"SM{capability}" for capability in capabilities)


def _profiles(old: tuple[Profile, ...], new: tuple[Profile, ...]) -> Iterator[str]:
    if old == new:
        return
    if len(old) != len(new):
        yield f"it has {len(old)} profiles, now there are {len(new)}"
        return
    for index, (before, after) in enumerate(zip(old, new, strict=True)):
        for axis in sorted(before.keys() | after.keys()):
            if before.get(axis) != after.get(axis):
                was, now = _said(before.get(axis)), _said(after.get(axis))
                yield f"profile {index} has {axis} {was}, now it is {now}"


def _said(sizes: Range | None) -> str:
    if sizes is None:
        return "free"
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{sizes[0]} to {sizes[2]} for {sizes[1]}"


def _options(old: Mapping[str, int], new: Mapping[str, int]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            was, now = old.get(name, "the builder's"), new.get(name, "the builder's")
            yield f"{name} was {was}, now it is {now}"
