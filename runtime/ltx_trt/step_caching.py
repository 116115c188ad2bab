"""Step caching: some steps reuse what the transformer added to its latents when it last ran.

    velocity = latents + residual        residual = velocity - latents of the last computed step

Of the whole model, so that any session can be wrapped and no graph changes. A step is computed in
any case when it is one of the first or the last, when it runs other branches than the step before,
and when the call is not of the walk that the cache was made for: the second pass of a multi-scale
run comes to the same transformer.

B branches of guidance; C latent channels
"""

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltx_engines.bundle import Manifest
from ltx_engines.errors import UserError, nearest
from ltx_trt import cache_rules
from ltx_trt.cache_rules import EasyCache, Given, Known, Rule
from ltx_trt.cache_table import CacheTable
from ltx_trt.cache_walk import Walk
from ltx_trt.session import Array, Feeds, Session
from ltx_trt.session.wrapped import Wrapped

Floats = NDArray[np.float32]

FEWEST = 10
"""Steps. With fewer, neighbours differ too much; no published method offers it."""


class Method(StrEnum):
    magcache = "magcache"
    easycache = "easycache"
    teacache = "teacache"


THRESHOLDS = {Method.magcache: 0.06, Method.easycache: 0.05, Method.teacache: 0.05}
"""Of diffusers' MagCacheConfig, of EasyCache's own script, and TeaCache's for LTX-Video."""

RETENTION = 0.2
"""Steps at the beginning that are always computed, as a share: MagCache; EasyCache has 10 of 50."""

LONGEST = 3
"""Steps in a row that may reuse: diffusers' max_skip_steps, the paper's K."""

WITHOUT = "leave --cache-steps out"


@dataclass(frozen=True, slots=True)
class Caching:
    """At least `first` steps at the beginning and `last` at the end are computed; None is the
    method's own. `retention` and `longest` are MagCache's."""

    method: Method
    threshold: float
    first: int | None = None
    last: int = 1
    retention: float | None = None
    longest: int | None = None
    table: CacheTable | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < inf:
            raise UserError(
                f"--cache-steps {self}: the threshold must be a number from 0, such as "
                f"{self.method}:{THRESHOLDS[self.method]:g}"
            )
        magcache = {"--cache-retention": self.retention, "--cache-longest": self.longest}
        for option, value in magcache.items():
            if value is not None and self.method is not Method.magcache:
                raise UserError(f"{option} is of magcache; {self.method} has no use for it")
        if self.method is Method.easycache and self.table is not None:
            raise UserError("--cache-table has no use: easycache needs no table; leave it out")
        least = {
            "--cache-first": (self.first, 0),
            "--cache-last": (self.last, 0),
            "--cache-longest": (self.longest, 1),
        }
        for option, (steps, fewest) in least.items():
            if steps is not None and steps < fewest:
                raise UserError(f"{option} must be {fewest} or more, not {steps}")
        if self.retention is not None and not 0 <= self.retention <= 1:
            raise UserError(f"--cache-retention must be from 0 to 1, not {self.retention:g}")

    def __str__(self) -> str:
        return f"{self.method}:{self.threshold:g}"

    def rule(self, walk: Walk) -> Rule:
        reused = plan(self, walk)
        if reused is None:
            return EasyCache(must_compute(self, walk), self.threshold)
        return Known(reused)


def parse(text: str) -> tuple[Method, float]:
    """METHOD, or METHOD:THRESHOLD."""
    name, colon, number = text.partition(":")
    known = [method.value for method in Method]
    if name not in known:
        raise UserError(
            f"--cache-steps: unknown method {name!r}, known are {', '.join(known)}"
            f"{nearest(name, known)}"
        )
    method = Method(name)
    if not colon:
        return method, THRESHOLDS[method]
    try:
        return method, float(number)
    except ValueError:
        raise UserError(
            f"--cache-steps {text}: {number!r} is no number; write {name}:{THRESHOLDS[method]:g}"
        ) from None


def check_cachable(walk: Walk, manifest: Manifest, instead: str = WITHOUT) -> None:
    """`instead` is what whoever asks may do.

    Raises:
        UserError: no method is for this model, number of steps or sampler.
    """
    if manifest.allowed_inference_steps is not None:
        raise UserError(
            "step caching is not for a distilled checkpoint: its few steps go far, and none is "
            f"like the one before; {instead}"
        )
    if (steps := len(walk.sigmas)) < FEWEST:
        raise UserError(
            f"step caching needs {FEWEST} steps, this run has {steps}: with so few, none is like "
            f"the one before; {instead}"
        )
    if walk.draws_noise:
        raise UserError(
            f"step caching is not for the sampler {walk.sampler}: fresh noise makes each step "
            f"unlike the one before; {instead}, or choose --sampler euler"
        )


def check(caching: Caching, walk: Walk, manifest: Manifest) -> None:
    """
    Raises:
        UserError: the run is not one for caching, or the table is not of this run.
    """
    check_cachable(walk, manifest)
    if caching.method is Method.easycache:
        return
    if caching.table is None:
        raise UserError(
            f"{caching.method} needs a table of this checkpoint: make one with `ltx-trt "
            "calibrate-cache`, name it with --cache-table; or use easycache, which needs none"
        )
    caching.table.check(walk, manifest)


def must_compute(caching: Caching, walk: Walk) -> tuple[bool, ...]:
    """The steps at both ends, and those that run other branches than the step before."""
    count = len(walk.sigmas)
    changes = (False, *(a != b for a, b in pairwise(walk.layouts)))
    begun = max(1, _first(caching, count))
    return tuple(
        step < begun or step >= count - caching.last or changes[step] for step in range(count)
    )


def without_effect(caching: Caching, walk: Walk) -> tuple[str, ...]:
    """Notes on options that change nothing of this walk, or leave nothing to do."""
    count, notes, first = len(walk.sigmas), [], caching.first
    retained = _retained(caching, count)
    if caching.method is Method.magcache and first is not None and first < retained:
        notes.append(
            f"--cache-first {first} has no effect: --cache-retention computes the first {retained} "
            "steps"
        )
    if all(must_compute(caching, walk)):
        notes.append(
            f"step caching has no effect: the steps at both ends that are always computed "
            f"({_first(caching, count)} and {caching.last}) leave none of {count} to reuse"
        )
    return tuple(notes)


def _retained(caching: Caching, count: int) -> int:
    share = RETENTION if caching.retention is None else caching.retention
    return int(share * count + 0.5)


def _first(caching: Caching, count: int) -> int:
    early = _retained(caching, count)
    if caching.method is Method.magcache:
        return max(early, caching.first or 0)
    if caching.first is not None:
        return caching.first
    return early if caching.method is Method.easycache else 1


def plan(caching: Caching, walk: Walk) -> tuple[bool, ...] | None:
    """Which steps will reuse, where that is known beforehand: not of easycache.

    Raises:
        ValueError: the method needs a table, and there is none (`check`).
    """
    if caching.method is Method.easycache:
        return None
    if caching.table is None:
        raise ValueError(f"{caching.method} without a table")
    forced = must_compute(caching, walk)
    if caching.method is Method.teacache:
        return cache_rules.teacache(caching.table.teacache.changes(), forced, caching.threshold)
    longest = LONGEST if caching.longest is None else caching.longest
    return cache_rules.magcache(caching.table.magcache.ratios, forced, caching.threshold, longest)


class CachedTransformer(Wrapped):
    """The transformer of one request as a session, in place of another that it calls for the steps
    that are computed. `reused` has an entry for each call so far.

    It has no loop of its own (`denoising.Denoises`), whatever the other has: the host decides.
    """

    def __init__(self, transformer: Session, walk: Walk, rule: Rule) -> None:
        super().__init__(transformer)
        self._sigmas, self._rule = walk.sigmas, rule
        self.reused: list[bool] = []
        self._step = 0
        self._shape: tuple[int, ...] | None = None
        self._layout: tuple[Any, ...] = ()
        self._residual: Floats | None = None

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        given, step = _given(feeds), self._which(feeds)
        if step is None or layout_of(feeds) != self._layout:
            self._rule.forget()
            self._residual, self._layout = None, layout_of(feeds)
        reuses = step is not None and self._rule.reuses(step, given) and self._residual is not None
        self.reused.append(reuses)
        if reuses and self._residual is not None:
            return {"velocity": given.latents + self._residual}
        found = self._session(feeds)
        if step is not None:
            velocity = np.array(found["velocity"])  # a session may write its next one there
            self._residual = velocity - given.latents
            self._rule.computed(given, velocity)
        return found

    def _which(self, feeds: Feeds) -> int | None:
        """The step of the walk that a call is, None if it is not the next one."""
        step, shape = self._step, feeds["latents"].shape[1:]
        if step == len(self._sigmas) or self._shape not in (None, shape):
            return None
        if feeds["timestep"].max() != np.float32(self._sigmas[step]):
            return None
        self._step, self._shape = step + 1, shape
        return step


def cached(transformer: Session, caching: Caching, walk: Walk) -> CachedTransformer:
    """For one request: what was cached of another is never reused."""
    return CachedTransformer(transformer, walk, caching.rule(walk))


def _given(feeds: Feeds) -> Given:
    latents, timestep = feeds["latents"], feeds["timestep"]
    moving = np.broadcast_to(timestep == timestep.max(), latents.shape[:2])
    return Given(latents, moving)


def layout_of(feeds: Feeds) -> tuple[Any, ...]:
    """Two calls of equal layouts run the same branches, with the same blocks disturbed."""
    mask = feeds["skip_layer_mask"]
    return (feeds["latents"].shape, mask.shape, mask.tobytes())
