"""The table of step caching, measured: runs without a cache, in which each step is compared with
the one before.

    ratio    = mean over tokens and branches of |residual_i| / |residual_(i-1)|        (magcache)
    change   = mean |velocity_i - velocity_(i-1)| / mean |velocity_(i-1)|              (teacache)
    distance = the same of the embedded noise levels, which no clip changes

A polynomial from distances to changes is fitted to all steps of all clips.

B branches of guidance; C latent channels
"""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltx_engines import pipeline_config
from ltx_engines.bundle import Bundle, Manifest
from ltx_engines.errors import UserError
from ltx_trt import cache_table, passes, timestep_embedding
from ltx_trt.backend import Choice
from ltx_trt.cache_table import CacheTable, Clips, Polynomial, Ratios
from ltx_trt.cache_walk import Walk
from ltx_trt.pipeline import StepDone, generate, plan
from ltx_trt.request import Request, Wishes, resolve
from ltx_trt.session import Array, Feeds, OpenSession, Session
from ltx_trt.session.choice import open_stages
from ltx_trt.session.wrapped import Wrapped
from ltx_trt.step_caching import check_cachable, layout_of

Doubles = NDArray[np.float64]

DEGREE = 4
"""Of the polynomial: TeaCache's."""

TINY = 1e-8
"""Beside the size of a residual, so that a residual of 0 does not divide: diffusers' MagCache."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One clip: an entry for each step; nan where other branches ran than at the step before."""

    ratios: Doubles
    changes: Doubles


class Recorder(Wrapped):
    """The transformer as a session that compares its calls; it has no loop of its own."""

    def __init__(self, transformer: Session) -> None:
        super().__init__(transformer)
        self._layout: tuple[Any, ...] = ()
        self._before: tuple[Doubles, Doubles] | None = None
        self._ratios: list[float] = []
        self._changes: list[float] = []

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        found = self._session(feeds)
        velocity = found["velocity"].astype(np.float64)
        residual = velocity - feeds["latents"]
        before = self._before if layout_of(feeds) == self._layout else None
        self._ratios.append(ratio(residual, before[1]) if before else np.nan)
        self._changes.append(change(velocity, before[0]) if before else np.nan)
        self._before, self._layout = (velocity, residual), layout_of(feeds)
        return found

    def measured(self) -> Measured:
        return Measured(np.array(self._ratios), np.array(self._changes))


def ratio(residual: Doubles, before: Doubles) -> float:
    """In size, of [B, tokens, C]."""
    now, then = (np.linalg.norm(r, axis=-1) for r in (residual, before))
    return float(np.mean(now / (then + TINY)))


def change(velocity: Doubles, before: Doubles) -> float:
    return float(np.abs(velocity - before).mean() / np.abs(before).mean())


@dataclass(frozen=True, slots=True)
class Order:
    """`seeds` of each prompt, from the wishes' on, whose prompt does not count."""

    wishes: Wishes
    prompts: tuple[str, ...]
    seeds: int
    bundle: Path
    out: Path
    config: Path | None = None
    choice: Choice = field(default_factory=Choice)


def execute(order: Order) -> Generator[StepDone, None, CacheTable]:
    """Yields at each step; writes the table when all is measured."""
    _check_writable(order.out)
    config = None if order.config is None else pipeline_config.load(order.config)
    with open_stages(order.bundle, order.choice) as stages:
        wishes = replace(order.wishes, prompt=order.prompts[0])
        request, _ = resolve(wishes, stages.bundle, config)
        stages.prepare(plan(request, stages.bundle.manifest))
        seeds = tuple(range(request.seed, request.seed + order.seeds))
        calibration = Calibration(request, order.prompts, seeds, stages.loras)
        table = yield from calibrate(calibration, stages.bundle, stages)
    cache_table.write(table, order.out)
    return table


def _check_writable(path: Path) -> None:
    """Before an hour of work."""
    folder = path.absolute().parent
    if path.is_dir() or path.suffix.lower() != ".json":
        raise UserError(f"{path}: the table is a file of JSON; name it {path.name or 'table'}.json")
    if path.exists():
        try:
            cache_table.read(path)
        except UserError:
            raise UserError(
                f"{path} is there and is no cache table; name another file, or move it"
            ) from None
    if not folder.is_dir():
        raise UserError(f"{path}: there is no folder {folder}; create it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: nothing can be written in {folder}; choose another folder")


@dataclass(frozen=True, slots=True)
class Calibration:
    """`request` is of any of the clips; its prompt and seed are replaced."""

    request: Request
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    loras: tuple[str, ...] = ()

    def requests(self) -> Iterator[Request]:
        for prompt in self.prompts:
            for seed in self.seeds:
                yield replace(self.request, prompt=prompt, seed=seed)

    def clips(self) -> Clips:
        return clips_of(self.request, self.loras, prompts=len(self.prompts), seeds=self.seeds)


def clips_of(
    request: Request,
    loras: tuple[str, ...],
    *,
    prompts: int = 1,
    seeds: tuple[int, ...] = (),
) -> Clips:
    return Clips(
        width=request.width,
        height=request.height,
        num_frames=request.num_frames,
        frame_rate=request.frame_rate,
        guidance_scale=request.guidance.guidance_scale,
        stg_scale=request.guidance.stg_scale,
        prompts=prompts,
        seeds=seeds,
        loras=loras,
    )


def walk_of(request: Request, manifest: Manifest) -> Walk:
    """Of the first pass, the only one that is cached.

    Raises:
        UserError: such a run cannot be cached.
    """
    first = passes.plan(request, manifest)[0]
    walk = Walk.of(first.table, first.guidance, request.sampler)
    check_cachable(walk, manifest, "nothing is to be calibrated for it")
    return walk


def calibrate(
    calibration: Calibration, bundle: Bundle, open_session: OpenSession
) -> Generator[StepDone, None, CacheTable]:
    """Yields at each step of each clip; returns the table."""
    walk = walk_of(calibration.request, bundle.manifest)
    checkpoint = bundle.file(bundle.manifest.checkpoint)
    distances = timestep_embedding.changes(timestep_embedding.embeddings(checkpoint, walk.sigmas))
    clips: list[Measured] = []
    for request in calibration.requests():
        clips.append((yield from measure(request, bundle, open_session)))
    return CacheTable(
        checkpoint=cache_table.checkpoint_of(bundle),
        checkpoint_name=checkpoint.name,
        sigmas=walk.sigmas,
        layouts=walk.layouts,
        sampler=walk.sampler,
        scheduler=bundle.manifest.scheduler,
        clips=calibration.clips(),
        magcache=averaged([clip.ratios for clip in clips]),
        teacache=fit(distances, [clip.changes for clip in clips]),
    )


def measure(
    request: Request, bundle: Bundle, open_session: OpenSession
) -> Generator[StepDone, None, Measured]:
    """One clip, up to its latents after the first pass."""
    recorders: list[Recorder] = []

    @contextmanager
    def opened(stage: str) -> Iterator[Session]:
        with open_session(stage) as session:
            if stage == "transformer":
                session = Recorder(session)
                recorders.append(session)
            yield session

    count = len(walk_of(request, bundle.manifest).sigmas)
    with closing(generate(request, bundle, opened)) as events:
        for event in events:
            if isinstance(event, StepDone):
                yield replace(event, total=count)
                if event.index == count:
                    break
    return recorders[0].measured()


def averaged(ratios: Sequence[Doubles]) -> Ratios:
    """Over clips. A step without a ratio, the same in all of them, has 1."""
    rows = np.nan_to_num(np.stack(ratios), nan=1.0)
    return Ratios(
        ratios=tuple(rows.mean(axis=0).tolist()), deviations=tuple(rows.std(axis=0).tolist())
    )


def fit(distances: Sequence[float], changes: Sequence[Doubles]) -> Polynomial:
    """`changes` has a row for each clip; steps that are nan in it do not count. A curve of as many
    coefficients as there are distances goes through all of them, which says nothing: no R2."""
    x = np.tile(np.asarray(distances), len(changes))
    y = np.concatenate(changes)
    known = np.isfinite(y)
    x, y = x[known], y[known]
    largest = float(x.max()) or 1.0
    distinct = len(np.unique(x))
    degree = min(DEGREE, distinct - 1)
    # Powers of x / largest: of x itself, which is small, the fourth is lost in the rounding.
    powers = np.vander(x / largest, degree + 1)
    scaled, *_ = np.linalg.lstsq(powers, y)
    coefficients = scaled / largest ** np.arange(degree, -1, -1)
    return Polynomial(
        distances=tuple(distances),
        coefficients=tuple(coefficients.tolist()),
        pearson=_pearson(x, y),
        r2=_explained(y, np.polyval(coefficients, x)) if distinct > degree + 1 else None,
        points=len(y),
    )


def _pearson(x: Doubles, y: Doubles) -> float | None:
    if not np.ptp(x) or not np.ptp(y):
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _explained(y: Doubles, fitted: Doubles) -> float | None:
    """R2: the share of the changes' variance that the polynomial explains."""
    spread = np.square(y - y.mean()).sum()
    return float(1 - np.square(y - fitted).sum() / spread) if spread else None
