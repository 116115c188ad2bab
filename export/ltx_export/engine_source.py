"""The graphs that engines are built of: in the bundle already, in another one, or in a checkpoint.

A bundle remembers what its graphs were made of. When that has changed they are made anew, while its
engines stay until they are found to be of other graphs.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from ltx_engines import bundle, hashes
from ltx_engines.bundle import Hashing, Manifest, StageEntry
from ltx_engines.errors import UserError
from ltx_engines.stages import OPTIONAL, SAMPLER_STEP, STAGES, STREAM
from ltx_export import __version__, engine_files, engine_numbers
from ltx_export.engine_numbers import Numbers
from ltx_export.onnx_order import Order, Reader, check_apart

MADE_OF = "graphs made of"
"""The key of Manifest.toolchain under which a bundle remembers it."""
STEP_MADE_OF = "sampler step made of"
"""And of the graph that a build adds, which is none of the graphs that were exported."""

log = logging.getLogger(__name__)


def is_bundle(path: Path) -> bool:
    return (path / bundle.MANIFEST).is_file()


def resolve(source: Path, stages: tuple[str, ...] | None) -> tuple[Path, tuple[str, ...] | None]:
    """The bundle of one of its graphs, and that graph's stage; anything else as it is.

    Raises:
        UserError: the graph is in no bundle, or another stage is asked for.
    """
    if source.suffix != ".onnx":
        return source, stages
    if not is_bundle(source.parent):
        raise UserError(
            f"{source} has no {bundle.MANIFEST} beside it, which says what its tensors and weights "
            "are; give a graph in a bundle (ltx-export onnx), or the checkpoint"
        )
    entries = bundle.read(source.parent).stages
    found = [stage for stage, entry in entries.items() if entry.file == source.name]
    if not found:
        files = ", ".join(entry.file for entry in entries.values())
        raise UserError(f"{source} is no graph of its bundle, which has {files}")
    if stages is not None and list(stages) != found:
        raise UserError(
            f"{source} is the stage {found[0]}, --stages {','.join(stages)} are others; leave out "
            "--stages, or give the bundle"
        )
    return source.parent, tuple(found)


def prepare(
    order: Order, numbers: Numbers = engine_numbers.NOTHING, reader: Reader = "builder"
) -> Iterator[str]:
    """Let `order.out` be a bundle of graphs of `order.checkpoint`, which may be a bundle too, for
    this reader.

    Raises:
        UserError, CheckpointError, OSError: something that the user can mend.
    """
    if is_bundle(order.checkpoint):
        _check_options(order)
        engine_numbers.check(numbers, order.checkpoint, bundle.read(order.checkpoint))
        if _is_same(order.checkpoint, order.out):
            _check_placement(order, ())
            return
        _check_placement(order, ("link", "copy"))
        _check_beside(order.checkpoint, order.out)
        made_of = _of_bundle(order.checkpoint)
        if not _is_made_of(order.out, made_of):
            _check_replaced(order.out, reader)
            yield f"linking {order.checkpoint.name}"
            _place(order.checkpoint, order, made_of)
        return
    order = replace(order, reader=reader)
    made_of, stages = _of_files(order, numbers), _stages(order)
    if _is_made_of(order.out, made_of):
        present = bundle.read(order.out).stages.keys()
        if present >= set(stages):
            return
        known = (*STAGES, STREAM, *OPTIONAL)
        stages = tuple(stage for stage in known if stage in {*stages, *present})
    _check_kept(order.out, stages)
    calibration = () if numbers.calibration is None else (numbers.calibration,)
    check_apart(order.out, (*order.read_by(), *calibration))
    _check_replaced(order.out, reader)
    if numbers.recipe is not None:
        if "transformer" not in stages:
            name = numbers.recipe.name
            raise UserError(f"{name} is for the transformer, which is not among --stages")
        if order.weights == "refer" and not engine_numbers.is_quantized(order.checkpoint):
            raise UserError(
                "--weights refer wants a quantized file that stays where it is; make one with "
                "ltx-export quantize, or leave --weights out"
            )
    whole = order.out.resolve()
    graphs, quantized = (whole.with_name(f".{whole.name}-{end}") for end in SCRATCH)
    _remove(graphs, quantized)  # a killed export's
    from ltx_export import onnx_bundle  # half a second: only where graphs are made

    try:
        made = yield from engine_numbers.written(numbers, order.checkpoint, quantized)
        wanted = replace(order, checkpoint=made.checkpoint, precision=made.floats)
        yield from onnx_bundle.write(replace(wanted, out=graphs, stages=stages))
        _place(graphs, replace(order, weights="link"), made_of)
    finally:
        _remove(graphs, quantized)


SCRATCH = ("graphs", "quantized")
"""Ends of the names of folders, beside the bundle's, that are there only while it is made."""


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _check_options(order: Order) -> None:
    """What a checkpoint's graphs are made of has been decided in a bundle."""
    for option, value in (
        ("--text-encoder", order.text_encoder),
        ("--upsampler", order.upsampler),
        ("--pipeline-config or --preset", order.pipeline_config),
        ("--ignore-config-key", order.ignore_config_keys or None),
    ):
        if value is not None:
            raise UserError(
                f"{order.checkpoint} has graphs already; {option} is for a checkpoint, leave it out"
            )


def _check_placement(order: Order, possible: tuple[str, ...]) -> None:
    if order.weights not in ("link", *possible):
        why = "and --out is another folder" if order.weights == "copy" else "leave it out"
        wanted = "a checkpoint" if order.weights == "refer" else "graphs that are put elsewhere"
        raise UserError(
            f"{order.checkpoint} has its weights where they are; --weights {order.weights} is for "
            f"{wanted}, {why}"
        )


def _check_beside(source: Path, out: Path) -> None:
    """One bundle in another would be no part of it, and be deleted with it."""
    one, other = (Path(os.path.realpath(path)) for path in (source, out))
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise UserError(f"--out {out} and {source} lie one in the other; choose a folder beside it")


def _check_replaced(out: Path, reader: Reader) -> None:
    """What is there may give way to graphs for this reader.

    Raises:
        UserError: it has engines of other graphs, or files that are not a bundle's.
    """
    if is_bundle(out):
        manifest = bundle.read(out)
        if reader == "onnxruntime-gpu" and manifest.engines:
            raise UserError(
                f"{out} has engines, which graphs for ONNX Runtime would make useless; choose "
                "another --out for --backend onnxruntime"
            )
        if reader == "builder" and manifest.onnxruntime:
            log.warning(
                "%s is no longer for --backend onnxruntime: its graphs give way to a builder's", out
            )
        engine_files.remove_strays(out)
    bundle.check_target(Path(os.path.realpath(out)), overwrite=True)


def _stages(order: Order) -> tuple[str, ...]:
    """As the export understands None."""
    return order.stages or (*STAGES, STREAM, *(OPTIONAL if order.upsampler else ()))


def _check_kept(out: Path, stages: tuple[str, ...]) -> None:
    """Graphs of another checkpoint, or of other options, take the place of all that are there."""
    present = bundle.read(out).stages if is_bundle(out) else {}
    if lost := [stage for stage in present if stage not in (*stages, SAMPLER_STEP)]:
        raise UserError(
            f"{out} has the stages {', '.join(lost)} too, of other files or options than these; "
            "name them among --stages with their files, or choose another --out"
        )


def _is_same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _is_made_of(out: Path, made_of: str) -> bool:
    return is_bundle(out) and bundle.read(out).toolchain.get(MADE_OF) == made_of


def _of_bundle(folder: Path) -> str:
    """Its engines, and what is made with them, are no part of its graphs."""
    manifest = bundle.read(folder)
    later = {n for e in manifest.engines for n in (e.file, e.layers)}
    later |= {e.file for stage, e in manifest.stages.items() if stage == SAMPLER_STEP}
    changes = {
        "engines": (),
        "onnxruntime": {},
        "stages": {s: entry for s, entry in manifest.stages.items() if s != SAMPLER_STEP},
        "toolchain": {n: said for n, said in manifest.toolchain.items() if n != STEP_MADE_OF},
        "files": {name: file for name, file in manifest.files.items() if name not in later},
    }
    return _digest(manifest.model_copy(update=changes).model_dump_json())


def _of_files(order: Order, numbers: Numbers) -> str:
    """The contents of the files, and every option of the export."""
    options = {name: str(value) for name, value in asdict(order).items()}
    told = {
        name: value for name, value in options.items() if name not in ("out", "overwrite", "stages")
    }
    files = [_file(file) for file in order.read_by()]
    return _digest(json.dumps([__version__, told, files, numbers.facts()]))


def _file(path: Path) -> list[object]:
    """Of a large one a sample, as in the manifest."""
    stat = path.stat()
    if stat.st_size < hashes.STAMP_FROM:
        return [path.name, hashes.sha256(path)]
    return [path.name, stat.st_size, stat.st_mtime_ns, hashes.sample(path)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _place(graphs: Path, order: Order, made_of: str) -> None:
    """A bundle of the graphs' files, and of the engines that are in its place."""
    out = order.out
    opened = bundle.open_bundle(graphs, engines=False).manifest
    old = _engines(out, opened)
    step = _step(old, opened) if old else {}
    manifest = opened.model_copy(
        update={
            "stages": opened.stages | step,
            "engines": old.engines if old else (),
            "toolchain": {**opened.toolchain, MADE_OF: made_of},
        }
    )
    built = {name for e in opened.engines for name in (e.file, e.layers)}
    wanted = {n: graphs for n in opened.files if n not in built and not os.path.isabs(n)}
    wanted |= {n: out for e in manifest.engines for n in (e.file, e.layers)}
    wanted |= {entry.file: out for entry in step.values()}
    known = {name: file.sha256 for name, file in opened.files.items() if file.sha256}
    if old:
        known |= {n: old.files[n].sha256 or "" for n, home in wanted.items() if home == out}
    with bundle.create(out, overwrite=True) as folder:
        for name, home in wanted.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copied = order.weights == "copy" and home != out
            (shutil.copyfile if copied else _link)(home / name, folder / name)
        elsewhere = {name for name in opened.files if os.path.isabs(name)}
        bundle.seal(folder, manifest, elsewhere=elsewhere, hashing=Hashing(known))


def _engines(out: Path, graphs: Manifest) -> Manifest | None:
    """The manifest in the place of a bundle that is to be, with the engines that it can keep."""
    if not is_bundle(out):
        return None
    old = bundle.read(out)
    stages = {*graphs.stages, *_step(old, graphs)}
    kept = [
        engine
        for engine in old.engines
        if engine.key.stage in stages
        and all((out / name).is_file() for name in (engine.file, engine.layers))
    ]
    return old.model_copy(update={"engines": tuple(kept)})


def _step(old: Manifest, graphs: Manifest) -> dict[str, StageEntry]:
    """The step of the sampler stays with a transformer; whether it is its own is seen by the build,
    which makes it anew if it is not."""
    entry = old.stages.get(SAMPLER_STEP)
    if entry is None or SAMPLER_STEP in graphs.stages or "transformer" not in graphs.stages:
        return {}
    return {SAMPLER_STEP: entry}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        raise UserError(
            f"cannot hard-link {source} into the bundle ({error.strerror}); use --weights copy"
        ) from None
