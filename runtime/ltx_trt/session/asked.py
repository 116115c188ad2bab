"""What a clip asks of the engines of each stage, known before one is opened."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ltx_engines.bundle import Manifest
from ltx_engines.shapes import VideoShape
from ltx_engines.stages import SAMPLER_STEP
from ltx_trt.passes import UPSAMPLER, Pass
from ltx_trt.pipeline import Planned
from ltx_trt.session import sizes


@dataclass(frozen=True, slots=True)
class Asked:
    """`sizes` by the names of the axes."""

    stage: str
    clip: VideoShape
    sizes: Mapping[str, int]

    @property
    def branches(self) -> int:
        return self.sizes["batch"]


def asked(planned: Planned, manifest: Manifest) -> Iterator[Asked]:
    def of(stage: str, clip: VideoShape, **more: int) -> Asked:
        return Asked(stage, clip, {**sizes.of_clip(clip, manifest), "batch": 1, **more})

    yield of("text_encoder", planned.shape)
    for clip in planned.encoded:
        yield of("vae_encoder", clip)
    for one in planned.passes:
        yield from _denoising(one, manifest)
    for one in planned.passes[:-1]:
        yield of(UPSAMPLER, one.shape)
    yield of("vae_decoder", planned.shape)


def _denoising(one: Pass, manifest: Manifest) -> Iterator[Asked]:
    clip = sizes.of_clip(one.shape, manifest) | {"tokens": one.tokens}
    clip["timesteps"] = one.tokens if one.per_token else 1
    for batch in sorted(set(one.batches)):
        yield Asked("transformer", one.shape, {**clip, "batch": batch})
    if one.loops:  # else each step comes back to the host
        yield Asked(SAMPLER_STEP, one.shape, {**clip, "batch": 1})


def advice(planned: Planned, manifest: Manifest) -> str:
    """The options of `build-engine` for such a clip."""
    clips = dict.fromkeys(one.shape for one in planned.passes)
    words = [f"--shape {clip.width}x{clip.height}x{clip.frames}" for clip in clips]
    if manifest.defaults.second is not None:  # else shapes are seen as they are anyway
        words.append("--passes 1")
    if any(one.per_token for one in planned.passes):
        words.append(f"--conditioning {max(map(_keyframes, planned.passes))}")
    return " ".join(words)


def _keyframes(one: Pass) -> int:
    _, rows, columns = one.shape.latent
    return one.extra // (rows * columns)
