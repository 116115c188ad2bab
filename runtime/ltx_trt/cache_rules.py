"""Which steps of a walk reuse: the rule of each method of step caching, by itself.

    magcache   known beforehand: the sizes of the residuals drift apart (arXiv 2506.09045)
    teacache   known beforehand: the velocity changes as a polynomial says (arXiv 2411.19108)
    easycache  while the run goes: the velocity changes for a change of the latents as it did at
               the last computed steps (arXiv 2507.02860)

`forced` says of each step whether it must be computed.

B branches of guidance; C latent channels
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def magcache(
    ratios: Sequence[float], forced: Sequence[bool], threshold: float, longest: int
) -> tuple[bool, ...]:
    """`ratios` are of the size of each step's residual to that of the step before. The error of a
    reused step is how far their product since the last computed one is from 1. Errors add up,
    below the threshold; at most `longest` steps in a row reuse."""
    reused: list[bool] = []
    product, error, run = 1.0, 0.0, 0
    for ratio, must in zip(ratios, forced, strict=True):
        product *= ratio
        error += abs(1 - product)
        run += 1
        reuses = not must and error < threshold and run <= longest
        if not reuses:
            product, error, run = 1.0, 0.0, 0
        reused.append(reuses)
    return tuple(reused)


def teacache(
    changes: Sequence[float], forced: Sequence[bool], threshold: float
) -> tuple[bool, ...]:
    """`changes` are the velocity's relative ones from step to step, as they are expected. They add
    up since the last computed step, below the threshold."""
    reused: list[bool] = []
    change = 0.0
    for expected, must in zip(changes, forced, strict=True):
        change += expected
        reuses = not must and change < threshold
        if not reuses:
            change = 0.0
        reused.append(reuses)
    return tuple(reused)


@dataclass(frozen=True, slots=True)
class Given:
    """To the transformer at one step: latents [B, tokens, C], and [B, tokens] which of them are at
    the step's noise level. The others are conditions: what they change says nothing."""

    latents: Floats
    moving: NDArray[np.bool_]

    def distance(self, a: Floats, b: Floats) -> float:
        return self.size(a - b)

    def size(self, a: Floats) -> float:
        return float(np.mean(np.abs(a[self.moving]), dtype=np.float64))


class Rule(Protocol):
    """Decides of each step in order; hears of each that was computed."""

    def reuses(self, step: int, given: Given) -> bool: ...

    def computed(self, given: Given, velocity: Floats) -> None: ...

    def forget(self) -> None:
        """What comes is not like what was."""
        ...


class Known:
    """Implements Rule by a plan."""

    def __init__(self, reused: Sequence[bool]) -> None:
        self._reused = reused

    def reuses(self, step: int, given: Given) -> bool:  # noqa: ARG002 - of the protocol
        return self._reused[step]

    def computed(self, given: Given, velocity: Floats) -> None:
        pass

    def forget(self) -> None:
        pass


class EasyCache:
    """Implements Rule. All branches are one tensor: they are decided of together."""

    def __init__(self, forced: Sequence[bool], threshold: float) -> None:
        self._forced, self._threshold = forced, threshold
        self.forget()

    def forget(self) -> None:
        self._before: Floats | None = None
        self._last: tuple[Floats, Floats] | None = None
        self._slope: float | None = None
        self._change = 0.0

    def reuses(self, step: int, given: Given) -> bool:
        before, self._before = self._before, given.latents
        if self._forced[step] or self._slope is None or before is None or self._last is None:
            return False
        size = given.size(self._last[1])
        moved = given.distance(given.latents, before)
        self._change += self._slope * moved / size if size else inf
        return self._change < self._threshold

    def computed(self, given: Given, velocity: Floats) -> None:
        self._change = 0.0
        if self._last is not None:
            moved = given.distance(given.latents, self._last[0])
            self._slope = given.distance(velocity, self._last[1]) / moved if moved else None
        self._last = given.latents, velocity
