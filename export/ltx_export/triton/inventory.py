"""What is in a model repository: who wrote it, where its bundle is, the hash of each model's files.

repository.json          this
README.md, compose.yaml  plain files at the top: Triton takes every folder there for a model
ltx_video/config.pbtxt   a model
ltx_video/1/bundle/      the bundle; its own manifest has the hashes of its files
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal
from uuid import uuid4

from pydantic import ValidationError

from ltx_engines import bundle, hashes, strict
from ltx_engines.errors import UserError
from ltx_engines.file_entry import Count, FileEntry, Frozen
from ltx_engines.manifest import Manifest
from ltx_export import __version__

INVENTORY = "repository.json"
FORMAT_VERSION = 1
AGAIN = "write it again (ltx-export triton)"


class Inventory(Frozen):
    """`bundle` is a path from the repository's top, None if the bundle is elsewhere; `tensorrt` is
    the version of the plans that Triton's own backend loads, None if there are none."""

    format_version: Count = FORMAT_VERSION
    ltx_trt: str
    layout: Literal["single", "stages"]
    bundle: str | None
    tensorrt: str | None = None
    files: dict[str, FileEntry]


def seal(folder: Path, layout: Literal["single", "stages"], bundle: str | None) -> Inventory:
    """Write the inventory of a repository that is complete but for it."""
    found = Inventory(
        ltx_trt=__version__,
        layout=layout,
        bundle=bundle,
        tensorrt=_plans_version(folder, bundle),
        files={name: _entry(folder / name) for name in files(folder, bundle)},
    )
    text = json.dumps(found.model_dump(mode="json"), sort_keys=True, indent=2) + "\n"
    temporary = folder / f".{INVENTORY}.{uuid4().hex[:8]}"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / INVENTORY)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def read(repository: Path) -> Inventory:
    """
    Raises:
        UserError: it is no repository of ours, or one that this program does not know.
    """
    path = repository / INVENTORY
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{repository} is not a repository of ltx-export triton: it has no {INVENTORY}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; {AGAIN}") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}; {AGAIN}"
        )
    try:
        return Inventory.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise UserError(f"{path}: {strict.problem(error, data, Inventory)}; {AGAIN}") from None


def files(repository: Path, bundle: str | None) -> Iterator[str]:
    """Every file of the models but the bundle's, in order. What lies at the top is a team's to
    change: the image's tag, limits, ports."""
    inside = None if bundle is None else repository / bundle
    for path in sorted(repository.rglob("*")):
        name = path.relative_to(repository)
        if path.is_dir() and not path.is_symlink():
            continue
        if inside is not None and path.is_relative_to(inside):
            continue
        if len(name.parts) > 1 and "__pycache__" not in name.parts:
            yield name.as_posix()


def bundle_folder(repository: Path, found: Inventory) -> Path | None:
    """Where the bundle is.

    Raises:
        UserError: it would be outside of the repository.
    """
    if found.bundle is None:
        return None
    pure = PurePosixPath(found.bundle)
    if pure.is_absolute() or ".." in pure.parts:
        raise UserError(
            f"{repository / INVENTORY}: bundle {found.bundle!r} leads out of it; {AGAIN}"
        )
    return repository / found.bundle


def plans(repository: Path) -> Iterator[Path]:
    """What Triton's own TensorRT backend loads."""
    yield from sorted(repository.glob("*/*/*.plan"))


def _plans_version(folder: Path, place: str | None) -> str | None:
    if place is None or not any(plans(folder)):
        return None
    return one_version(plan_versions(folder, bundle.read(folder / place)))


def one_version(found: set[str]) -> str | None:
    """
    Raises:
        UserError: the plans are of several.
    """
    if len(found) > 1:
        raise UserError(
            f"the plans are of TensorRT {', '.join(sorted(found))}, and a server has one; build "
            "them again with one version (ltx-export build-engine)"
        )
    return next(iter(found), None)


def plan_versions(folder: Path, manifest: Manifest) -> set[str]:
    """Of TensorRT, by which the plans of the models were built."""
    by_hash = {manifest.files[engine.file].sha256: engine for engine in manifest.engines}
    known = (by_hash.get(hashes.sha256(plan)) for plan in plans(folder))
    return {engine.key.version for engine in known if engine is not None}


def _entry(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=hashes.sha256(path))
