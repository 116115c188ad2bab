"""What of a denoising run decides whether a step is like the one before: noise levels, branches."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from ltx_trt.guidance import StepGuidance
from ltx_trt.sampler import Table


@dataclass(frozen=True, slots=True)
class Walk:
    """`sigmas` and `layouts` have an entry for each step; a layout names the branches that the
    transformer runs, `uncond text perturbed:3`. `draws_noise`: the sampler adds any."""

    sigmas: tuple[float, ...]
    layouts: tuple[str, ...]
    sampler: str
    draws_noise: bool

    @classmethod
    def of(cls, table: Table, guides: Iterable[StepGuidance], sampler: str) -> Self:
        return cls(
            tuple(step.sigma for step in table),
            tuple(map(layout, guides)),
            sampler,
            any(step.noise is not None for step in table),
        )


def layout(guide: StepGuidance) -> str:
    blocks = ",".join(map(str, guide.skip_blocks))
    return " ".join(f"{b}:{blocks}" if b == "perturbed" else b for b in guide.branches)
