"""Engines in a bundle: what is wanted, what is there already, and what is built and why.

    check(order) -> Checked      every refusal, and the reasons for each engine that is to be built
    write(checked)               builds them, one process each; what is finished stays finished

The graphs come from a bundle or, exported on the way, from a checkpoint. An engine's file has the
beginning of its key's hash in its name, so that nothing ever replaces a file that the manifest
names: files first, manifest next, then the old files go.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_dir

from ltx_engines import bundle, cache_key, hashes, targets
from ltx_engines.bundle import Bundle, EngineEntry, FileEntry, StageEntry
from ltx_engines.cache_key import EngineKey
from ltx_engines.errors import UserError
from ltx_engines.targets import Flavour, Target
from ltx_export import build, build_process, engine_profiles, engine_refusals, layer_table
from ltx_export.build import Built, Job
from ltx_export.engine_profiles import Buckets

BUILDING = "-building"
"""End of the name of the folder, beside the bundle's, in which engines are written."""

RECIPE = 1
"""To be raised when build.py makes other engines of the same job."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for. None leaves a choice to the bundle or to the builder."""

    gpus: tuple[str, ...]
    shapes: tuple[str, ...]
    stages: tuple[str, ...] | None = None
    backend: Flavour | None = None
    branches: int | None = None
    per_token: bool = False
    optimization_level: int | None = None
    workspace: int | None = None
    allow_fallback: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """An engine that is to be built, the reasons, and those in whose place it comes."""

    key: EngineKey
    reasons: tuple[str, ...]
    old: tuple[EngineEntry, ...] = ()

    @property
    def name(self) -> str:
        """Of its files, without their ends."""
        digest = hashlib.sha256(self.key.model_dump_json().encode()).hexdigest()[:8]
        cards = "-".join(f"sm{target}" for target in self.key.targets)
        return f"{self.key.stage}.{cards}.{digest}"

    def sentence(self) -> str:
        return f"{self.key.stage}: {'; '.join(self.reasons)}"


@dataclass(frozen=True, slots=True)
class Checked:
    order: Order
    bundle: Bundle
    work: tuple[Work, ...]
    stages: tuple[str, ...]


def check_early(order: Order) -> None:
    """What is wrong with an order whatever the model.

    Raises:
        UserError: a GPU or a clip that there is not, or no builder for them.
    """
    build.version(engine_refusals.flavour(_cards(order), order.backend))
    for word in order.shapes:
        engine_profiles.ends(word)


def check(folder: Path, order: Order) -> Checked:
    """
    Raises:
        UserError: it is no bundle, or something of the order cannot be built.
    """
    opened = bundle.open_bundle(folder)
    stages = _stages(opened, order)
    cards = _cards(order)
    flavour = engine_refusals.flavour(cards, order.backend)
    for stage in stages:
        engine_refusals.check(stage, opened.stage(stage), cards)
    keys = [_key(opened, stage, order, flavour, cards) for stage in stages]
    work = tuple(w for key in keys if (w := _work(opened, key)) is not None)
    return Checked(order, opened, work, stages)


def _stages(opened: Bundle, order: Order) -> tuple[str, ...]:
    known = tuple(opened.manifest.stages)
    for stage in order.stages or ():
        opened.stage(stage)
    return known if order.stages is None else order.stages


def _cards(order: Order) -> tuple[Target, ...]:
    if not order.gpus:
        raise UserError("an engine is for a GPU; give --gpu rtx4090, --gpu sm89, ...")
    return tuple(map(targets.find, order.gpus))


def _key(
    opened: Bundle, stage: str, order: Order, flavour: Flavour, cards: tuple[Target, ...]
) -> EngineKey:
    entry, manifest = opened.stage(stage), opened.manifest
    branches = order.branches or engine_profiles.usual_branches(manifest)
    text = engine_profiles.text_tokens(manifest)
    buckets = Buckets(order.shapes, branches, text, order.per_token)
    options = {"optimization level": order.optimization_level, "workspace": order.workspace}
    return EngineKey(
        stage=stage,
        graph=opened.manifest.files[entry.file].sha256 or hashes.sha256(opened.file(entry.file)),
        weights={name: manifest.files[name] for name in entry.weights},
        recipe=_recipe(entry),
        profiles=engine_profiles.profiles(stage, manifest, buckets),
        flavour=flavour,
        version=build.version(flavour),
        targets=tuple(sorted({card.capability for card in cards})),
        options={name: value for name, value in options.items() if value is not None}
        | {"way of building": RECIPE},
    )


def _recipe(entry: StageEntry) -> str | None:
    if entry.quantization is None:
        return None
    counts = (f"{count} {form}" for form, count in sorted(entry.quantization.layers.items()))
    return f"{entry.quantization.recipe or 'without a name'} ({', '.join(counts)})"


def _work(opened: Bundle, key: EngineKey) -> Work | None:
    """None if an engine of the bundle does what the key says, perhaps for other GPUs too."""
    ours = [e for e in opened.manifest.engines if e.key.stage == key.stage]
    ours = [e for e in ours if e.key.flavour == key.flavour] or ours
    if not ours:
        return Work(key, ("there is no engine yet",))
    found = [cache_key.difference(engine.key, key) for engine in ours]
    reasons = min(found, key=len)
    if not reasons:
        return None
    old = tuple(
        engine
        for engine in ours
        if engine.key.flavour == key.flavour and set(engine.key.targets) <= set(key.targets)
    )
    for engine in old:  # its own predecessor tells more than a neighbour for another GPU
        if engine.key.targets == key.targets:
            reasons = cache_key.difference(engine.key, key)
    return Work(key, tuple(reasons), old)


def write(checked: Checked) -> Iterator[str]:
    """Build what is missing. Yields how far it is; each engine is in the bundle when it is built.

    Raises:
        UserError: another build is at work here, or the builder refuses.
    """
    path = checked.bundle.path
    with _alone(path) as folder:
        _remove_strays(path)
        for work in checked.work:
            said = f"engine of {work.key.stage}"
            built = yield from build_process.run(_job(checked, work, folder), said)
            counts = _judge(checked, work, folder)
            _place(path, work, folder, _Finished(built, counts))
        yield "checking what was built"


def report(folder: Path, checked: Checked) -> Iterator[str]:
    """Of each engine that was built: its bytes, and the sum of its layer table."""
    manifest = bundle.read(folder)
    for engine in manifest.engines:
        if engine.key in [work.key for work in checked.work]:
            size = manifest.files[engine.file].bytes / 1e6
            counts = ", ".join(f"{number} {what}" for what, number in engine.counts.items())
            yield f"{engine.key.stage}: {size:,.1f} MB; {counts}"


@dataclass(frozen=True, slots=True)
class _Finished:
    built: Built
    counts: dict[str, int]


def _job(checked: Checked, work: Work, folder: Path) -> Job:
    key, entry = work.key, checked.bundle.stage(work.key.stage)
    return Job(
        graph=checked.bundle.file(entry.file),
        engine=folder / f"{work.name}.engine",
        layers=folder / f"{work.name}.layers.json",
        flavour=key.flavour,
        version=key.version,
        targets=key.targets,
        profiles=tuple(engine_profiles.shapes(entry, profile) for profile in key.profiles),
        types={tensor.name: tensor.dtype for tensor in (*entry.inputs, *entry.outputs)},
        weights=_elsewhere(entry),
        optimization_level=checked.order.optimization_level,
        workspace=checked.order.workspace,
    )


def _elsewhere(entry: StageEntry) -> dict[str, str]:
    """What the graph calls the files that a parser would not find."""
    return {Path(name).name: name for name in entry.weights if os.path.isabs(name)}


def _judge(checked: Checked, work: Work, folder: Path) -> dict[str, int]:
    """The sum of the layer table, if the engine is what was asked for."""
    table = layer_table.read(folder / f"{work.name}.layers.json")
    wanted = engine_refusals.wanted(checked.bundle, work.key)
    if (problems := layer_table.problems(table, wanted)) and not checked.order.allow_fallback:
        raise UserError(
            f"the engine of {work.key.stage} is not what the recipe says: {'; '.join(problems)}; "
            "--allow-fallback accepts it"
        )
    for problem in problems:
        engine_refusals.log.warning("%s: %s", work.key.stage, problem)
    return layer_table.counts(table, wanted)


def _place(path: Path, work: Work, folder: Path, finished: _Finished) -> None:
    """Files first, then the manifest that names them, then nothing is left that it does not."""
    names = f"{work.name}.engine", f"{work.name}.layers.json"
    for name in names:
        os.replace(folder / name, path / name)
    built, engine, layers = finished.built, *names
    entry = EngineEntry(file=engine, layers=layers, key=work.key, counts=finished.counts)
    files = {
        engine: FileEntry(bytes=built.bytes, sha256=built.sha256),
        layers: FileEntry(
            bytes=(path / layers).stat().st_size, sha256=hashes.sha256(path / layers)
        ),
    }
    manifest = bundle.read(path)  # an earlier engine of this run is in it
    gone = {name for engine in work.old for name in (engine.file, engine.layers)}
    kept = {name: file for name, file in manifest.files.items() if name not in gone}
    engines = [e for e in manifest.engines if e.file not in gone]
    bundle.update(
        path,
        manifest.model_copy(update={"files": kept | files, "engines": (*engines, entry)}),
    )
    hashes.remember(path / engine, built.sha256, Path(user_cache_dir("ltx-trt")))
    _remove_strays(path)


def _remove_strays(path: Path) -> None:
    """Engines that a killed build has left, and those that were replaced."""
    manifest = bundle.read(path)
    for end in ("*.engine", "*.layers.json"):
        for file in path.glob(end):
            if file.name not in manifest.files:
                file.unlink()


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """An empty folder beside the bundle, for the one process that builds there."""
    handle = os.open(path, os.O_RDONLY)
    folder = path.resolve().with_name(f".{path.resolve().name}{BUILDING}")
    try:
        try:  # the kernel gives it back, however the process ends
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is being built by another process; wait for it") from None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
    finally:
        os.close(handle)
