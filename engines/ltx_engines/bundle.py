"""A bundle is a folder and a manifest: everything a runtime needs to know about a model's engines.

    manifest.json           what is in the folder: stages, tensors, files with sizes and hashes
    transformer.onnx ...    one graph per stage; their weights are byte ranges of the files below
    CHECKPOINT.safetensors  the original checkpoint, unchanged
    text_encoder/           its config, weights and tokenizer.json

It appears in one rename when it is complete, and is opened only when every byte is as it was.
Gigabytes that were not copied need not be read for that: their size and the time of the last
change stand for them until somebody asks for their hash (`reseal`).
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from reprlib import repr as short
from stat import S_ISREG
from uuid import uuid4

from platformdirs import user_cache_dir
from pydantic import ValidationError

from ltx_engines import engine_entry, hashes, strict
from ltx_engines.defaults import Defaults as Defaults
from ltx_engines.engine_entry import EngineEntry as EngineEntry
from ltx_engines.engine_entry import TensorEntry as TensorEntry
from ltx_engines.errors import UserError, nearest
from ltx_engines.file_entry import FileEntry as FileEntry
from ltx_engines.manifest import FORMAT_VERSION as FORMAT_VERSION
from ltx_engines.manifest import OLDEST_VERSION, loose_end
from ltx_engines.manifest import Manifest as Manifest
from ltx_engines.manifest import ModelFacts as ModelFacts
from ltx_engines.manifest import NoiseBlock as NoiseBlock
from ltx_engines.manifest import Precision as Precision
from ltx_engines.manifest import QuantizationEntry as QuantizationEntry
from ltx_engines.manifest import QuantizedFormat as QuantizedFormat
from ltx_engines.manifest import SchedulerFacts as SchedulerFacts
from ltx_engines.manifest import StageEntry as StageEntry
from ltx_engines.manifest import StgMode as StgMode
from ltx_engines.manifest import TokenizerEntry as TokenizerEntry
from ltx_engines.manifest import tensor_entries as tensor_entries
from ltx_engines.manifest import tensors as tensors
from ltx_engines.targets import Flavour

MANIFEST = "manifest.json"
AGAIN = "export the bundle again (ltx-export onnx)"
BUILT_AGAIN = "build it again (ltx-export build-engine)"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bundle:
    path: Path
    manifest: Manifest

    def stage(self, name: str) -> StageEntry:
        stages = self.manifest.stages
        if name not in stages:
            present = ", ".join(sorted(stages)) or "none"
            raise UserError(f"{self.path} has no stage {name!r}, only {present}; {AGAIN}")
        return stages[name]

    def engines(
        self, stage: str, capability: int, flavour: Flavour | None = None
    ) -> tuple[EngineEntry, ...]:
        """What runs a stage on a GPU: one engine, or all of a chain in the order of their blocks.

        Raises:
            UserError: there is none, it is of other graphs or weights, or a part is missing.
        """
        self.stage(stage)
        return engine_entry.choose(self.path, self.manifest, stage, capability, flavour)

    def file(self, name: str) -> Path:
        if name not in self.manifest.files:
            hint = nearest(name, self.manifest.files)
            raise ValueError(f"{name!r} is not a file of {self.path}{hint}")
        return self.path / name


def open_bundle(path: Path, *, cache: Path | None = None, engines: bool = True) -> Bundle:
    """Read and check a bundle, with or without its engines' files. `cache` remembers large ones."""
    manifest = _read(path)
    cache = Path(user_cache_dir("ltx-trt")) if cache is None else cache
    built = {name for engine in manifest.engines for name in (engine.file, engine.layers)}
    files = {n: f for n, f in _places(path, manifest).items() if engines or n not in built}
    for name, file in files.items():  # all sizes before the first hash: they cost nothing
        _check_size(file, manifest.files[name].bytes, BUILT_AGAIN if name in built else AGAIN)
    for name, file in files.items():
        wanted = manifest.files[name].sha256
        if wanted is None:
            _check_unread(path, file, manifest.files[name])
            continue
        with _told(file):
            found = hashes.verify(file, wanted, cache)
        if found != wanted:
            raise _other_hash(file, found, wanted, BUILT_AGAIN if name in built else AGAIN)
    return Bundle(path, manifest)


def read(folder: Path) -> Manifest:
    """The manifest alone; nobody has looked whether the files are as it says.

    Raises:
        UserError: the folder is no bundle, or not one that this program reads.
    """
    return _read(folder)


@contextmanager
def create(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write and `seal` a bundle in. It takes its place on success, else vanishes."""
    target = Path(os.path.realpath(folder))
    check_target(target, overwrite=overwrite)
    temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}.partial")
    try:
        with _told(f"cannot write {folder}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        yield temporary
        if not (temporary / MANIFEST).is_file():
            raise ValueError(f"seal the bundle before create({folder}) ends")
        check_target(target, overwrite=overwrite)  # the export may have taken an hour
        with _told(f"cannot write {folder}"):
            _place(temporary, target)
    finally:
        _remove(temporary)


@dataclass(frozen=True, slots=True)
class Hashing:
    """What `seal` need not read: `known` hashes, and large files unless `everything` is wished."""

    known: Mapping[str, str] = field(default_factory=dict)
    everything: bool = False


def seal(
    folder: Path,
    manifest: Manifest,
    *,
    elsewhere: Collection[str] = (),
    hashing: Hashing = Hashing(),
) -> Manifest:
    """Write manifest.json with size and hash of every file in the folder, and of those elsewhere.

    `elsewhere` are absolute paths.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
    with _told(f"cannot seal {folder}"):
        wanted = [*(name for name in names if name != MANIFEST), *elsewhere]
        places = _places(folder, manifest.model_copy(update={"files": dict.fromkeys(wanted)}))
        files = {name: _entry(file, name, hashing) for name, file in places.items()}
        sealed = manifest.model_copy(update={"files": files})
        if problem := loose_end(sealed):
            raise ValueError(f"cannot seal {folder}: {problem}")
        _write(folder, sealed)
    return sealed


def reseal(folder: Path, *, accept_changed: bool = False) -> tuple[str, ...]:
    """Hash the files that have no hash yet; returns their names.

    `accept_changed` takes them as they are now, whatever the manifest says of them.

    Raises:
        UserError: no bundle, or a file is not the one of the manifest.
    """
    manifest = _read(folder)
    added: dict[str, FileEntry] = {}
    for name, file in _places(folder, manifest).items():
        entry = manifest.files[name]
        _check_size(file, entry.bytes)
        if entry.sha256 is None and not accept_changed:
            _check_unread(folder, file, entry)
        with _told(file):
            found = hashes.sha256(file)
        if entry.sha256 is None:
            added[name] = FileEntry(  # engines were built of what the sample stands for
                bytes=entry.bytes, sha256=found, sample=hashes.sample(file)
            )
        elif found != entry.sha256:
            raise _other_hash(file, found, entry.sha256)
    with _told(f"cannot seal {folder}"):
        _write(folder, manifest.model_copy(update={"files": {**manifest.files, **added}}))
    return tuple(added)


def update(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in the place of another; its files are there already.

    Raises:
        ValueError: it names a file that it does not describe.
        UserError: it cannot be written.
    """
    if problem := loose_end(manifest):
        raise ValueError(f"cannot update {folder}: {problem}")
    with _told(f"cannot write {folder}"):
        _write(folder, manifest)


def _write(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=2) + "\n"
    temporary = folder / f".{MANIFEST}.{uuid4().hex[:8]}"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    with _told(path):
        try:
            raw = _inside(folder, MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{folder} is not a bundle: no {MANIFEST}; make one with ltx-export onnx"
            ) from None
    try:
        data = json.loads(raw)
        text = json.dumps(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; {AGAIN}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must be a JSON object, not {short(data)}; {AGAIN}")
    _check_version(path, data.get("format_version"))
    try:  # strict in the file only: there 1 is not true and "1" is not 1
        manifest = Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        problem = strict.problem(error, data, Manifest)
    else:
        problem = loose_end(manifest)
    if problem:
        raise UserError(f"{path}: {problem}" + ("" if problem.endswith("?") else f"; {AGAIN}"))
    return manifest.model_copy(update={"format_version": FORMAT_VERSION})


def _check_version(path: Path, found: object) -> None:
    if type(found) is int and OLDEST_VERSION <= found <= FORMAT_VERSION:
        return
    newer = type(found) is int and found > FORMAT_VERSION
    raise UserError(
        f"{path} has format version {short(found)}, this program reads {FORMAT_VERSION}; "
        + ("update ltx-trt" if newer else AGAIN)
    )


def _places(folder: Path, manifest: Manifest) -> dict[str, Path]:
    """Where each file is: in the folder, or, if it holds weights, where its absolute path says."""
    weights = {manifest.checkpoint, *(w for s in manifest.stages.values() for w in s.weights)}
    return {
        name: Path(name) if name in weights and _is_elsewhere(name) else _inside(folder, name)
        for name in manifest.files
    }


def _is_elsewhere(name: str) -> bool:
    pure = PurePosixPath(name)
    return pure.is_absolute() and ".." not in pure.parts and str(pure) == name


def _inside(folder: Path, name: str) -> Path:
    """The path of a file of the bundle, which must not lead out of it."""
    pure = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and str(pure) == name != "."
    if not plain or pure.is_absolute() or ".." in pure.parts:
        raise UserError(f"{folder}: {name!r} is not a path inside the bundle; {AGAIN}")
    if not Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder)):
        raise UserError(
            f"{folder}: {name!r} is a link out of the bundle; put the file itself there"
        )
    return folder / name


def _size(file: Path, again: str = AGAIN) -> int:
    if not os.path.lexists(file):
        raise UserError(f"{file} is missing; copy it again or {again}")
    with _told(file):
        stat = file.stat()
    if not S_ISREG(stat.st_mode):
        raise UserError(f"{file} is not a regular file; {again}")
    return stat.st_size


def _check_size(file: Path, wanted: int, again: str = AGAIN) -> None:
    if (found := _size(file, again)) != wanted:
        raise UserError(
            f"{file} has {found} bytes, the manifest says {wanted}; copy it again or {again}"
        )


def _other_hash(file: Path, found: str, wanted: str, again: str = AGAIN) -> UserError:
    return UserError(
        f"{file} has sha256 {found[:12]}, the manifest says {wanted[:12]}; copy it again or {again}"
    )


def _check_unread(bundle: Path, file: Path, wanted: FileEntry) -> None:
    with _told(file):
        found, sample = file.stat().st_mtime_ns, hashes.sample(file)
    if sample != wanted.sample:
        raise UserError(f"{file} has other contents than when it was exported; {AGAIN}")
    if found != wanted.modified_ns:
        raise UserError(
            f"{file} was changed {_clock(found)}, the manifest says {_clock(wanted.modified_ns)}; "
            f"{AGAIN}, or if it is only a copy: ltx-export seal --accept-changed {bundle}"
        )


def _clock(nanoseconds: int | None) -> str:
    if nanoseconds is None:
        return "never"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9))


def _entry(file: Path, name: str, hashing: Hashing) -> FileEntry:
    size = _size(file)
    if (known := hashing.known.get(name)) is not None:
        return FileEntry(bytes=size, sha256=known)
    if size < hashes.STAMP_FROM or hashing.everything:
        return FileEntry(bytes=size, sha256=hashes.sha256(file))
    return FileEntry(bytes=size, modified_ns=file.stat().st_mtime_ns, sample=hashes.sample(file))


def check_target(target: Path, *, overwrite: bool) -> None:
    """Only nothing, an empty folder or, if so wished, a bundle and nothing else may give way."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UserError(f"{target} is not a folder; choose another place for the bundle")
    with _told(target):
        if not any(target.iterdir()):
            return
        listed = _listed(target)
        if not listed:
            raise UserError(f"{target} is neither empty nor a bundle; choose another folder")
        if not overwrite:
            raise UserError(f"{target} holds a bundle; choose another folder or pass --overwrite")
        here = (p.relative_to(target).as_posix() for p in target.rglob("*") if not p.is_dir())
        if foreign := sorted(set(here) - listed):
            raise UserError(
                f"{target} holds files that are not the bundle's ({', '.join(foreign[:3])}); "
                "move them away first"
            )


def _listed(folder: Path) -> set[str]:
    """The files of any version's bundle, its manifest included; nothing if it is no bundle."""
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
        return {MANIFEST, *data["files"]} if "format_version" in data else set()
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return set()


def _place(new: Path, target: Path) -> None:
    """POSIX renames onto nothing or an empty folder; a full one has to step aside first."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(new, target)
        return
    old = new.with_suffix(".old")
    os.replace(target, old)
    try:
        os.replace(new, target)
    finally:  # also after Ctrl-C: one of the two is in place
        if target.exists():
            _remove(old)
        else:
            os.replace(old, target)


def _remove(folder: Path) -> None:
    if not os.path.lexists(folder):  # it was never made, or it was renamed into place
        return
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("cannot remove %s: %s", folder, error)


@contextmanager
def _told(what: object) -> Iterator[None]:
    """What the operating system refuses, a user can mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}") from error
