"""What a latent upsampler's file says it is: sizes and which sides of the grid it doubles.

The file's `config` metadata is one flat JSON object, the original's `LatentUpsampler.config()`.
Nothing here needs torch.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from ltx_ref.checkpoint import CheckpointError, Header

CLASS_NAME = "LatentUpsampler"

SILENT = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})
"""Keys that change no number."""

GROUPS = 32
"""Of every group norm, in all releases."""


@dataclass(frozen=True, slots=True)
class UpsamplerConfig:
    """The defaults are those of the original's `from_config`, not of a release."""

    in_channels: int = 4
    mid_channels: int = 128
    num_blocks_per_stage: int = 4
    dims: int = 2
    spatial_upsample: bool = True
    temporal_upsample: bool = False

    def __post_init__(self) -> None:
        for name, least in (("in_channels", 1), ("mid_channels", 1), ("num_blocks_per_stage", 0)):
            if (size := getattr(self, name)) < least:
                raise CheckpointError(f"config: {name} is {size}, wanted at least {least}")
        if self.mid_channels % GROUPS:
            raise CheckpointError(
                f"config: mid_channels is {self.mid_channels}, wanted a multiple of {GROUPS}"
            )
        if self.dims not in (2, 3):
            raise CheckpointError(f"config: dims is {self.dims}, wanted 2 or 3")
        if not (self.spatial_upsample or self.temporal_upsample):
            raise CheckpointError(
                "config: spatial_upsample and temporal_upsample are both false, wanted one true"
            )
        if self.temporal_upsample and self.dims == 2:
            raise CheckpointError("config: temporal_upsample with dims 2, wanted dims 3")

    @property
    def stride(self) -> tuple[int, int, int]:
        """Cells that one cell of the latent grid becomes: in time, rows and columns.

        In time the first frame stays one: F frames become 2F - 1.
        """
        side = 2 if self.spatial_upsample else 1
        return 2 if self.temporal_upsample else 1, side, side


SPATIAL = UpsamplerConfig(128, 512, 4, 3, spatial_upsample=True, temporal_upsample=False)
TEMPORAL = UpsamplerConfig(128, 512, 4, 3, spatial_upsample=False, temporal_upsample=True)
"""ltxv-spatial-upscaler-0.9.7, -0.9.8 and ltxv-temporal-upscaler-0.9.7 (diffusers
scripts/convert_ltx_to_diffusers.py)."""


def read_upsampler_config(header: Header, ignore: Collection[str] = ()) -> UpsamplerConfig:
    """The configuration in a file's metadata; `ignore` names unknown keys to pass over.

    Raises:
        CheckpointError: there is none, or a key or value is not known.
    """
    if "config" not in header.metadata:
        raise CheckpointError(
            f"{header.path} has no 'config' metadata; "
            "wanted the original upscaler file (ltxv-spatial-upscaler-*.safetensors)"
        )
    try:
        config = json.loads(header.metadata["config"])
    except (ValueError, RecursionError):
        raise CheckpointError(f"{header.path}: metadata 'config' is not JSON") from None
    try:
        return parse_upsampler_config(config, ignore)
    except CheckpointError as error:
        raise CheckpointError(f"{header.path}: {error}") from None


def parse_upsampler_config(config: Any, ignore: Collection[str] = ()) -> UpsamplerConfig:
    """The metadata's JSON object as an UpsamplerConfig.

    Raises:
        CheckpointError: a key or value is not known.
    """
    if not isinstance(config, dict):
        raise CheckpointError("metadata 'config' is not a JSON object")
    if (found := config.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise CheckpointError(f"config is of a {found}, wanted a {CLASS_NAME}")
    return UpsamplerConfig(**_known(config, ignore))


def _known(table: Mapping[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    kinds = {field.name: type(field.default) for field in fields(UpsamplerConfig)}
    sizes = {key: value for key, value in table.items() if key not in SILENT | set(ignore)}
    for key, value in sizes.items():
        if key not in kinds:
            near = get_close_matches(key, kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(kinds)}"
            raise CheckpointError(f"unknown key {key!r} in the latent upsampler's config; {hint}")
        if type(value) is not kinds[key]:
            raise CheckpointError(f"config: {key} is {value!r}, wanted {kinds[key].__name__}")
    return sizes


def check_latent_channels(config: UpsamplerConfig, channels: int) -> None:
    """
    Raises:
        CheckpointError: the upsampler is for latents of another VAE.
    """
    if config.in_channels != channels:
        raise CheckpointError(
            f"the latent upsampler is for latents of {config.in_channels} channels, the "
            f"checkpoint's VAE has {channels}; take the upscaler released with the checkpoint"
        )
