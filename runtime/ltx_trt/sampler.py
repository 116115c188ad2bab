"""A sampler is a table of coefficients; a step is one linear combination.

On the straight path of rectified flow, x = (1 - s) clean + s noise and the model predicts the
velocity v = noise - clean, so that x - s v is its estimate of the clean latents. What a sampler
adds to this is known before the first step, in double precision:

    next x = latents x + velocity v + previous (the last step's clean estimate) + noise (fresh)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite, log, sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Step:
    """`noise` is None when no noise is drawn; 0 still draws, to keep the stream in step."""

    sigma: float
    sigma_next: float
    latents: float
    velocity: float
    previous: float = 0.0
    noise: float | None = None

    def apply(
        self,
        latents: Floats,
        velocity: Floats,
        *,
        previous: Floats | None = None,
        noise: Floats | None = None,
    ) -> Floats:
        moved = np.float32(self.latents) * latents + np.float32(self.velocity) * velocity
        for coefficient, term in ((self.previous, previous), (self.noise, noise)):
            if not coefficient:
                continue
            if term is None:
                raise ValueError(f"the step from {self.sigma:g} needs a tensor that is not given")
            moved += np.float32(coefficient) * term
        return moved

    def clean(self, latents: Floats, velocity: Floats) -> Floats:
        """What the model believes the clean latents to be."""
        return latents - np.float32(self.sigma) * velocity


Table = tuple[Step, ...]


def euler(sigmas: Sequence[float]) -> Table:
    """Straight on along the velocity."""
    return tuple(Step(s, n, 1.0, n - s) for s, n in pairwise(sigmas))


def stochastic(sigmas: Sequence[float]) -> Table:
    """To the clean estimate, and back up with fresh noise; the last step draws it in vain."""
    return tuple(Step(s, n, 1 - n, (n - 1) * s, noise=n) for s, n in pairwise(sigmas))


def dpmpp_2m(sigmas: Sequence[float]) -> Table:
    """DPM-Solver++(2M): the clean estimate is carried on along its last change.

    `change` weighs this change by half the ratio of the two steps in log signal-to-noise. It is 0
    after a step from pure noise, which is infinitely long, and at the ends, where the rule is of
    first order (Lu et al. 2022, arXiv 2211.01095).
    """
    steps: list[Step] = []
    before = inf  # log signal-to-noise at the last clean estimate, infinite where it cannot count
    for s, n in pairwise(sigmas):
        here, there = _log_signal_to_noise(s), _log_signal_to_noise(n)
        usable = isfinite(before) and isfinite(there)
        change = (there - here) / (here - before) / 2 if usable else 0.0
        clean = 1 - n / s  # the weight of the clean estimate in the next latents
        steps.append(
            Step(
                s,
                n,
                latents=n / s + clean * (1 + change),
                velocity=-clean * (1 + change) * s,
                previous=-clean * change,
            )
        )
        before = here
    return tuple(steps)


def ddim(sigmas: Sequence[float], eta: float = 0.0) -> Table:
    """DDIM on the straight path: `eta` is the share of ancestral noise, 0 none and 1 all of it.

    The fresh noise replaces part of the predicted one, so that the level is sigma_next for every
    eta (Song et al. 2020, arXiv 2010.02502, with s / (1 - s) as the noise-to-signal ratio).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")
    steps: list[Step] = []
    for s, n in pairwise(sigmas):
        ratio = 0.0 if s == 1 else n * (1 - s) / (s * (1 - n))
        fresh = eta * n * sqrt(1 - ratio**2)
        kept = sqrt(n**2 - fresh**2)  # of the predicted noise x + (1 - s) v
        steps.append(
            Step(
                s,
                n,
                latents=1 - n + kept,
                velocity=kept * (1 - s) - (1 - n) * s,
                noise=fresh if eta else None,
            )
        )
    return tuple(steps)


SAMPLERS: dict[str, Callable[[Sequence[float]], Table]] = {
    "euler": euler,
    "stochastic": stochastic,
    "dpmpp-2m": dpmpp_2m,
    "ddim": ddim,
}


def table(name: str, sigmas: Sequence[float], *, eta: float = 0.0) -> Table:
    """The sampler of that name; `eta` is ddim's."""
    if name == "ddim":
        return ddim(sigmas, eta)
    return SAMPLERS[name](sigmas)


def _log_signal_to_noise(sigma: float) -> float:
    if sigma in (0.0, 1.0):
        return -inf if sigma else inf
    return log((1 - sigma) / sigma)
