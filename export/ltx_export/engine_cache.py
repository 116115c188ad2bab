"""Engines that several bundles share: what one of them has built, the next one links to.

    DIGEST.engine  DIGEST.layers.json  DIGEST.json    an engine, its kernels, and what they are of

The last one is written last: an engine without it is not there. An engine is code, so it is not
believed to be what it was: its hash is checked before it is handed out.
"""

import json
import logging
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from pydantic import ValidationError

from ltx_engines import cache_key, hashes
from ltx_engines.cache_key import EngineKey
from ltx_engines.errors import UserError
from ltx_export.build_job import Built, Job

FORMAT = 1
ENDS = (".engine", ".layers.json")

log = logging.getLogger(__name__)


def take(folder: Path, key: EngineKey, job: Job) -> Built | None:
    """Put an engine of this key where the job would write it; None if the cache has none that is
    whole. What is not whole is deleted."""
    for note in sorted(folder.glob(f"{key.stage}-*.json")):
        if note.name.endswith(ENDS):
            continue
        try:
            found, built, layers = _read(note)
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            _drop(note, f"it cannot be read ({error})")
            continue
        if found.targets != key.targets or cache_key.difference(found, key):
            continue
        if (problem := _problem(note, built, layers)) is not None:
            _drop(note, problem)
            continue
        for end, target in zip(ENDS, (job.engine, job.layers), strict=True):
            _link(note.with_suffix(end), target)
        return built
    return None


def check(folder: Path) -> None:
    """Before hours of building.

    Raises:
        UserError: the folder cannot be written.
    """
    probe = folder / f".{uuid4().hex[:8]}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(folder, error) from None


def keep(folder: Path, key: EngineKey, job: Job, built: Built) -> None:
    """Add what was built, unless it was taken from here.

    Raises:
        UserError: the folder cannot be written.
    """
    note = folder / f"{key.stage}-{_digest(key)}.json"
    if note.exists():
        return
    said = {
        "format_version": FORMAT,
        "key": key.model_dump(mode="json"),
        "built": asdict(built),
        "layers": hashes.sha256(job.layers),
    }
    partial = note.with_name(f".{note.name}.{uuid4().hex[:8]}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for end, source in zip(ENDS, (job.engine, job.layers), strict=True):
            _replace(source, note.with_suffix(end))
        partial.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(partial, note)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot keep an engine in {folder} ({error.strerror}); give another --cache, or none"
    )


def _digest(key: EngineKey) -> str:
    return sha256(key.model_dump_json().encode()).hexdigest()[:16]


def _read(note: Path) -> tuple[EngineKey, Built, str]:
    said = json.loads(note.read_bytes())
    if said["format_version"] != FORMAT:
        raise ValueError(f"format version {said['format_version']}")
    key = EngineKey.model_validate_json(json.dumps(said["key"]), strict=True)
    return key, Built(**said["built"]), str(said["layers"])


def _problem(note: Path, built: Built, layers: str) -> str | None:
    for end, wanted in zip(ENDS, (built.sha256, layers), strict=True):
        try:
            found = hashes.sha256(note.with_suffix(end))
        except OSError as error:
            return f"{note.stem}{end}: {error.strerror}"
        if found != wanted:
            return f"{note.stem}{end} has sha256 {found[:12]}, wanted {wanted[:12]}"
    return None


def _drop(note: Path, problem: str) -> None:
    log.warning("an engine in %s is dropped and built again: %s", note.parent, problem)
    for file in (note, *map(note.with_suffix, ENDS)):
        file.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    """Nobody ever sees half a file: whoever has linked to the old one keeps it."""
    partial = target.with_name(f".{target.name}.{uuid4().hex[:8]}.partial")
    try:
        _link(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where none can lead."""
    try:
        os.link(source, target)
    except OSError as error:
        log.info("copying %s: %s", source.name, error.strerror)
        shutil.copyfile(source, target)
