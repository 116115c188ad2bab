"""The sizes that an engine accepts, from the clips that were asked for and the table of tensors.

A clip is a bucket: a profile of its own, with kernels of its own, while the weights are shared
(TensorRT-RTX 1.7.1, 2026-11: a second profile of three 2048 x 2048 layers adds 15 kB to 25 MB).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ltx_engines.bundle import Defaults, Manifest, StageEntry, TensorEntry
from ltx_engines.cache_key import Profile, Range
from ltx_engines.errors import UserError
from ltx_engines.shapes import TIME, VideoShape
from ltx_engines.stages import STREAM
from ltx_export import axes
from ltx_export.build import Shapes
from ltx_export.pass_shapes import FIRST, SECOND, of_passes
from ltx_export.pass_shapes import ends as ends
from ltx_ref.text import MAX_LENGTH


@dataclass(frozen=True, slots=True)
class Buckets:
    """`shapes` are `WxHxF` or `WxHxF..WxHxF`; `branches` are the transformer's passes of a step.

    `conditioning` adds to each clip a profile for given images: with a timestep for each token, and
    room for so many keyframes' tokens before the clip's own (a sequence after frame 0 takes two).
    `vae_tile` is a shape too: the VAE's stages take it in the place of the clips. `vae_stream` are
    the frames that a decoder takes at a time which goes on where it was; without, it takes a clip.
    With two `passes` a shape is that of the whole clip, and the stages see those of its passes;
    None is as the bundle's defaults.
    """

    shapes: tuple[str, ...]
    branches: int
    text_tokens: int
    conditioning: int | None = None
    vae_tile: str | None = None
    vae_stream: int | None = None
    passes: int | None = None

    def words(self, stage: str) -> tuple[str, ...]:
        """The shapes of a stage."""
        if stage in VAE and self.vae_tile is not None:
            return (self.vae_tile,)
        return self.shapes


VAE = frozenset({"vae_encoder", "vae_decoder"})
"""Stages that can work in tiles."""


def check_stream(frames: int) -> None:
    """
    Raises:
        UserError: it is no number of whole latent frames.
    """
    if frames < TIME or frames % TIME:
        nearest = max(TIME, round(frames / TIME) * TIME)
        raise UserError(f"--vae-stream must be a multiple of {TIME}, not {frames}; try {nearest}")


def usual_branches(manifest: Manifest) -> int:
    """Of any step, by the bundle's defaults."""
    return max(wanted.branches() for wanted in manifest.defaults.passes)


def text_tokens(manifest: Manifest) -> int:
    return MAX_LENGTH if manifest.tokenizer is None else manifest.tokenizer.max_length


def profiles(stage: str, manifest: Manifest, buckets: Buckets) -> tuple[Profile, ...]:
    """One for each clip, or what a clip is to this stage, without doubles."""
    entry, derived = manifest.stages[stage], _derived(manifest)
    found: list[Profile] = []
    for sizes in _sizes(stage, replace(buckets, shapes=_seen(stage, manifest.defaults, buckets))):
        profile = {name: _size(name, sizes, derived) for name in names(entry)}
        if profile not in found:
            found.append(profile)
    return tuple(found)


def names(entry: StageEntry) -> tuple[str, ...]:
    """The axes of the inputs that have a name."""
    every = (axis for tensor in entry.inputs for axis in tensor.axes if isinstance(axis, str))
    return tuple(dict.fromkeys(every))


def shapes(entry: StageEntry, profile: Profile) -> dict[str, Shapes]:
    """Of each input."""

    def end(tensor: TensorEntry, index: int) -> tuple[int, ...]:
        return tuple(
            axis if isinstance(axis, int) else profile[axis][index] for axis in tensor.axes
        )

    return {
        tensor.name: (end(tensor, 0), end(tensor, 1), end(tensor, 2)) for tensor in entry.inputs
    }


def _seen(stage: str, defaults: Defaults, buckets: Buckets) -> tuple[str, ...]:
    """The shapes that a stage sees of each clip."""
    two = defaults.second is not None if buckets.passes is None else buckets.passes > 1
    if not two:
        return buckets.shapes
    scales = SCALES.get(stage, (FIRST, SECOND))
    return of_passes(buckets.shapes, defaults.downscale_factor, scales)


SCALES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"latent_upsampler": (FIRST,), "vae_decoder": (SECOND,), STREAM: (SECOND,)}
)
"""What a stage sees of a clip in two passes; the others see both."""


def _derived(manifest: Manifest) -> dict[str, axes.Derived]:
    scales = {int(n.name.rpartition("_")[2]): n.scale for n in manifest.model.noise_blocks}
    return {**axes.DERIVED, **axes.noise_axes(scales)}


def _sizes(stage: str, buckets: Buckets) -> Iterator[dict[str, Range]]:
    """The free axes of each bucket, and `timesteps`, which is free in an engine."""
    batch = {"transformer": buckets.branches, "text_encoder": min(buckets.branches, 2)}
    most = batch.get(stage, 1)
    keyframes = buckets.conditioning
    for word in buckets.words(stage):
        sizes = _grid(*ends(word)) | {"batch": (1, most, most), "text": _fixed(buckets.text_tokens)}
        if stage == STREAM and buckets.vae_stream is not None:
            yield sizes | {"latent_frames": _fixed(buckets.vae_stream // TIME)}
            continue
        if stage == "vae_encoder":
            yield from _readings(sizes, sequences=keyframes is not None)
            continue
        yield sizes | {"timesteps": (1, 1, 1)}
        if keyframes is not None and stage == "transformer":
            yield sizes | _conditioned(sizes, keyframes)


def _readings(sizes: dict[str, Range], *, sequences: bool) -> Iterator[dict[str, Range]]:
    """A clip, or a sequence of any length in it, and an image."""
    _, likely, most = sizes["latent_frames"]
    yield sizes | {"latent_frames": (1, likely, most)} if sequences else sizes
    yield sizes | {"latent_frames": (1, 1, 1)}


def _conditioned(sizes: Mapping[str, Range], keyframes: int) -> dict[str, Range]:
    """Tuned for as many as there may be."""
    least, _, most = sizes["tokens"]
    most += keyframes * sizes["latent_height"][2] * sizes["latent_width"][2]
    return dict.fromkeys(("tokens", "timesteps"), (least, most, most))


def _grid(least: VideoShape, most: VideoShape) -> dict[str, Range]:
    """A range is tuned for its last clip."""
    sides = ("latent_frames", "latent_height", "latent_width")
    pairs = dict(zip(sides, zip(least.latent, most.latent, strict=True), strict=True))
    pairs["tokens"] = (least.tokens, most.tokens)
    return {name: (min(pair), pair[1], max(pair)) for name, pair in pairs.items()}


def _fixed(size: int) -> Range:
    return size, size, size


def _size(name: str, sizes: Mapping[str, Range], derived: Mapping[str, axes.Derived]) -> Range:
    if name in sizes:
        return sizes[name]
    rule = derived[name]
    least, likely, most = (rule.factor * size + rule.offset for size in sizes[rule.root])
    return least, likely, most
