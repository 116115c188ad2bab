"""The passes of a run: one, or one at a part of the size and then one at twice that size."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ltx_engines.bundle import Manifest
from ltx_engines.errors import UserError
from ltx_engines.shapes import SPACE, TIME, VideoShape, counted, snap, wished_size
from ltx_trt import conditioning, guidance, multi_scale, sampler, schedule
from ltx_trt.conditioning import Item
from ltx_trt.guidance import Guidance, StepGuidance
from ltx_trt.long_video import Window, windows
from ltx_trt.request import Request, SecondPass
from ltx_trt.sampler import Table
from ltx_trt.schedule import Steps

UPSAMPLER = "latent_upsampler"


@dataclass(frozen=True, slots=True)
class Pass:
    """What is known of a walk down the noise levels before the first engine is loaded.

    `extra` tokens stand before the clip's own; with `per_token` each has a noise level of its own.
    With `cached` some steps do not run the transformer (`step_caching`).
    """

    shape: VideoShape
    table: Table
    guidance: tuple[StepGuidance, ...]
    extra: int = 0
    per_token: bool = False
    cached: bool = False

    @property
    def loops(self) -> bool:
        """Whether all of it can be given to a loop where the transformer is."""
        return not self.per_token and not self.cached

    @property
    def tokens(self) -> int:
        """That the transformer sees."""
        return self.shape.tokens + self.extra

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Before each step."""
        return tuple(step.sigma for step in self.table)

    @property
    def batches(self) -> tuple[int, ...]:
        """Branches of each step."""
        return tuple(len(guide.branches) for guide in self.guidance)

    @property
    def prompts(self) -> int:
        """The rows of all different sets of branches: what a loop on the GPU has there from its
        beginning."""
        return sum(map(len, {guide.branches for guide in self.guidance}))

    @property
    def noises(self) -> int:
        """The steps that add noise."""
        return sum(bool(step.noise) for step in self.table)

    @property
    def needs_uncond(self) -> bool:
        return any("uncond" in guide.branches for guide in self.guidance)


def plan(request: Request, manifest: Manifest) -> tuple[Pass, ...]:
    """
    Raises:
        UserError: the request is not for this model, or contradicts itself.
    """
    made = walked = choose_shape(request)
    if (chunks := request.chunks) is not None and chunks.frames < made.frames:
        walked = replace(made, frames=chunks.frames)
    conditioning.check(request.conditioning, made)
    _check_video(request, made)
    if (request.conditioning or request.input_video is not None) and (
        "vae_encoder" not in manifest.stages
    ):
        raise UserError(
            "this bundle has no vae_encoder, which reads images and videos; export it with "
            "ltx-export onnx --stages, or leave them out"
        )
    if request.second is None:
        return (_pass(request, request, walked, manifest),)
    _check_upsampler(manifest)
    factor = request.second.downscale_factor
    small = multi_scale.first_size(made.height, made.width, factor)
    first = VideoShape(walked.frames, *small)
    if first.tokens == 1:
        _, least = wished_size(4 * SPACE, 4 * SPACE, factor)
        raise UserError(
            f"a first pass at {factor:g} of {made.height} x {made.width} (height x width) is of a "
            f"single latent, which has no statistics; make the height or the width at least {least}"
            f", or the clip {TIME + 1} frames long"
        )
    second = VideoShape(walked.frames, *(multi_scale.ENLARGES * size for size in small))
    found = (
        _pass(request, request, first, manifest),
        _pass(request, request.second, second, manifest),
    )
    if (level := found[1].sigmas[0]) >= 1:
        raise UserError(
            f"the second pass begins at noise level {level:g}, at which nothing of the first is "
            "left; let its timesteps begin below 1, or skip its initial steps"
        )
    return found


def choose_shape(request: Request) -> VideoShape:
    """The smallest legal clip that holds the wished one, or an error if it must be exact."""
    size = (request.num_frames, request.height, request.width)
    return VideoShape(*size) if request.strict_shape else snap(*size)


def all_windows(request: Request) -> tuple[Window, ...]:
    """Those that the clip is made in, one after the other; mostly one."""
    return windows(choose_shape(request).latent[0], request.chunks)


def _by_window(request: Request) -> Iterator[tuple[Item, ...]]:
    """The items that stand beside each window's latents."""
    for window in all_windows(request):
        yield tuple(item for item in request.conditioning if window.makes(item.frame))


def _pass(
    request: Request, words: Request | SecondPass, shape: VideoShape, manifest: Manifest
) -> Pass:
    steps: Steps = words.steps
    guides: Guidance = words.guidance
    if steps.skip_initial and words is request and request.input_video is None:
        raise UserError(
            "skip_initial_inference_steps begins with a video; give one with --input-video, or "
            "remove it"
        )
    sigmas = schedule.sigmas(steps, manifest.scheduler, shape.tokens)
    schedule.check_allowed(sigmas, manifest.allowed_inference_steps)
    if words is request and request.input_video is not None and sigmas[0] >= 1:
        raise UserError(
            "the input video is to begin at noise level 1, at which nothing of it is left; say "
            "skip_initial_inference_steps, or timesteps below 1, in a --pipeline-config"
        )
    return Pass(
        shape,
        sampler.table(words.sampler, sigmas, eta=request.eta),
        guidance.plan(guides, sigmas, manifest.model.num_layers),
        extra=max(conditioning.extra_tokens(items, shape) for items in _by_window(request)),
        per_token=bool(request.conditioning or len(all_windows(request)) > 1),
        cached=words is request and request.caching is not None,
    )


def _check_video(request: Request, made: VideoShape) -> None:
    if request.input_video is None:
        return
    if request.second is not None:
        raise UserError(
            "--input-video is for a run of one pass, as in the original; leave it out, or leave "
            "out the second pass (a config or preset that is not multi-scale)"
        )
    frames, height, width = request.input_video.shape[2:]
    if (frames, height, width) != (made.frames, made.height, made.width):
        raise UserError(
            f"the input video is {counted(frames)} of {width} x {height}, the clip is made of "
            f"{made.frames} of {made.width} x {made.height}; make the two equal"
        )


def _check_upsampler(manifest: Manifest) -> None:
    if UPSAMPLER not in manifest.stages:
        raise UserError(
            f"this bundle has no {UPSAMPLER}, which a run of two passes needs; export it with "
            "ltx-export onnx --upsampler FILE, or choose a config or preset of one pass"
        )
    (upsampled,) = manifest.stages[UPSAMPLER].outputs
    if upsampled.axes[2:] != ("latent_frames", "upsampled_height", "upsampled_width"):
        raise UserError(
            f"the bundle's {UPSAMPLER} makes more frames or leaves the size as it is, a second "
            "pass wants twice the height and width; export a spatial one with --upsampler FILE"
        )
