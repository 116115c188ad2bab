"""Which engines a bundle lacks, and why: each is wanted by its key."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ltx_engines import cache_key, engine_entry, hashes
from ltx_engines.bundle import Bundle, EngineEntry
from ltx_engines.cache_key import EngineKey, Part
from ltx_engines.errors import UserError
from ltx_export import axes, block_groups, build, engine_profiles, engine_refusals, refittable
from ltx_export.block_groups import STAGE, Room
from ltx_export.engine_order import Order, cards
from ltx_export.engine_profiles import Buckets

RECIPE = 3
"""To be raised when build.py makes other engines of the same job, or split.py other graphs.

2: those of TensorRT-RTX ask for no memory while they run, unless they stream weights.
3: the activations are those of the largest profile, no longer those of the last."""


AS_INPUTS = "weights as inputs"
"""An option in the key of engines that hold no weights."""


@dataclass(frozen=True, slots=True)
class Work:
    """An engine that is to be built, the reasons, and those that go when its chain is complete."""

    key: EngineKey
    reasons: tuple[str, ...]
    old: tuple[EngineEntry, ...] = ()

    @property
    def what(self) -> str:
        """The stage, and which part of it."""
        part = self.key.part
        return self.key.stage + (f" {part.index + 1} of {part.of}" if part else "")

    @property
    def name(self) -> str:
        """Of its files, without their ends."""
        digest = hashlib.sha256(self.key.model_dump_json().encode()).hexdigest()[:8]
        cards = "-".join(f"sm{target}" for target in self.key.targets)
        return f"{self.what.replace(' ', '-')}.{cards}.{digest}"

    def sentence(self) -> str:
        """The same for all parts that are built for one reason."""
        return f"{self.key.stage}: {'; '.join(self.reasons)}"


def keys(opened: Bundle, stage: str, order: Order) -> tuple[EngineKey, ...]:
    """Of the engines that a stage is to have: one, or one for each part.

    Raises:
        UserError: it cannot be split as is wished.
    """
    whole = _key(opened, stage, order)
    if stage == STAGE and order.engine_weights == "inputs":
        from ltx_export import weight_input_engines  # late: it needs the graph

        return weight_input_engines.keys(opened, whole, order)
    of = _number(opened, whole, order) if stage == STAGE else 1
    if of == 1:
        return (whole,)
    layers = opened.manifest.model.num_layers
    return tuple(whole.model_copy(update={"part": p}) for p in block_groups.evenly(layers, of))


def _number(opened: Bundle, key: EngineKey, order: Order) -> int:
    """In how many parts the transformer is built."""
    layers, split = opened.manifest.model.num_layers, order.split
    if isinstance(split, int):
        if split > layers:
            raise UserError(f"--split {split}: the transformer has {layers} blocks; give fewer")
        return split
    old = [e.key for e in _ours(opened, key) if e.key.flavour == key.flavour]
    before = None
    if split is None:
        if not old or (part := old[-1].part) is None:
            return 1
        if not cache_key.difference(old[-1], key.model_copy(update={"part": part})):
            return part.of
        before = part.of  # which may be too few for what is wanted now
    memory = block_groups.room_of_host(order.host_memory)
    graph = opened.file(opened.stage(STAGE).file)
    room = Room(memory, cards(order), key.profiles)
    if before is not None and block_groups.fits(graph, layers, before, room):
        return before
    return block_groups.number(graph, layers, room)


def _key(opened: Bundle, stage: str, order: Order) -> EngineKey:
    entry, manifest = opened.stage(stage), opened.manifest
    wanted = cards(order)
    flavour = engine_refusals.flavour(wanted, order.backend)
    branches = order.branches or engine_profiles.usual_branches(manifest)
    text = engine_profiles.text_tokens(manifest)
    buckets = Buckets(
        order.shapes,
        branches,
        text,
        conditioning=order.conditioning,
        vae_tile=order.vae_tile,
        vae_stream=order.vae_stream,
        passes=order.passes,
    )
    options = {"optimization level": order.optimization_level, "workspace": order.workspace}
    options["weight streaming"] = 1 if order.weight_streaming else None
    options[refittable.OPTION] = 1 if order.refittable and stage == STAGE else None
    return EngineKey(
        stage=stage,
        graph=opened.manifest.files[entry.file].sha256 or hashes.sha256(opened.file(entry.file)),
        weights={name: manifest.files[name] for name in entry.weights},
        recipe=engine_entry.recipe(entry),
        profiles=engine_profiles.profiles(stage, manifest, buckets),
        flavour=flavour,
        version=build.version(flavour),
        targets=tuple(sorted({card.capability for card in wanted})),
        options={name: value for name, value in options.items() if value is not None}
        | {cache_key.WAY_OF_BUILDING: RECIPE},
    )


def works(opened: Bundle, wanted: Sequence[EngineKey]) -> tuple[Work, ...]:
    """What of a chain is not there; nothing if engines do what the keys say, perhaps for other GPUs
    too, and are those that each GPU runs.

    What is built takes the place of all that only its GPUs have run.
    """
    ours = _ours(opened, wanted[0])
    of_builder = [e for e in ours if e.key.flavour == wanted[0].flavour]
    kept = _kept(of_builder, wanted)
    targets = next((e.key.targets for e in kept.values()), wanted[0].targets)
    if len(kept) < len(wanted):
        old = _replaced(opened, wanted[0], targets, [*kept.values()])
        keys = [k.model_copy(update={"targets": targets}) for k in wanted if k.part not in kept]
        resumed = bool(kept)
        return tuple(Work(k, _reasons(of_builder or ours, k, resumed=resumed), old) for k in keys)
    others = [target for target in wanted[0].targets if not _is_run(opened, wanted, target)]
    old = _replaced(opened, wanted[0], others)
    return tuple(
        Work(
            key.model_copy(update={"targets": (target,)}),
            (f"SM{target} has an engine of its own, which is another",),
            old,
        )
        for target in others
        for key in wanted
    )


def _replaced(
    opened: Bundle,
    key: EngineKey,
    targets: Collection[int],
    kept: Collection[EngineEntry] = (),
) -> tuple[EngineEntry, ...]:
    """With their weights embedded or not: a GPU runs one of them."""
    return tuple(
        engine
        for engine in opened.manifest.engines
        if (engine.key.stage, engine.key.flavour) == (key.stage, key.flavour)
        and set(engine.key.targets) <= set(targets)
        and engine not in kept
    )


def _is_run(opened: Bundle, wanted: Sequence[EngineKey], target: int) -> bool:
    """Whether that is what the runtime finds for a GPU: what was built for fewer, or later, goes
    before it."""
    try:
        chain = opened.engines(wanted[0].stage, target, wanted[0].flavour)
    except UserError:
        return False
    return len(chain) == len(wanted) and not any(
        _but_targets(engine.key, key) for engine, key in zip(chain, wanted, strict=True)
    )


def _but_targets(old: EngineKey, new: EngineKey) -> list[str]:
    return cache_key.difference(old, new.model_copy(update={"targets": old.targets}))


def _kept(
    ours: Sequence[EngineEntry], wanted: Sequence[EngineKey]
) -> dict[Part | None, EngineEntry]:
    """The parts that are there already, of the chain of which most are: all for the same GPUs."""
    best: dict[Part | None, EngineEntry] = {}
    for targets in dict.fromkeys(engine.key.targets for engine in ours):
        found = {
            key.part: engine
            for key in wanted
            for engine in ours
            if engine.key.targets == targets and not cache_key.difference(engine.key, key)
        }
        best = max(best, found, key=len)
    return best


def _ours(opened: Bundle, key: EngineKey) -> list[EngineEntry]:
    """The stage's engines that have their weights in the same way."""
    kind = "inputs" if AS_INPUTS in key.options else "embedded"
    engines = opened.manifest.engines
    return [e for e in engines if e.key.stage == key.stage and e.weights == kind]


def _reasons(ours: Sequence[EngineEntry], key: EngineKey, *, resumed: bool) -> tuple[str, ...]:
    if resumed and key.part is not None:
        return (f"part {key.part.index + 1} of {key.part.of} is missing",)
    if not ours:
        return ("there is no engine yet",)
    alike = [e for e in ours if _index(e.key.part) == _index(key.part)] or ours
    reasons = min((_difference(e.key, key) for e in alike), key=len)
    for engine in alike:  # its own predecessor tells more than a neighbour for another GPU
        if engine.key.flavour == key.flavour and engine.key.targets == key.targets:
            reasons = _difference(engine.key, key)
    return tuple(reasons)


def _difference(old: EngineKey, new: EngineKey) -> list[str]:
    """With the sizes that a clip has, where they say it all, without those that follow."""
    return cache_key.difference(_rooted(old), _rooted(new)) or cache_key.difference(old, new)


def _rooted(key: EngineKey) -> EngineKey:
    profiles = tuple(
        {axis: sizes for axis, sizes in profile.items() if axes.root(axis) not in profile}
        for profile in key.profiles
    )
    return key.model_copy(update={"profiles": profiles})


def _index(part: Part | None) -> int:
    return part.index if part else 0
