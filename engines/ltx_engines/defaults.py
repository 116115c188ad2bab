"""What a run of a model does when nobody says otherwise: one denoising, or two."""

from typing import Annotated, Any, Self

from pydantic import Field

from ltx_engines.errors import UserError
from ltx_engines.file_entry import Count, Frozen

PerStep = float | tuple[float, ...]
"""One number for the whole run, or one for each of the guidance timesteps."""

DOWNSCALE_FACTOR = 0.6666666
"""Of all the original's multi-scale files. Not 2/3: sizes are rounded down."""

Skipped = Annotated[int, Field(ge=0)]
NO_SKIPS = {"skip_initial_inference_steps": 0, "skip_final_inference_steps": 0}


class Pass(Frozen):
    """One denoising: noise levels, guidance, sampler. The values are the original base config's."""

    num_inference_steps: Count = 40
    timesteps: tuple[float, ...] | None = None
    skip_initial_inference_steps: Skipped = 0
    skip_final_inference_steps: Skipped = 0
    guidance_scale: PerStep = 3.0
    stg_scale: PerStep = 1.0
    rescaling_scale: PerStep = 0.7
    skip_block_list: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = (19,)
    guidance_timesteps: tuple[float, ...] | None = None
    cfg_star_rescale: bool = False
    stochastic_sampling: bool = False
    tone_map_compression_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0

    def counted(self, count: int) -> Self:
        """In `count` steps; what is skipped of them stays the same share."""
        skips = NO_SKIPS
        if self.timesteps is None:
            share = count / self.num_inference_steps
            skips = {key: round(getattr(self, key) * share) for key in NO_SKIPS}
        return self.model_copy(update={**skips, "timesteps": None, "num_inference_steps": count})

    def changed(self, said: dict[str, Any]) -> "Pass":
        """With what a config says of it. A list of steps replaces a number of them, and the
        reverse."""
        start: Pass = self
        if (levels := said.get("timesteps")) is not None:
            update = {"num_inference_steps": max(len(levels), 1), **NO_SKIPS}
            start = self.model_copy(update=update)
        elif (count := said.get("num_inference_steps")) is not None:
            start = self.counted(count)
        return Pass(**{key: getattr(start, key) for key in Pass.model_fields} | said)

    def without_lists(self) -> Self:
        """The steps and scales of a model, without what goes along with one schedule; the blocks,
        too, are named by whoever names the scales."""
        plain: dict[str, Any] = {**NO_SKIPS, "tone_map_compression_ratio": 0.0}
        plain |= {"guidance_timesteps": None, "cfg_star_rescale": False, "skip_block_list": None}
        for scale, none in (("guidance_scale", 1.0), ("stg_scale", 0.0), ("rescaling_scale", 1.0)):
            if isinstance(getattr(self, scale), tuple):
                plain[scale] = none
        return self.model_copy(update=plain)

    def perturbed(self) -> tuple[int, ...]:
        """The blocks that some step leaves out."""
        if largest(self.stg_scale) <= 0:
            return ()
        found: list[int] = []
        for entry in self.skip_block_list or ():
            found += entry if isinstance(entry, tuple) else (entry,)
        return tuple(found)

    def branches(self) -> int:
        """Of a step at most: the prompt's, and one each for CFG and STG."""
        return 1 + (largest(self.guidance_scale) > 1) + (largest(self.stg_scale) > 0)

    def check_guidance(self, *, distilled: bool, what: str = "this checkpoint") -> None:
        """`what` is or is not distilled.

        Raises:
            UserError: a distilled model is guided.
        """
        stg = largest(self.stg_scale) if self.perturbed() else 0
        told = (("guidance_scale", largest(self.guidance_scale), 1), ("stg_scale", stg, 0))
        for key, scale, none in told:
            if distilled and scale > none:
                raise UserError(
                    f"{key} is {scale:g}, but {what} is distilled: guidance was trained "
                    f"into it, and more makes the picture coarse; use {key} {none}, or a "
                    "checkpoint that is not distilled"
                )


class Defaults(Pass):
    """With a second pass the fields of `Pass` are the first one's, which is made at
    `downscale_factor` of the size."""

    width: Count = 1216
    height: Count = 704
    num_frames: Count = 121
    frame_rate: Annotated[float, Field(gt=0)] = 30.0
    decode_timestep: float = 0.05
    decode_noise_scale: float = 0.025
    negative_prompt: str = "worst quality, inconsistent motion, blurry, jittery, distorted"
    second: Pass | None = None
    downscale_factor: Annotated[float, Field(gt=0, le=1)] = DOWNSCALE_FACTOR

    @property
    def passes(self) -> tuple[Pass, ...]:
        return (self,) if self.second is None else (self, self.second)


def largest(scale: PerStep) -> float:
    return max(scale, default=0.0) if isinstance(scale, tuple) else scale
