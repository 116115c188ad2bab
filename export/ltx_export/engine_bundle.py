"""Engines in a bundle: what is wanted, what is there already, and what is built and why.

    check(order) -> Checked      every refusal, and the reasons for each engine that is to be built
    write(checked)               builds them, one process each; what is finished stays finished

The graphs come from a bundle or, exported on the way, from a checkpoint. An engine's file has the
beginning of its key's hash in its name, so that nothing ever replaces a file that the manifest
names: files first, manifest next, then the old files go. Those of a chain go when all parts of the
new one are there.
"""

import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_dir

from ltx_engines import bundle, file_lock, hashes
from ltx_engines.bundle import Bundle, EngineEntry, FileEntry
from ltx_engines.errors import UserError
from ltx_engines.stages import SAMPLER_STEP
from ltx_export import (
    build_process,
    engine_cache,
    engine_jobs,
    engine_needs,
    engine_profiles,
    engine_refusals,
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
    """
    Raises:
        UserError: it is no bundle, or something of the order cannot be built.
    """
    opened = bundle.open_bundle(folder)
    stages = _stages(opened, order)
    if order.vae_tile is not None and not engine_profiles.VAE & set(stages):
        raise UserError("--vae-tile is for the VAE, which is not among the stages; leave it out")
    if order.split is not None and STAGE not in stages:
        raise UserError("--split is for the transformer, which is not among the stages")
    for stage in stages:
        engine_refusals.check(stage, opened.stage(stage), cards(order))
    built = stages
    if STAGE in stages:
        opened, built = _with_step(opened), (*stages, SAMPLER_STEP)
    keys = [engine_work.keys(opened, stage, order) for stage in built]
    work = tuple(work for chain in keys for work in engine_work.works(opened, chain))
    return Checked(order, opened, work, stages)


def _stages(opened: Bundle, order: Order) -> tuple[str, ...]:
    """As they were asked for, without the step that goes with the transformer."""
    for stage in order.stages or ():
        opened.stage(stage)
    known = opened.manifest.stages if order.stages is None else order.stages
    return tuple(stage for stage in known if stage != SAMPLER_STEP)


def _with_step(opened: Bundle) -> Bundle:
    """The bundle with the graph of the sampler's step, which follows from the transformer's."""
    if SAMPLER_STEP in opened.manifest.stages:
        return opened
    from ltx_export import step_graph  # late: an answer that all is up to date needs no onnx

    with _locked(opened.path):
        return step_graph.add(Bundle(opened.path, bundle.read(opened.path)))


def write(checked: Checked) -> Iterator[str]:
    """Build what is missing. Yields how far it is; each engine is in the bundle when it is built.

    Raises:
        UserError: another build is at work here, or the builder refuses.
    """
    path = checked.bundle.path
    with _alone(path) as folder:
        _remove_strays(path)
        pieces = engine_jobs.pieces(checked.bundle, checked.work, folder)
        jobs = [engine_jobs.job(w, pieces[w.name], checked.order, folder) for w in checked.work]
        engine_needs.check(jobs, ignored=checked.order.ignore_limits)
        for work, job in zip(checked.work, jobs, strict=True):
            built = yield from _built(checked, work, job)
            piece = pieces[work.name]
            counts = _judge(checked, work, job)
            if (cache := checked.order.cache) is not None:
                engine_cache.keep(cache, work.key, job, built)
            last = all(work.key.stage != other.key.stage for other in _after(checked, work))
            _place(path, _Finished(work, piece, built, counts, last), folder)
        yield "checking what was built"


def _after(checked: Checked, work: Work) -> tuple[Work, ...]:
    names = [other.name for other in checked.work]
    return checked.work[names.index(work.name) + 1 :]


def _built(checked: Checked, work: Work, job: Job) -> Generator[str, None, Built]:
    """From the cache, or by a builder."""
    cache = checked.order.cache
    if cache is not None and (kept := engine_cache.take(cache, work.key, job)) is not None:
        yield f"engine of {work.what} from {cache}"
        return kept
    return (yield from build_process.run(job, f"engine of {work.what}"))


def report(folder: Path, checked: Checked) -> Iterator[str]:
    """Of each engine that was built: its bytes, and the sum of its layer table."""
    manifest = bundle.read(folder)
    for work in checked.work:
        engine = next(engine for engine in manifest.engines if engine.key == work.key)
        size = manifest.files[engine.file].bytes / 1e6
        counts = ", ".join(f"{number} {what}" for what, number in engine.counts.items())
        yield f"{work.what}: {size:,.1f} MB; {counts}"


@dataclass(frozen=True, slots=True)
class _Finished:
    """`last` is true of the engine that completes its chain."""

    work: Work
    piece: Piece
    built: Built
    counts: dict[str, int]
    last: bool


def _judge(checked: Checked, work: Work, job: Job) -> dict[str, int]:
    """The sum of the layer table, if the engine is what was asked for."""
    table = layer_table.read(job.layers)
    wanted = engine_refusals.wanted(checked.bundle, work.key, job.graph)
    if (problems := layer_table.problems(table, wanted)) and not checked.order.allow_fallback:
        raise UserError(
            f"the engine of {work.what} is not what the recipe says: {'; '.join(problems)}; "
            "--allow-fallback accepts it"
        )
    for problem in problems:
        engine_refusals.log.warning("%s: %s", work.what, problem)
    return layer_table.counts(table, wanted)


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
        counts=finished.counts,
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
    old = work.old if finished.last else ()
    gone = {name for e in old for name in (e.file, e.layers)}
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
    folder = path.resolve().with_name(f".{path.resolve().name}{BUILDING}")
    with _locked(path):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with file_lock.alone(path) as alone:
        if not alone:
            raise UserError(f"{path} is being built by another process; wait for it")
        yield
