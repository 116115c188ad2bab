"""What a run says while it goes on: the plan, each stage as it opens, each step, the frames."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ltx_engines.shapes import TIME, VideoShape
from ltx_trt.long_video import Window
from ltx_trt.passes import UPSAMPLER, Pass

Frames = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Planned:
    """Before anything is loaded: the passes over the latents, the last of which is decoded, and
    what the VAE's encoder is to read."""

    passes: tuple[Pass, ...]
    notes: tuple[str, ...] = ()
    encoded: tuple[VideoShape, ...] = ()
    windows: tuple[Window, ...] = ()
    """Empty is one."""

    @property
    def shape(self) -> VideoShape:
        """Of the clip that is decoded."""
        last = self.passes[-1].shape
        if not self.windows:
            return last
        return replace(last, frames=(self.windows[-1].end - 1) * TIME + 1)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The noise level before each step of all passes, and the last one's end."""
        return (
            *(s for one in self.passes for s in one.sigmas),
            self.passes[-1].table[-1].sigma_next,
        )

    @property
    def sigmas_by_pass(self) -> tuple[tuple[float, ...], ...]:
        """Of each pass, the noise level before each step and where the last one ends."""
        return tuple((*one.sigmas, one.table[-1].sigma_next) for one in self.passes)

    @property
    def batches(self) -> tuple[int, ...]:
        """Branches of each step of all passes, in all windows."""
        count = max(1, len(self.windows))
        return tuple(batch for one in self.passes for batch in one.batches * count)

    @property
    def stages(self) -> tuple[str, ...]:
        """That will be opened, in order; each once."""
        encoder = ("vae_encoder",) if self.encoded else ()
        upsampler = (UPSAMPLER,) if len(self.passes) > 1 else ()
        return ("text_encoder", *encoder, "transformer", *upsampler, "vae_decoder")


@dataclass(frozen=True, slots=True)
class StageOpened:
    stage: str
    seconds: float


@dataclass(frozen=True, slots=True)
class PromptEncoded:
    tokens: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MediaEncoded:
    """`count` images and videos are latents."""

    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """`index` counts from 1, through all passes; the latents are now at noise level `sigma`.
    `reused`: the transformer was not run (`step_caching`)."""

    index: int
    total: int
    sigma: float
    seconds: float
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Upsampled:
    """Latents of `shape` are what the next pass begins from."""

    shape: VideoShape
    seconds: float


@dataclass(frozen=True, slots=True)
class Decoded:
    """The next frames [n, height, width, 3] of a clip of `total`, cropped to the wished size;
    `first` counts from 0. One or more for each clip, in order."""

    frames: Frames
    first: int
    total: int
    seconds: float


Event = Planned | StageOpened | PromptEncoded | MediaEncoded | StepDone | Upsampled | Decoded


def frames_of(events: Iterable[Event]) -> Frames:
    """The whole clip, for whoever does not want it in parts."""
    return np.concatenate([event.frames for event in events if isinstance(event, Decoded)])
