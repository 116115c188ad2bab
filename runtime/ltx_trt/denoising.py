"""The loop over the steps, on the host: what a session that only knows arrays needs around it.

A session that has a loop of its own, where its latents are (`Denoises`), is given all of it at
once instead: `Denoising` holds everything that the loop reads.

B branches of guidance; C latent channels; tokens those of images that the clip is conditioned on,
then its own
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_trt.guidance import StepGuidance
from ltx_trt.noise import Noise
from ltx_trt.sampler import Step, Table
from ltx_trt.session import Feeds, Session

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

CLOSEST = np.float32(1e-6)
"""Noise levels nearer than this are one to the original."""


@dataclass(frozen=True, slots=True)
class Text:
    """One prompt as the transformer reads it: [1, text, width] and [1, text]."""

    embeds: Floats
    mask: Floats


@dataclass(frozen=True, slots=True)
class Denoising:
    """`latents` [1, tokens, C] at the first noise level; `coordinates` [1, 3, tokens].

    With `strengths` [1, tokens] a token has a noise level of its own, see `conditioning`; those of
    strength 1 get fresh noise before each step, `image_cond_noise_scale` sigma^2 of it, but for
    those that are `settled`: a window's motion goes on from there. `noise` is
    drawn from for this (if the scale is not 0), then for each step whose `Step.noise` is not None.
    """

    latents: Floats
    coordinates: Floats
    text: Text
    uncond: Text
    table: Table
    guidance: tuple[StepGuidance, ...]
    num_layers: int
    noise: Noise
    strengths: Floats | None = None
    image_cond_noise_scale: float = 0.0
    settled: slice = field(default_factory=lambda: slice(0, 0))

    def steps(self) -> Iterator[tuple[Step, StepGuidance]]:
        return zip(self.table, self.guidance, strict=True)

    def feeds(self, latents: Floats, step: Step, guide: StepGuidance) -> Feeds:
        """Of the transformer: a row of each tensor for each branch."""
        texts = [self.uncond if branch == "uncond" else self.text for branch in guide.branches]
        batch = len(texts)
        return {
            "latents": np.repeat(latents, batch, axis=0),
            "coords": np.repeat(self.coordinates, batch, axis=0),
            "timestep": np.repeat(self.levels(step), batch, axis=0),
            "prompt_embeds": np.concatenate([t.embeds for t in texts]),
            "prompt_mask": np.concatenate([t.mask for t in texts]),
            "skip_layer_mask": guide.skip_layer_mask(self.num_layers),
        }

    def levels(self, step: Step) -> Floats:
        """The noise levels that the transformer is told: [1, 1], or [1, tokens]."""
        level = np.full((1, 1), step.sigma, np.float32)
        return level if self.strengths is None else np.minimum(level, 1 - self.strengths)

    def moving(self, step: Step) -> Flags | None:
        """Which tokens take part in a step: [1, tokens, 1], None for all of them."""
        if self.strengths is None:
            return None
        moving: Flags = np.float32(step.sigma) - CLOSEST < 1 - self.strengths
        return moving[..., np.newaxis]

    def renoised(self, latents: Floats, step: Step) -> Floats:
        """Before a step. Noise is drawn for all tokens, whichever get it."""
        if self.strengths is None or not self.image_cond_noise_scale:
            return latents
        fixed = (self.strengths > 1 - CLOSEST)[..., np.newaxis]
        fixed[:, self.settled] = False
        scale = np.float32(self.image_cond_noise_scale) * np.float32(step.sigma) ** 2
        return np.where(fixed, self.latents + scale * self.noise.normal(latents.shape), latents)

    def fresh(self, step: Step) -> Floats | None:
        """The step's noise [1, tokens, C], if it draws any."""
        return None if step.noise is None else self.noise.normal(self.latents.shape)


@runtime_checkable
class Denoises(Protocol):
    """A session whose latents stay where it is; it yields after each step, as `on_the_host`."""

    def denoise(self, job: Denoising) -> Generator[None, None, Floats]: ...


def on_the_host(transformer: Session, job: Denoising) -> Generator[None, None, Floats]:
    """Yields after each step; returns the clean latents.

    A token that has not taken part so far is, to a sampler that looks back, one whose clean
    estimate has not changed: its first step is of first order.
    """
    latents = job.latents
    previous: Floats | None = None
    moved: Flags | None = None
    for index, (step, guide) in enumerate(job.steps(), 1):
        latents = job.renoised(latents, step)
        velocities = transformer(job.feeds(latents, step, guide))["velocity"]
        velocity = guide.combine(velocities)
        check_finite(velocity, f"the transformer's velocity at step {index}")
        fresh = job.fresh(step)
        clean = step.clean(latents, velocity)
        if previous is not None and moved is not None:
            previous = np.where(moved, previous, clean)
        after = step.apply(latents, velocity, previous=previous, noise=fresh)
        moved = job.moving(step)
        latents = after if moved is None else np.where(moved, after, latents)
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
