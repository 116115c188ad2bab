"""Engines in a bundle: what is wanted, what is there already, and what is built and why.

    check(order) -> Checked      every refusal, and the reasons for each engine that is to be built
    write(checked)               builds them, one process each; what is finished stays finished

The graphs come from a bundle or, exported on the way, from a checkpoint. An engine's file has the
beginning of its key's hash in its name, so that nothing ever replaces a file that the manifest
names: files first, manifest next, then the old files go. Those of a chain go when all parts of the
new one are there.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from platformdirs import user_cache_dir

from ltx_engines import bundle, cache_key, engine_entry, hashes
from ltx_engines.bundle import Bundle, EngineEntry, FileEntry, Manifest
from ltx_engines.errors import UserError
from ltx_engines.stages import DECODERS, SAMPLER_STEP, sampler_step
from ltx_export import (
    build_process,
    engine_cache,
    engine_files,
    engine_jobs,
    engine_needs,
    engine_refusals,
    engine_source,
    engine_stages,
    engine_work,
    known_bad,
    layer_table,
    refittable,
)
from ltx_export.block_groups import STAGE
from ltx_export.build_job import Built, Job
from ltx_export.engine_jobs import Piece
from ltx_export.engine_order import Order as Order
from ltx_export.engine_order import cards
from ltx_export.engine_order import check_early as check_early
from ltx_export.engine_work import Work

BUILDING = "-building"
"""End of the name of the folder, beside the bundle's, in which engines are written."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checked:
    """`stages` are those that were asked for."""

    order: Order
    bundle: Bundle
    work: tuple[Work, ...]
    stages: tuple[str, ...]

    def reasons(self) -> tuple[str, ...]:
        """A sentence for each stage, or for each part where they differ."""
        return tuple(dict.fromkeys(work.sentence() for work in self.work))

    def warnings(self) -> tuple[str, ...]:
        """What is known against the work, each once."""
        said = (
            sentence
            for work in self.work
            for sentence in known_bad.sentences(
                work.key, tuple(engine_refusals.precisions(self.bundle.stage(work.key.stage)))
            )
        )
        return tuple(dict.fromkeys(said))

    def built(self) -> str:
        """The stages that there is work for."""
        return ", ".join(dict.fromkeys(work.key.stage for work in self.work))


def check(folder: Path, order: Order) -> Checked:
    """Engines whose files are not as the manifest says are left out of the bundle on the way.

    Raises:
        UserError: it is no bundle, or something of the order cannot be built.
    """
    opened = bundle.open_bundle(folder, engines=False)
    stages = engine_stages.of(opened, order)
    engine_stages.check_vae(stages, order)
    if order.split is not None and STAGE not in stages:
        raise UserError("--split is for the transformer, which is not among the stages")
    if order.engine_weights == "inputs" and STAGE not in stages:
        raise UserError("--engine-weights is for the transformer, which is not among the stages")
    if order.refittable and STAGE not in stages:
        raise UserError("--refittable is for the transformer, which is not among the stages")
    for stage in stages:
        entry, fallback = opened.stage(stage), order.allow_fallback
        engine_refusals.check(stage, entry, cards(order), fallback=fallback)
    opened, lost = _without_harmed(opened)
    built = stages
    if STAGE in stages:
        opened, built = _with_step(opened), (*stages, SAMPLER_STEP)
    keys = [engine_work.keys(opened, stage, order) for stage in built]
    if not order.allow_fallback:
        engine_refusals.check_kept(opened, [key for chain in keys for key in chain])
    work = tuple(work for chain in keys for work in engine_work.works(opened, chain))
    return Checked(order, opened, _with_harm(work, lost), stages)


@dataclass(frozen=True, slots=True)
class _Lost:
    engine: EngineEntry
    reason: str


def _without_harmed(opened: Bundle) -> tuple[Bundle, tuple[_Lost, ...]]:
    """What is left of the engines: the others are built again when they are wanted."""
    engines = opened.manifest.engines
    said = [_Lost(engine, engine_files.harm(opened, engine)) for engine in engines]
    lost = tuple(one for one in said if one.reason)
    if not lost:
        return opened, ()
    for one in lost:
        log.warning("%s is left out: %s", one.engine.file, one.reason)
    gone = {name for one in lost for name in (one.engine.file, one.engine.layers)}
    manifest = _without(opened.manifest, gone)
    bundle.update(opened.path, manifest)
    engine_files.remove_strays(opened.path)
    return Bundle(opened.path, manifest), lost


def _without(manifest: Manifest, gone: Collection[str]) -> Manifest:
    """Without these files of engines."""
    files = {name: file for name, file in manifest.files.items() if name not in gone}
    engines = tuple(engine for engine in manifest.engines if engine.file not in gone)
    return manifest.model_copy(update={"files": files, "engines": engines})


def _with_harm(works: Sequence[Work], lost: Sequence[_Lost]) -> tuple[Work, ...]:
    """An engine that would be there but for its files says so."""
    why = []
    for work in works:
        same = (
            one.reason
            for one in lost
            if one.engine.key.stage == work.key.stage
            and one.engine.key.part == work.key.part
            and not cache_key.difference(one.engine.key, work.key)
        )
        reason = next(same, None)
        why.append(work if reason is None else replace(work, reasons=(reason,)))
    return tuple(why)


def _with_step(opened: Bundle) -> Bundle:
    """The bundle with the graph of the sampler's step, which follows from the transformer's."""
    made_of = _step_made_of(opened)
    present = SAMPLER_STEP in opened.manifest.stages
    if present and opened.manifest.toolchain.get(engine_source.STEP_MADE_OF) == made_of:
        return opened
    from ltx_export import step_graph  # late: an answer that all is up to date needs no onnx

    added = step_graph.add(opened).manifest
    toolchain = {**added.toolchain, engine_source.STEP_MADE_OF: made_of}
    manifest = added.model_copy(update={"toolchain": toolchain})
    bundle.update(opened.path, manifest)
    return Bundle(opened.path, manifest)


def _step_made_of(opened: Bundle) -> str:
    """Of the text that makes it, and of the transformer that it goes with."""
    text = Path(__file__).with_name("step_graph.py").read_bytes()
    transformer = opened.stage(STAGE)
    tables = [tensor.model_dump_json() for tensor in (*transformer.inputs, *transformer.outputs)]
    facts = repr((sampler_step(1), transformer.opset, tables)).encode()
    return hashlib.sha256(text + facts).hexdigest()[:16]


def write(checked: Checked) -> Iterator[str]:
    """Build what is missing. Yields how far it is; each engine is in the bundle when it is built.

    Raises:
        UserError: the machine is too small, or the builder refuses.
    """
    path = checked.bundle.path
    with _scratch(path) as folder:
        engine_files.remove_strays(path)
        pieces = engine_jobs.pieces(checked.bundle, checked.work, folder)
        jobs = [engine_jobs.job(w, pieces[w.name], checked.order, folder) for w in checked.work]
        cached = _cached(checked, jobs)
        missing = [job for job in jobs if job.engine not in cached]
        _check_volumes(checked)
        engine_needs.check(missing, ignored=checked.order.ignore_limits)
        for work, job in zip(checked.work, jobs, strict=True):
            built = yield from _built(checked, work, job, cached.get(job.engine))
            piece = pieces[work.name]
            judged = _judge(checked, work, job)
            last = all(work.key.stage != other.key.stage for other in _after(checked, work))
            _place(path, _Finished(work, piece, built, judged, last), folder)
            if (cache := checked.order.cache) is not None:
                engine, layers = path / job.engine.name, path / job.layers.name
                placed = replace(job, engine=engine, layers=layers)
                engine_cache.keep(cache, work.key, placed, built)
        yield "checking what was built"


def _check_volumes(checked: Checked) -> None:
    from ltx_export import engine_volumes  # late, as all that needs onnx

    engine_volumes.check(checked.bundle, [work.key for work in checked.work], checked.order)


def _cached(checked: Checked, jobs: Sequence[Job]) -> dict[Path, Built]:
    """What the cache has, linked to where the jobs would write it."""
    cache = checked.order.cache
    if cache is None:
        return {}
    engine_cache.check(cache)
    found = {
        job.engine: engine_cache.take(cache, work.key, job)
        for work, job in zip(checked.work, jobs, strict=True)
    }
    return {engine: built for engine, built in found.items() if built is not None}


def _after(checked: Checked, work: Work) -> tuple[Work, ...]:
    names = [other.name for other in checked.work]
    return checked.work[names.index(work.name) + 1 :]


def _built(
    checked: Checked, work: Work, job: Job, kept: Built | None
) -> Generator[str, None, Built]:
    """From the cache, or by a builder."""
    if kept is not None:
        yield f"engine of {work.what} from {checked.order.cache}"
        return kept
    return (yield from build_process.run(job, f"engine of {work.what}"))


def report(folder: Path, checked: Checked) -> Iterator[str]:
    """Of each engine that was built: its bytes, and the sum of its layer table."""
    manifest = bundle.read(folder)
    for work in checked.work:
        engine = next(engine for engine in manifest.engines if engine.key == work.key)
        size = manifest.files[engine.file].bytes / 1e6
        counts = ", ".join(f"{number} {what}" for what, number in engine.counts.items())
        yield f"{work.what}: {size:,.1f} MB; {counts}{layer_table.of_one(engine.key.targets)}"


@dataclass(frozen=True, slots=True)
class _Finished:
    """`last` is true of the engine that completes its chain."""

    work: Work
    piece: Piece
    built: Built
    judged: "_Judged"
    last: bool


@dataclass(frozen=True, slots=True)
class _Judged:
    """The sum of a layer table, and what in it is not as it was asked for."""

    counts: dict[str, int]
    accepted: tuple[str, ...]


def _judge(checked: Checked, work: Work, job: Job) -> _Judged:
    """
    Raises:
        UserError: the engine is not what was asked for, and that is not to be accepted.
    """
    table = layer_table.read(job.layers)
    wanted = engine_refusals.wanted(checked.bundle, work.key, job.graph)
    problems = tuple(layer_table.problems(table, wanted))
    if problems and not checked.order.allow_fallback:
        raise UserError(engine_refusals.not_as_asked(work.what, problems))
    for problem in problems:
        engine_refusals.log.warning("%s: %s", work.what, problem)
    return _Judged(layer_table.counts(table, wanted), problems)


def _place(path: Path, finished: _Finished, folder: Path) -> None:
    """Files first, then the manifest that names them, then nothing is left that it does not."""
    work, built = finished.work, finished.built
    names = engine, layers = f"{work.name}.engine", f"{work.name}.layers.json"
    for name in names:
        os.replace(folder / name, path / name)
    entry = EngineEntry(
        file=engine,
        layers=layers,
        key=work.key,
        inputs=finished.piece.entry.inputs,
        outputs=finished.piece.entry.outputs,
        activations=built.activations,
        counts=finished.judged.counts,
        counted=layer_table.listed(work.key.targets),
        accepted=finished.judged.accepted,
        refittable=refittable.OPTION in work.key.options,
        weights="inputs" if finished.piece.bound else "embedded",
        bound=dict(finished.piece.bound),
        blocks=finished.piece.blocks,
    )
    files = {
        engine: FileEntry(bytes=built.bytes, sha256=built.sha256),
        layers: FileEntry(
            bytes=(path / layers).stat().st_size, sha256=hashes.sha256(path / layers)
        ),
    }
    manifest = bundle.read(path)  # an earlier engine of this run is in it
    old = (*work.old, *_useless(manifest, work)) if finished.last else ()
    kept = _without(manifest, {engine, *(name for e in old for name in (e.file, e.layers))})
    bundle.update(
        path,
        kept.model_copy(update={"files": kept.files | files, "engines": (*kept.engines, entry)}),
    )
    hashes.remember(path / engine, built.sha256, Path(user_cache_dir("ltx-trt")))
    engine_files.remove_strays(path)


def _useless(manifest: Manifest, work: Work) -> Iterator[EngineEntry]:
    """Engines of the stage, for other GPUs too, that nothing runs: of other graphs or weights. A
    decoder takes the place of the other one."""
    stage = work.key.stage
    stages = DECODERS if stage in DECODERS else (stage,)
    for engine in manifest.engines:
        if engine.key.stage not in stages or engine in work.old:
            continue
        if why := engine_entry.stale(manifest, engine):
            log.warning("%s is deleted: %s since it was built", engine.file, why)
            yield engine


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """An empty folder in one beside the bundle, for the one process that builds there
    (`file_lock.building`). Its name is its own: a builder of a process that was killed may still be
    about to write, and then finds its folder gone."""
    folder = path.resolve().with_name(f".{path.resolve().name}{BUILDING}")
    shutil.rmtree(folder, ignore_errors=True)
    own = folder / uuid4().hex[:8]
    own.mkdir(parents=True)
    try:
        yield own
    finally:
        shutil.rmtree(folder)
