"""What must be true of a model that Triton's own TensorRT backend runs, by the bundle's engines.

The core accepts any profile, graph and file; the backend refuses them when the server is started.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ltx_engines import hashes
from ltx_engines.cache_key import Profile
from ltx_engines.engine_entry import EngineEntry
from ltx_engines.manifest import Manifest
from ltx_export.triton.config_rules import Model

Engines = Mapping[Path, EngineEntry | None]
"""Which of the bundle's engines a file is."""


def engines(plans: Iterable[Path], manifest: Manifest) -> Engines:
    by_hash = {manifest.files[engine.file].sha256: engine for engine in manifest.engines}
    return {plan: by_hash.get(hashes.sha256(plan)) for plan in plans}


def problem(model: Model, found: Engines) -> str:
    """The first that is wrong, or an empty string."""
    return next(_problems(model, found), "")


def _problems(model: Model, found: Engines) -> Iterator[str]:
    known: dict[str, EngineEntry] = {}
    for plan, engine in found.items():
        if engine is None:
            yield f"{plan.name} is not one of the bundle's engines"
            return
        if engine.key.flavour != "tensorrt":
            yield f"{plan.name} is of {engine.key.flavour}, which Triton's own backend cannot load"
        if engine.key.stage != model.name:
            yield f"{plan.name} is an engine of {engine.key.stage}"
        if engine.key.part is not None or engine.weights == "inputs":
            yield f"{plan.name} is a part of {engine.key.stage}; only a whole stage is a model"
        known[plan.name] = engine
    yield from _cards(model, known)
    yield from _alike(known)
    yield from _sizes(model, next(iter(known.values())))


def _cards(model: Model, known: Mapping[str, EngineEntry]) -> Iterator[str]:
    """Capability 8.9 gets a file that was built for it."""
    for capability, name in model.config.cc_model_filenames.items():
        engine = known.get(name)
        if engine is not None and int(capability.replace(".", "")) not in engine.key.targets:
            targets = ", ".join(map(str, engine.key.targets))
            yield f"{name} is for {capability}, it was built for {targets}"


def _alike(known: Mapping[str, EngineEntry]) -> Iterator[str]:
    """One configuration is said of all files."""
    (name, first), *others = known.items()
    for other, engine in others:
        same = (engine.inputs, engine.outputs, engine.key.profiles)
        if same != (first.inputs, first.outputs, first.key.profiles):
            yield f"{other} has other tensors or profiles than {name}"


def _sizes(model: Model, engine: EngineEntry) -> Iterator[str]:
    count = len(engine.key.profiles)
    for group in model.config.instance_group:
        for number in group.profile:
            if number.isdecimal() and int(number) >= count:
                yield f"profile {number} is not there, the engine has {count}"
    shapes = [
        ("a CUDA graph", {name: list(row.dim) for name, row in spec.input.items()})
        for spec in model.config.optimization.cuda.graph_spec
    ]
    shapes += [
        (f"warm-up {sample.name!r}", {name: list(row.dims) for name, row in sample.inputs.items()})
        for sample in model.config.model_warmup
    ]
    for what, sizes in shapes:
        if not any(_fits(engine, profile, sizes) for profile in engine.key.profiles):
            yield f"{what} is of sizes that no profile takes"


def _fits(engine: EngineEntry, profile: Profile, sizes: Mapping[str, list[int]]) -> bool:
    """An axis that no profile names is free."""
    for tensor in engine.inputs:
        found = sizes.get(tensor.name, [])
        if len(found) != len(tensor.axes):
            return False
        for axis, size in zip(tensor.axes, found, strict=True):
            if isinstance(axis, int):
                least = most = axis
            else:
                least, _, most = profile.get(axis, (1, 1, size))
            if not least <= size <= most:
                return False
    return True
