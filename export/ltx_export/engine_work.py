"""Which engines a bundle lacks, and why: each is wanted by its key."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ltx_engines import cache_key, hashes
from ltx_engines.bundle import Bundle, EngineEntry, StageEntry
from ltx_engines.cache_key import EngineKey, Part
from ltx_engines.errors import UserError
from ltx_export import block_groups, build, engine_profiles, engine_refusals, refittable
from ltx_export.block_groups import STAGE, Room
from ltx_export.engine_order import Order, cards
from ltx_export.engine_profiles import Buckets

RECIPE = 1
"""To be raised when build.py makes other engines of the same job, or split.py other graphs."""


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
    *_, last = [None, *(e.key for e in _ours(opened, key) if e.key.flavour == key.flavour)]
    if last is not None:
        return min(last.part.of, layers) if last.part else 1
    if split is None:
        return 1
    memory = block_groups.room_of_host(order.host_memory)
    graph = opened.file(opened.stage(STAGE).file)
    return block_groups.number(graph, layers, Room(memory, cards(order), key.profiles))


def _key(opened: Bundle, stage: str, order: Order) -> EngineKey:
    entry, manifest = opened.stage(stage), opened.manifest
    wanted = cards(order)
    flavour = engine_refusals.flavour(wanted, order.backend)
    branches = order.branches or engine_profiles.usual_branches(manifest)
    text = engine_profiles.text_tokens(manifest)
    buckets = Buckets(order.shapes, branches, text, order.per_token, order.vae_tile)
    options = {"optimization level": order.optimization_level, "workspace": order.workspace}
    options["weight streaming"] = 1 if order.weight_streaming else None
    options[refittable.OPTION] = 1 if order.refittable and stage == STAGE else None
    return EngineKey(
        stage=stage,
        graph=opened.manifest.files[entry.file].sha256 or hashes.sha256(opened.file(entry.file)),
        weights={name: manifest.files[name] for name in entry.weights},
        recipe=_recipe(entry),
        profiles=engine_profiles.profiles(stage, manifest, buckets),
        flavour=flavour,
        version=build.version(flavour),
        targets=tuple(sorted({card.capability for card in wanted})),
        options={name: value for name, value in options.items() if value is not None}
        | {"way of building": RECIPE},
    )


def _recipe(entry: StageEntry) -> str | None:
    if entry.quantization is None:
        return None
    counts = (f"{count} {form}" for form, count in sorted(entry.quantization.layers.items()))
    return f"{entry.quantization.recipe or 'without a name'} ({', '.join(counts)})"


def works(opened: Bundle, wanted: Sequence[EngineKey]) -> tuple[Work, ...]:
    """What of a chain is not there; nothing if engines do what the keys say, perhaps for other GPUs
    too."""
    ours = _ours(opened, wanted[0])
    of_builder = [e for e in ours if e.key.flavour == wanted[0].flavour]
    kept = _kept(of_builder, wanted)
    targets = next((e.key.targets for e in kept.values()), wanted[0].targets)
    keys = [key.model_copy(update={"targets": targets}) for key in wanted if key.part not in kept]
    old = tuple(
        engine
        for engine in of_builder
        if set(engine.key.targets) <= set(targets) and engine not in kept.values()
    )
    return tuple(Work(k, _reasons(of_builder or ours, k, resumed=bool(kept)), old) for k in keys)


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
    reasons = min((cache_key.difference(e.key, key) for e in alike), key=len)
    for engine in alike:  # its own predecessor tells more than a neighbour for another GPU
        if engine.key.flavour == key.flavour and engine.key.targets == key.targets:
            reasons = cache_key.difference(engine.key, key)
    return tuple(reasons)


def _index(part: Part | None) -> int:
    return part.index if part else 0
