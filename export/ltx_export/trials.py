"""Videos of a quantized model against those of the model that it was made from.

Both are made by the reference: a trial is a checkpoint written with a recipe, loaded as any
quantized file is, and asked for the calibration's clips with the same noise.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from ltx_engines import metrics
from ltx_engines.errors import UserError
from ltx_engines.metrics import Frames
from ltx_export import calibrate, quantize, selection
from ltx_export.calibration import Calibration
from ltx_export.recipes import Recipe
from ltx_export.selection import Choice, Ranking
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video import model as ltx_video
from ltx_ref.ltx_video.model import LTXVideo
from ltx_ref.ltx_video.pipeline import Draw, decode, seeded

DECODING = 1 << 32
"""Added to a clip's seed: a decoder's noise is another stream than that of the latents."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to choose layers for, and on which clips, whose `out` is not read."""

    runs: calibrate.Order
    recipe: Recipe
    ranges: Calibration | None
    layers: Ranking
    target: float
    scratch: Path | None = None
    """A folder for one quantized checkpoint and the clips; else the system's."""


@dataclass(frozen=True, slots=True)
class Selected:
    """The recipe with its kept layers, and the similarity that videos made with it have."""

    recipe: Recipe
    choice: Choice


@dataclass(frozen=True, slots=True)
class Stage:
    """What all trials have in common."""

    order: Order
    plan: calibrate.Plan
    encoded: calibrate.Encoded
    folder: Path
    reference: tuple[Path, ...]
    """A file of frames for each run."""

    def recipe(self, kept: int) -> Recipe:
        why = f"kept for SSIM {self.order.target:g}"
        return selection.first(self.order.recipe, self.order.layers, kept, why)


def select(order: Order) -> Generator[str, None, Selected]:
    """The recipe with the fewest kept layers that reaches the target.

    Raises:
        UserError: it is not reached, or something else that the user can mend.
    """
    selection.check_target(order.target)
    yield "reading"
    with TemporaryDirectory(prefix=".trials-", dir=order.scratch) as name:
        folder = Path(name)
        plan = calibrate.check(replace(order.runs, out=folder / "ranges"))
        encoded = yield from calibrate.encode(plan)
        stage = Stage(order, plan, encoded, folder, ())
        paths = yield from _reference(stage)
        stage = replace(stage, reference=paths)
        choice = yield from selection.fewest(
            len(order.layers), lambda kept: _score(stage, kept), order.target
        )
    return Selected(stage.recipe(choice.kept), choice)


def _reference(stage: Stage) -> Generator[str, None, tuple[Path, ...]]:
    what, paths = "clips of the model itself", []
    yield what
    for index, clip in enumerate(clips(stage.plan, stage.encoded)):
        paths.append(stage.folder / f"{index}.npy")
        np.save(paths[-1], clip)
        yield f"{what}: {100 * len(paths) // len(stage.plan.runs)} %"
    return tuple(paths)


def _score(stage: Stage, kept: int) -> Generator[str, None, float]:
    """The mean SSIM of all clips, with so many layers kept."""
    what = f"trying with {kept} of {len(stage.order.layers)} layers kept"
    yield what
    path = stage.folder / "trial.safetensors"
    plan = quantize.plan(stage.plan.header, stage.recipe(kept), stage.order.ranges)
    try:
        for line in quantize.write(plan, path):
            yield f"{what}: {line}"
        runs = replace(stage.plan.order, checkpoint=path)
        quantized = replace(stage.plan, order=runs, header=read_header(path))
        found: list[float] = []
        for clip, file in zip(clips(quantized, stage.encoded), stage.reference, strict=True):
            reference: Frames = np.load(file, mmap_mode="r", allow_pickle=False)
            found.append(metrics.similarity(clip, reference).ssim)
            yield f"{what}: {100 * len(found) // len(stage.reference)} %"
    finally:
        path.unlink(missing_ok=True)
    return float(np.mean(found))


def clips(plan: calibrate.Plan, encoded: calibrate.Encoded) -> Iterator[Frames]:
    """Of each run."""
    with calibrate.session(plan, encoded) as ready, _decoding(ready) as model:
        for run in plan.runs:
            for step in ready.steps(run):
                latents = step.latents
            with torch.device(plan.device):
                draw = _drawing(plan.device, run.seed + DECODING)
                yield frames(decode(model, latents, run.request, draw))


@contextmanager
def _decoding(ready: calibrate.Session) -> Iterator[LTXVideo]:
    """A model whose decoder is on the session's device."""
    if not ready.plan.order.offload_blocks:
        yield ready.model
        return
    order = ready.plan.order
    model = ltx_video.load(order.checkpoint, order.ignore_config_keys)
    nn.Module.to(model.vae, ready.plan.device)
    yield model


def _drawing(device: torch.device, seed: int) -> Draw:
    with torch.device("cpu"):
        draw = seeded(seed)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        with torch.device("cpu"):
            return draw(shape).to(device)

    return drawn


def frames(pixels: Tensor) -> Frames:
    """1 3 F H W from 0 to 1 -> uint8 [F, H, W, 3], rounded down as by the runtime.

    Raises:
        UserError: a pixel is not a number.
    """
    if not torch.isfinite(pixels).all():
        raise UserError("the clip has pixels that are not numbers; calibrate again")
    shown = (pixels[0] * 255).to(torch.uint8)
    clip: Frames = shown.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return clip
