"""What step caching has measured of one checkpoint, and of which runs it holds.

A file of its own, a few kB of JSON. It says of each step how far residual and velocity change, so
it is of one schedule: another number of steps, sampler or set of branches needs its own table.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Literal, Self
from uuid import uuid4

import numpy as np
from pydantic import Field, ValidationError, model_validator

from ltx_engines import hashes, strict
from ltx_engines.bundle import Bundle, Manifest, SchedulerFacts
from ltx_engines.errors import UserError
from ltx_engines.file_entry import Count, FileEntry, Frozen
from ltx_trt.cache_walk import Walk

FILE = "step_cache.json"
"""In a bundle: the table of its own defaults, which need not be named."""

FAIR = 0.5
"""Of R2: below, the polynomial explains less than half of what it was fitted to."""

Share = Annotated[float, Field(ge=0)]


class Clips(Frozen):
    """What the measured runs made."""

    width: Count
    height: Count
    num_frames: Count
    frame_rate: float
    guidance_scale: float | tuple[float, ...]
    stg_scale: float | tuple[float, ...]
    prompts: Count
    seeds: tuple[int, ...]
    loras: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int, int]:
        return (self.width, self.height, self.num_frames)


class Ratios(Frozen):
    """MagCache: the size of each step's residual to that of the step before, the mean over tokens,
    branches and clips, and its deviation over clips; 1 where there is none to compare with."""

    ratios: tuple[Share, ...]
    deviations: tuple[Share, ...]


class Polynomial(Frozen):
    """TeaCache: the relative change of the velocity as a polynomial (highest power first) of that
    of the embedded noise level, which is `distances`. Correlations are None without a spread; R2
    also with so few distances that a polynomial meets them all."""

    distances: tuple[Share, ...]
    coefficients: Annotated[tuple[float, ...], Field(min_length=1)]
    pearson: float | None
    r2: float | None
    points: Count

    def doubt(self) -> str:
        """What to say of a fit that is not to be trusted, or an empty string."""
        if self.r2 is not None and self.r2 >= FAIR:
            return ""
        said = "no correlation" if self.r2 is None else f"R2 {self.r2:.2f}"
        return (
            f"the table's polynomial hardly explains how velocities change ({said}); teacache will "
            "choose its steps badly: prefer magcache or easycache"
        )

    def changes(self) -> tuple[float, ...]:
        """Expected of the velocity at each step. A polynomial may dip below 0, a change cannot."""
        values = np.abs(np.polyval(self.coefficients, self.distances))
        return tuple(values.tolist())


class CacheTable(Frozen):
    format_version: Literal[1] = 1
    checkpoint: FileEntry
    checkpoint_name: str
    sigmas: Annotated[tuple[float, ...], Field(min_length=2)]
    layouts: tuple[str, ...]
    sampler: str
    scheduler: SchedulerFacts
    clips: Clips
    magcache: Ratios
    teacache: Polynomial

    @model_validator(mode="after")
    def _has_an_entry_for_each_step(self) -> Self:
        rows = (
            self.layouts,
            self.magcache.ratios,
            self.magcache.deviations,
            self.teacache.distances,
        )
        if any(len(row) != len(self.sigmas) for row in rows):
            raise ValueError(f"each list should have {len(self.sigmas)} entries, as sigmas has")
        return self

    def check(self, walk: Walk, manifest: Manifest) -> None:
        """
        Raises:
            UserError: it is of another checkpoint, or of other steps.
        """
        again = "make one for this run with `ltx-trt calibrate-cache`, or use easycache"
        if not self.checkpoint.is_same(manifest.files[manifest.checkpoint]):
            raise UserError(
                f"this cache table is of another checkpoint ({self.checkpoint_name}, "
                f"{_known(self.checkpoint)}) than the bundle's ({Path(manifest.checkpoint).name}, "
                f"{_known(manifest.files[manifest.checkpoint])}); {again}"
            )
        if len(walk.sigmas) != len(self.sigmas):
            raise UserError(
                f"this cache table is of {len(self.sigmas)} steps, the run has "
                f"{len(walk.sigmas)}; {again}"
            )
        for step, (level, wanted) in enumerate(zip(walk.sigmas, self.sigmas, strict=True), 1):
            if np.float32(level) != np.float32(wanted):
                raise UserError(
                    f"this cache table is of another schedule: noise level {wanted:.4f} at step "
                    f"{step}, the run has {level:.4f}; {again}"
                )
        for what, here, there in (
            ("the sampler", walk.sampler, self.sampler),
            *(("branches", *pair) for pair in zip(walk.layouts, self.layouts, strict=True)),
        ):
            if here != there:
                raise UserError(
                    f"this cache table is of {what} {there!r}, the run has {here!r}; {again}"
                )

    def differences(self, run: Clips) -> tuple[str, ...]:
        """What of a run is not as it was when this was measured, and may cost quality."""
        of = "the cache table was measured with"
        made = f"{self.clips.num_frames} frames of {self.clips.width} x {self.clips.height}"
        found = []
        if self.clips.size != run.size:
            found.append(f"{of} {made}; another size may lose more")
        for name in ("guidance_scale", "stg_scale"):
            if (there := getattr(self.clips, name)) != getattr(run, name):
                found.append(f"{of} {name} {there}; another one may lose more")
        if self.clips.loras != run.loras:
            found.append(f"{of} {', '.join(self.clips.loras) or 'no'} LoRA; others may lose more")
        return tuple(found)


def read(path: Path) -> CacheTable:
    """
    Raises:
        UserError: it is no such table.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a table of `calibrate-cache`") from None
    except ValueError:
        raise UserError(
            f"{path} is no JSON; name a table that `ltx-trt calibrate-cache` wrote"
        ) from None
    try:
        return CacheTable.model_validate(data)
    except ValidationError as error:
        problem = strict.problem(error, data, CacheTable)
        raise UserError(f"{path}: {problem}; make it again with ltx-trt calibrate-cache") from None


def write(table: CacheTable, path: Path) -> None:
    """In one rename, when it is complete."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    text = json.dumps(table.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checkpoint_of(bundle: Bundle) -> FileEntry:
    """The bundle's checkpoint, to be known again by the hash or, where nobody has read it all, by a
    sample of it; not by the time of its last change, which is of this machine."""
    manifest = bundle.manifest
    entry = manifest.files[manifest.checkpoint]
    sample = entry.sample or hashes.sample(bundle.file(manifest.checkpoint))
    return FileEntry(bytes=entry.bytes, sha256=entry.sha256, sample=sample)


def _known(entry: FileEntry) -> str:
    if entry.sha256 is not None:
        return f"sha256 {entry.sha256[:12]}"
    return f"sample {entry.sample[:12]}" if entry.sample else f"{entry.bytes} bytes"
