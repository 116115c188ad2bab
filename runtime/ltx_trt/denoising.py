"""The loop over the steps, on the host: what a session that only knows arrays needs around it.

A session that has a loop of its own, where its latents are (`Denoises`), is given all of it at
once instead: `Denoising` holds everything that the loop reads.

B branches of guidance; C latent channels
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_trt.guidance import StepGuidance
from ltx_trt.noise import Noise
from ltx_trt.sampler import Step, Table
from ltx_trt.session import Feeds, Session

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Text:
    """One prompt as the transformer reads it: [1, text, width] and [1, text]."""

    embeds: Floats
    mask: Floats


@dataclass(frozen=True, slots=True)
class Denoising:
    """`latents` [1, tokens, C] at the first noise level; `coordinates` [1, 3, tokens]. `noise` is
    drawn from once for each step whose `Step.noise` is not None, in order."""

    latents: Floats
    coordinates: Floats
    text: Text
    uncond: Text
    table: Table
    guidance: tuple[StepGuidance, ...]
    num_layers: int
    noise: Noise

    def steps(self) -> Iterator[tuple[Step, StepGuidance]]:
        return zip(self.table, self.guidance, strict=True)

    def feeds(self, latents: Floats, step: Step, guide: StepGuidance) -> Feeds:
        """Of the transformer: a row of each tensor for each branch."""
        texts = [self.uncond if branch == "uncond" else self.text for branch in guide.branches]
        batch = len(texts)
        return {
            "latents": np.repeat(latents, batch, axis=0),
            "coords": np.repeat(self.coordinates, batch, axis=0),
            "timestep": np.full((batch, 1), step.sigma, np.float32),
            "prompt_embeds": np.concatenate([t.embeds for t in texts]),
            "prompt_mask": np.concatenate([t.mask for t in texts]),
            "skip_layer_mask": guide.skip_layer_mask(self.num_layers),
        }

    def fresh(self, step: Step) -> Floats | None:
        """The step's noise [1, tokens, C], if it draws any."""
        return None if step.noise is None else self.noise.normal(self.latents.shape)


@runtime_checkable
class Denoises(Protocol):
    """A session whose latents stay where it is; it yields after each step, as `on_the_host`."""

    def denoise(self, job: Denoising) -> Generator[None, None, Floats]: ...


def on_the_host(transformer: Session, job: Denoising) -> Generator[None, None, Floats]:
    """Yields after each step; returns the clean latents."""
    latents = job.latents
    previous: Floats | None = None
    for index, (step, guide) in enumerate(job.steps(), 1):
        velocities = transformer(job.feeds(latents, step, guide))["velocity"]
        velocity = guide.combine(velocities)
        check_finite(velocity, f"the transformer's velocity at step {index}")
        fresh = job.fresh(step)
        clean = step.clean(latents, velocity)
        latents = step.apply(latents, velocity, previous=previous, noise=fresh)
        previous = clean
        yield
    return latents


def check_finite(values: Floats, what: str) -> None:
    """
    Raises:
        UserError: some are not.
    """
    if not np.isfinite(values).all():
        raise UserError(
            f"{what} overflowed (not finite); export the stage with more range: "
            "ltx-export onnx --precision float32"
        )
