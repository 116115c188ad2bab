"""Converted and fused weights are kept, so that the second export of the same is a hard link.

They lie in `derived/` of the user's cache folder (`~/.cache/ltx-trt` on Linux), under a name that
is a hash of everything they were made from: path, size and time of each file, element type,
strengths. `clear` frees them, and so does deleting the folder; bundles that link to them stay
whole, and the disk gets the space back when the last of these is deleted too.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from platformdirs import user_cache_dir

from ltx_engines import hashes
from ltx_engines.errors import UserError
from ltx_export import derive
from ltx_export.derive import Progress
from ltx_ref.checkpoint import CheckpointError, Header, read_header
from ltx_ref.lora import Adapter

FORMAT = 1
"""Of the arithmetic and the layout: with another number, nothing that was kept is found."""

UNLINKABLE = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP})
"""What a file system says that cannot link, or not there, or not once more."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Derivation:
    """A file that is to be made. `target` is `derive.planned(source, ...)`.

    `cache` is the folder to keep it in, None the user's own.
    """

    source: Header
    target: Header
    adapters: tuple[Adapter, ...] = ()
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the cache. `name` says what it is, and is empty for what was never completed."""

    file: Path
    bytes: int
    sha256: str = ""
    name: str = ""
    inputs: tuple[str, ...] = ()
    linked: bool = False
    """Bundles link to it: deleting it here frees nothing yet."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """Bytes of what was deleted: those that the disk got back, and those that bundles hold."""

    freed: int
    held: int


def place(wanted: Derivation, path: Path) -> Generator[Progress, None, str]:
    """Put the file that is described at `path`, and return its sha256.

    It is made in the cache and linked from there; where no link can lead, it is made in place.

    Raises:
        UserError: as `derive.write`.
        ValueError: there is something at `path`.
    """
    if os.path.lexists(path):
        raise ValueError(f"{path} is there already")
    if not _linkable(home(wanted.cache), path):
        return (yield from derive.write(wanted.source, wanted.target, path, wanted.adapters))
    entry = yield from cached(wanted)
    try:
        _link(entry.file, path)
    except FileExistsError:
        raise ValueError(f"{path} is there already") from None
    return entry.sha256


def cached(wanted: Derivation) -> Generator[Progress, None, Entry]:
    """The file in the cache, made if it is not there.

    Raises:
        UserError: as `derive.write`.
    """
    folder = home(wanted.cache)
    file = folder / f"{_key(wanted)}.safetensors"
    if (found := _intact(file, wanted.target)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = yield from derive.write(wanted.source, wanted.target, file, wanted.adapters)
    if _key(wanted) != file.stem:
        file.unlink()
        raise UserError(f"{wanted.source.path} changed while it was read; start again")
    _note(file, sha256, wanted.target.path.name, _inputs(wanted))
    return _entry(file)


@dataclass(frozen=True, slots=True)
class Other:
    """A file that is made otherwise than by `derive`: `facts` are all that decides about its
    contents beside its inputs, `write` makes it at a path where nothing is."""

    name: str
    inputs: tuple[Path, ...]
    facts: str
    write: Callable[[Path], Generator[str, None, None]]


def place_other(wanted: Other, path: Path, cache: Path | None = None) -> Generator[str, None, None]:
    """As `place`, for another way of making."""
    if not _linkable(home(cache), path):
        yield from wanted.write(path)
        return
    key = _digest([FORMAT, wanted.facts], wanted.inputs)
    file = home(cache) / f"{key}.safetensors"
    if not _is_noted(file):
        file.unlink(missing_ok=True)
        yield from wanted.write(file)
        if _digest([FORMAT, wanted.facts], wanted.inputs) != key:
            file.unlink()
            raise UserError(f"{wanted.inputs[0]} changed while it was read; start again")
        _note(file, hashes.sha256(file), wanted.name, wanted.inputs)
    _link(file, path)


def entries(cache: Path | None = None) -> tuple[Entry, ...]:
    """Everything that is kept, and what an ended process has left unfinished."""
    return tuple(_entry(file) for file in sorted(_files(home(cache)), key=lambda file: file.name))


def clear(cache: Path | None = None) -> Cleared:
    """Delete everything. An export that runs at this moment fails."""
    found = entries(cache)
    for entry in found:
        entry.file.with_suffix(".json").unlink(missing_ok=True)
        entry.file.unlink(missing_ok=True)
    held = sum(entry.bytes for entry in found if entry.linked)
    return Cleared(sum(entry.bytes for entry in found) - held, held)


def home(cache: Path | None) -> Path:
    return (Path(user_cache_dir("ltx-trt")) if cache is None else cache) / "derived"


def _inputs(wanted: Derivation) -> list[Path]:
    return [wanted.source.path, *(path for a in wanted.adapters for path in a.inputs)]


def _key(wanted: Derivation) -> str:
    """The head of the new file knows the types, the strengths and the hashes of the LoRAs."""
    head = hashlib.sha256(derive.head(wanted.target)).hexdigest()
    return _digest([FORMAT, head], _inputs(wanted))


def _digest(facts: list[Any], inputs: Iterable[Path]) -> str:
    for path in inputs:
        stat = path.stat()
        small = stat.st_size < hashes.STAMP_FROM
        seen = hashes.sha256(path) if small else hashes.sample(path)
        facts.append([os.path.realpath(path), stat.st_size, stat.st_mtime_ns, seen])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _note(file: Path, sha256: str, name: str, inputs: Iterable[Path]) -> None:
    """The file is complete."""
    stat = file.stat()
    note = {
        "sha256": sha256,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "name": name,
        "inputs": [str(path) for path in inputs],
    }
    _write_note(file.with_suffix(".json"), json.dumps(note, indent=2, sort_keys=True) + "\n")


def _is_noted(file: Path) -> bool:
    """It was completed, and nobody has touched it since."""
    try:
        note, stat = json.loads(file.with_suffix(".json").read_bytes()), file.stat()
        return bool((note["bytes"], note["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _intact(file: Path, wanted: Header) -> Entry | None:
    """Size, time and header are as noted; the bytes are not read."""
    if not os.path.lexists(file):
        return None
    try:
        note, stat = json.loads(file.with_suffix(".json").read_bytes()), file.stat()
        header = read_header(file)
        same = (note["bytes"], note["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        fits = header.tensors == wanted.tensors and header.metadata == wanted.metadata
        if same and fits and stat.st_size == derive.size(wanted):
            return _entry(file)
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        pass  # whatever is wrong with it, it is made again
    log.warning("%s in the cache is damaged or was changed; making it again", file)
    return None


def _entry(file: Path) -> Entry:
    stat = file.stat()
    try:
        note = json.loads(file.with_suffix(".json").read_bytes())
        facts = (note["sha256"], note["name"], tuple(note["inputs"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Entry(file, stat.st_size, linked=stat.st_nlink > 1)
    return Entry(file, stat.st_size, *facts, linked=stat.st_nlink > 1)


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from folder.glob("*.safetensors")
        yield from folder.glob(".*.partial")


def _write_note(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in UNLINKABLE:
            raise
        log.warning("copying %s: a hard link is refused (%s)", target.name, error.strerror)
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """Never onto a file that is there, which might be a link to one that others read."""
    with source.open("rb") as file, target.open("xb") as out:
        try:
            with derive.told(target):
                shutil.copyfileobj(file, out, 1 << 24)
        except BaseException:
            target.unlink()
            raise


def _linkable(folder: Path, path: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _device(folder) == _device(path.parent) and os.access(folder, os.W_OK):
            return True
        reason = "it is on another file system, or cannot be written"
    except OSError as error:
        reason = error.strerror or str(error)
    log.warning("not keeping %s in the cache %s: %s", path.name, folder, reason)
    return False


def _device(path: Path) -> int:
    return path.stat().st_dev
