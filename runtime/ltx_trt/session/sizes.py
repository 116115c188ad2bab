"""What the axes of the stages' tensors have for sizes: of a clip, and of what an engine gives out.

The tables of `ltx_engines.stages` name the axes; sizes that follow from others are computed here.
"""

from collections.abc import Mapping

from ltx_engines.engine_entry import EngineEntry
from ltx_engines.manifest import Manifest, StageEntry
from ltx_engines.shapes import SPACE, TIME, VideoShape
from ltx_trt.session.engine_api import Shape

GRID = ("latent_frames", "latent_height", "latent_width")


def of_clip(clip: VideoShape, manifest: Manifest) -> dict[str, int]:
    """All but `batch`, which is each stage's own."""
    sizes = dict(zip(GRID, clip.latent, strict=True)) | {"tokens": clip.tokens, "timesteps": 1}
    if manifest.tokenizer is not None:
        sizes["text"] = manifest.tokenizer.max_length
    for noise in manifest.model.noise_blocks:
        number = noise.name.rpartition("_")[2]
        sizes[f"height_{number}"] = sizes["latent_height"] * noise.scale
        sizes[f"width_{number}"] = sizes["latent_width"] * noise.scale
    return sizes | _derived(sizes)


def of_grid(grid: tuple[int, ...]) -> dict[str, int]:
    """What follows from latent frames, rows and columns alone."""
    found = dict(zip(GRID, grid, strict=True))
    return found | _derived(found)


def outputs(entry: StageEntry | EngineEntry, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of each output, for inputs that the table allows."""
    sizes: dict[str, int] = {}
    for tensor in entry.inputs:
        named = zip(tensor.axes, inputs[tensor.name], strict=True)
        sizes |= {axis: size for axis, size in named if isinstance(axis, str)}
    sizes = _derived(sizes) | sizes
    return {
        tensor.name: tuple(a if isinstance(a, int) else sizes[a] for a in tensor.axes)
        for tensor in entry.outputs
    }


def _derived(sizes: Mapping[str, int]) -> dict[str, int]:
    """Of pixels and of an upsampled grid, as far as the latent grid is known."""
    rules = {
        "frames": ("latent_frames", TIME, 1 - TIME),
        "height": ("latent_height", SPACE, 0),
        "width": ("latent_width", SPACE, 0),
        "upsampled_frames": ("latent_frames", 2, -1),
        "upsampled_height": ("latent_height", 2, 0),
        "upsampled_width": ("latent_width", 2, 0),
        "stream_frames": ("latent_frames", TIME, 0),
        **{
            f"latent_{side}_x{scale}": (f"latent_{side}", scale, 0)
            for side in ("height", "width")
            for scale in (2, 4, 8, 16, 32)
        },
    }
    return {
        axis: factor * sizes[root] + offset
        for axis, (root, factor, offset) in rules.items()
        if root in sizes
    }
