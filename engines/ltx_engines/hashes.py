"""The sha256 of files, with a memory: gigabytes that have not changed are not read again."""

import hashlib
import json
import logging
import os
from pathlib import Path
from uuid import uuid4

STAMP_FROM = 256 * 2**20
"""Bytes. Smaller files are hashed each time; that takes less than a second."""

SAMPLES, SAMPLE = 64, 64 * 2**10
"""Blocks of a file, and bytes of each, that stand for the whole until it is hashed."""

log = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample(path: Path) -> str:
    """The sha256 of the file's beginning, its end, and blocks spread evenly between them."""
    digest, size = hashlib.sha256(), path.stat().st_size
    last = max(size - SAMPLE, 0)
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(last * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def remember(path: Path, sha256: str, cache: Path) -> None:
    """Believe that a large file, which was just written, has this hash."""
    if path.stat().st_size >= STAMP_FROM:
        _remember(_note(path, cache), _stamp(path, sha256))


def verify(path: Path, wanted: str, cache: Path) -> str:
    """The file's sha256. A large file that once was `wanted` and has not changed is not read."""
    if path.stat().st_size < STAMP_FROM:
        return sha256(path)
    note, stamp = _note(path, cache), _stamp(path, wanted)
    if _remembered(note) == stamp:
        return wanted
    log.info("checking %s", path)
    found = sha256(path)
    if found == wanted and _stamp(path, wanted) == stamp:  # nobody wrote while we read
        _remember(note, stamp)
    return found


def _note(path: Path, cache: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return cache / "verified" / f"{name}.json"


def _stamp(path: Path, wanted: str) -> bytes:
    stat = path.stat()
    facts = {
        "path": os.path.realpath(path),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
        "sha256": wanted,
    }
    return json.dumps(facts, sort_keys=True, indent=2).encode() + b"\n"


def _remembered(note: Path) -> bytes:
    try:
        return note.read_bytes()
    except OSError:  # never verified, or a cache that cannot be read: hash again
        return b""


def _remember(note: Path, stamp: bytes) -> None:
    temporary = note.with_suffix(f".{uuid4().hex[:8]}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(stamp)
            os.replace(temporary, note)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        log.warning("cannot remember which files are intact: %s", error)
