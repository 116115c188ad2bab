"""How the original runs each of its releases, by name: what its configs/ltxv-*.yaml say, as facts.

`pipeline_config.py` reads a preset as it reads a file. Keys that are the same in all of them and
decide nothing here (the text encoder, who rewrites prompts) are left out.
Source: Lightricks/LTX-Video configs/, at 5260738; those of 0.9.7 at 98a0ce6.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ltx_engines.errors import UserError, nearest

Settings = dict[str, Any]
Size = Literal["2B", "13B"]

PREFIX = "preset:"
"""Before a preset's name, where else the path of a file is given."""

LAYERS: Mapping[int, Size] = MappingProxyType({28: "2B", 48: "13B"})
"""Transformer blocks by which the sizes are told apart."""


@dataclass(frozen=True, slots=True)
class Release:
    """A checkpoint of Lightricks'. `distilled` ones list the noise levels that they know."""

    file: str
    size: Size
    distilled: bool = False


@dataclass(frozen=True, slots=True)
class Preset:
    """`precision` is the checkpoint's, which a bundle has decided for itself."""

    name: str
    release: Release
    settings: Settings
    precision: Literal["bfloat16", "float8_e4m3fn"] = "bfloat16"

    @property
    def steps(self) -> tuple[int, ...]:
        """Of each pass: what is skipped is not made."""
        settings = self.settings
        passes = [settings[key] for key in ("first_pass", "second_pass") if key in settings]
        return tuple(map(_steps, passes or [settings]))


COMMON: Settings = {
    "stg_mode": "attention_values",
    "decode_timestep": 0.05,
    "decode_noise_scale": 0.025,
    "sampler": "from_checkpoint",
    "stochastic_sampling": False,
}
NO_GUIDANCE: Settings = {"guidance_scale": 1, "stg_scale": 0, "rescaling_scale": 1}

BASE: Settings = COMMON | {
    "pipeline_type": "base",
    "guidance_scale": 3,
    "stg_scale": 1,
    "rescaling_scale": 0.7,
    "skip_block_list": [19],
    "num_inference_steps": 40,
}
BASE_DISTILLED: Settings = (
    COMMON
    | NO_GUIDANCE
    | {"pipeline_type": "base", "num_inference_steps": 8, "stochastic_sampling": True}
)
MULTI_SCALE: Settings = COMMON | {"pipeline_type": "multi-scale", "downscale_factor": 0.6666666}

# Block 42 is perturbed in no step, for stg_scale is 0: it may be beyond the last of a 2B model.
DISTILLED: Settings = MULTI_SCALE | {
    "first_pass": NO_GUIDANCE
    | {
        "timesteps": [1.0, 0.9937, 0.9875, 0.9812, 0.9750, 0.9094, 0.7250],
        "skip_block_list": [42],
    },
    "second_pass": NO_GUIDANCE | {"timesteps": [0.9094, 0.7250, 0.4219], "skip_block_list": [42]},
}
TONE_MAPPED: Settings = DISTILLED | {
    "second_pass": DISTILLED["second_pass"] | {"tone_map_compression_ratio": 0.6}
}
DEV: Settings = MULTI_SCALE | {
    "first_pass": {
        "guidance_scale": [1, 1, 6, 8, 6, 1, 1],
        "stg_scale": [0, 0, 4, 4, 4, 2, 1],
        "rescaling_scale": [1, 1, 0.5, 0.5, 1, 1, 1],
        "guidance_timesteps": [1.0, 0.996, 0.9933, 0.9850, 0.9767, 0.9008, 0.6180],
        "skip_block_list": [[], [11, 25, 35, 39], [22, 35, 39], [28], [28], [28], [28]],
        "num_inference_steps": 30,
        "skip_final_inference_steps": 3,
        "cfg_star_rescale": True,
    },
    "second_pass": {
        "guidance_scale": [1],
        "stg_scale": [1],
        "rescaling_scale": [1],
        "guidance_timesteps": [1.0],
        "skip_block_list": [27],
        "num_inference_steps": 30,
        "skip_initial_inference_steps": 17,
        "cfg_star_rescale": True,
    },
}

UPSCALER_097: Settings = {"spatial_upscaler_model_path": "ltxv-spatial-upscaler-0.9.7.safetensors"}
UPSCALER_098: Settings = {"spatial_upscaler_model_path": "ltxv-spatial-upscaler-0.9.8.safetensors"}


def _table() -> dict[str, Preset]:
    two, thirteen = "ltxv-2b-0.9", "ltxv-13b-0.9"
    presets = [
        Preset(two, Release("ltx-video-2b-v0.9.safetensors", "2B"), BASE),
        Preset(f"{two}.1", Release("ltx-video-2b-v0.9.1.safetensors", "2B"), BASE),
        Preset(f"{two}.5", Release("ltx-video-2b-v0.9.5.safetensors", "2B"), BASE),
        Preset(f"{two}.6-dev", Release("ltxv-2b-0.9.6-dev-04-25.safetensors", "2B"), BASE),
        Preset(
            f"{two}.6-distilled",
            Release("ltxv-2b-0.9.6-distilled-04-25.safetensors", "2B", distilled=True),
            BASE_DISTILLED,
        ),
        *_both(f"{two}.8-distilled", "2B", DISTILLED | UPSCALER_098),
        *_both(f"{thirteen}.7-dev", "13B", DEV | UPSCALER_097),
        *_both(f"{thirteen}.7-distilled", "13B", DISTILLED | UPSCALER_097),
        *_both(f"{thirteen}.8-dev", "13B", DEV | UPSCALER_098),
        *_both(f"{thirteen}.8-distilled", "13B", TONE_MAPPED | UPSCALER_098),
    ]
    return {preset.name: preset for preset in presets}


def _both(name: str, size: Size, settings: Settings) -> tuple[Preset, Preset]:
    """The release as it is, and its linear layers in fp8."""
    distilled = name.endswith("-distilled")
    whole, fp8 = (
        Release(f"{file}.safetensors", size, distilled=distilled) for file in (name, f"{name}-fp8")
    )
    return (
        Preset(name, whole, settings),
        Preset(f"{name}-fp8", fp8, settings, "float8_e4m3fn"),
    )


PRESETS: Mapping[str, Preset] = MappingProxyType(_table())

RELEASES: Mapping[str, Release] = MappingProxyType(
    {preset.release.file: preset.release for preset in PRESETS.values()}
)
"""By the name of the file."""


def find(name: str) -> Preset:
    """
    Raises:
        UserError: there is none of that name.
    """
    if (preset := PRESETS.get(name)) is None:
        raise UserError(
            f"unknown preset {name!r}, `ltx-trt presets` lists those that there are"
            f"{nearest(name, PRESETS)}"
        )
    return preset


def named(name: str) -> Path:
    """A preset, in the place of a file's path.

    Raises:
        UserError: there is none of that name.
    """
    return Path(f"{PREFIX}{find(name).name}")


def chosen(path: Path | None, preset: str | None) -> Path | None:
    """What `--pipeline-config` and `--preset` say together.

    Raises:
        UserError: both are given, or there is no such preset.
    """
    if preset is None:
        return path
    if path is not None:
        raise UserError("--preset and --pipeline-config both say how to run; leave one of them out")
    return named(preset)


def lines() -> Iterator[str]:
    """A table of all."""
    width = max(map(len, PRESETS))
    for preset in PRESETS.values():
        kind = "distilled" if preset.release.distilled else "guided"
        passes = "two passes" if len(preset.steps) == 2 else "one pass"
        steps = " + ".join(map(str, preset.steps))
        yield f"{preset.name:<{width}}  {preset.release.size:>3}, {kind}, {passes}: {steps} steps"


def as_json() -> str:
    """All, with every setting."""
    return json.dumps({name: asdict(preset) for name, preset in PRESETS.items()})


def fit(release: Release, what: str, layers: int, *, distilled: bool) -> tuple[str, ...]:
    """Notes on `what`, which was made for `release`, beside a model of so many layers; `distilled`
    if the model lists its noise levels.

    A model that is no release's size is somebody's own, and a list of noise levels is easily lost,
    as when a distilled LoRA is fused into another checkpoint: nothing speaks against either.

    Raises:
        UserError: it is for another model.
    """
    size = LAYERS.get(layers)
    if size not in (None, release.size):
        raise UserError(
            f"{what} is for {release.size} models, this one is {size} ({layers} blocks); "
            f"{_instead(size, distilled)}"
        )
    if distilled and not release.distilled:
        raise UserError(
            f"{what} is for models that are not distilled, this one is (it knows some noise "
            f"levels only); {_instead(size or release.size, distilled)}"
        )
    notes = []
    if size is None:
        notes.append(f"{what} is for {release.size} models, this one has {layers} blocks")
    if release.distilled and not distilled:
        notes.append(f"{what} is for distilled models, and this one does not say that it is")
    return tuple(notes)


def _steps(settings: Settings) -> int:
    if "timesteps" in settings:
        return len([*settings["timesteps"]])
    skips = [settings.get(f"skip_{end}_inference_steps", 0) for end in ("initial", "final")]
    return int(settings["num_inference_steps"] - sum(skips))


def _instead(size: Size | None, distilled: bool) -> str:
    names = [
        preset.name
        for preset in PRESETS.values()
        if (preset.release.size, preset.release.distilled) == (size, distilled)
        and preset.precision == "bfloat16"
    ]
    return f"use {' or '.join(names)}"
