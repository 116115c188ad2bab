"""Step caching as the command line knows it: from options to a request, and what came of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ltx_engines import metrics
from ltx_engines.errors import UserError
from ltx_trt import cache_table
from ltx_trt.cache_calibration import clips_of
from ltx_trt.cache_options import CacheWishes
from ltx_trt.pipeline import Event, StepDone
from ltx_trt.request import Request
from ltx_trt.step_caching import Caching, Method, parse

Frames = NDArray[np.uint8]

ASIDE = ("text_encoder", "write")
"""Of a run's seconds, what caching has no part in."""


def caching(wishes: CacheWishes, bundle: Path) -> Caching | None:
    """None if none is wished. A bundle's own table need not be named.

    Raises:
        UserError: the wishes contradict each other, or name no table.
    """
    if wishes.steps is None:
        if option := wishes.idle():
            raise UserError(f"{option} has no use without --cache-steps METHOD; add it")
        return None
    method, threshold = parse(wishes.steps)
    table = table_of(wishes, bundle)
    return Caching(
        method,
        threshold,
        first=wishes.first,
        last=1 if wishes.last is None else wishes.last,
        retention=wishes.retention,
        longest=wishes.longest,
        table=None if table is None else cache_table.read(table),
    )


def table_of(wishes: CacheWishes, bundle: Path) -> Path | None:
    """The file that is named, or else the bundle's own if the method needs one."""
    if wishes.table is not None or wishes.steps is None:
        return wishes.table
    method, _ = parse(wishes.steps)
    own = bundle / cache_table.FILE
    return own if method is not Method.easycache and own.is_file() else None


def attach(
    request: Request, wish: Caching | None, loras: tuple[str, ...]
) -> tuple[Request, tuple[str, ...]]:
    """The request with it, and notes on what may cost quality."""
    return replace(request, caching=wish), () if wish is None else _notes(request, wish, loras)


def _notes(request: Request, wish: Caching, loras: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    if request.second is not None:
        notes.append("step caching is for the first pass; the second one computes all its steps")
    if wish.table is None:
        return tuple(notes)
    notes += wish.table.differences(clips_of(request, loras))
    if request.conditioning or request.input_video is not None:
        notes.append("the cache table was measured without images or videos; they may lose more")
    if wish.method is Method.teacache and (note := wish.table.teacache.doubt()):
        notes.append(note)
    return tuple(notes)


@dataclass(frozen=True, slots=True)
class Hits:
    """`reused_steps` count from 1, through all passes."""

    method: str
    threshold: float
    computed: int
    reused: int
    hit_rate: float
    reused_steps: tuple[int, ...]

    @classmethod
    def of(cls, wish: Caching, events: Iterable[Event]) -> Self:
        steps = [event for event in events if isinstance(event, StepDone)]
        reused = tuple(step.index for step in steps if step.reused)
        return cls(
            method=wish.method.value,
            threshold=wish.threshold,
            computed=len(steps) - len(reused),
            reused=len(reused),
            hit_rate=round(len(reused) / len(steps), 4),
            reused_steps=reused,
        )

    def as_text(self) -> str:
        return (
            f"{self.method}:{self.threshold:g} computed {self.computed} steps and reused "
            f"{self.reused} ({self.hit_rate:.0%})"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A clip, and by stage the seconds that it took."""

    frames: Frames
    seconds: Mapping[str, float]


def check_comparable(request: Request) -> None:
    """
    Raises:
        UserError: frames are too small for SSIM.
    """
    if min(request.height, request.width) < metrics.WINDOW:
        raise UserError(
            f"--compare measures SSIM in windows of {metrics.WINDOW} pixels, frames are "
            f"{request.width} x {request.height}; leave it out, or make them larger"
        )


@dataclass(frozen=True, slots=True)
class Loss:
    """What caching has cost and gained, against a clip of the same seed without it, which took
    `seconds`. Speed-ups are of all that a GPU does after the text, and of the transformer alone.
    All but the transformer does the same for both, and counts as it was without caching: what is
    slow at its first use was used by then. PSNR in dB."""

    speed_up: float
    transformer_speed_up: float
    psnr: float
    ssim: float
    seconds: dict[str, float]

    @classmethod
    def of(cls, cached: Made, plain: Made) -> Self:
        theirs, stage = plain.seconds, "transformer"
        ours = {**theirs, stage: cached.seconds[stage]}
        return cls(
            speed_up=round(_work(theirs) / _work(ours), 3),
            transformer_speed_up=round(theirs[stage] / ours[stage], 3),
            psnr=round(metrics.psnr(cached.frames, plain.frames), 3),
            ssim=round(metrics.similarity(cached.frames, plain.frames).ssim, 5),
            seconds={name: round(value, 4) for name, value in theirs.items()},
        )

    def as_text(self) -> str:
        return (
            f"against the clip without caching: {self.speed_up:.2f} times as fast (the transformer "
            f"{self.transformer_speed_up:.2f}), PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}"
        )


def _work(seconds: Mapping[str, float]) -> float:
    return sum(s for name, s in seconds.items() if name not in ASIDE and not name.endswith("_open"))
