"""Small latent upsamplers with random weights, in files like the released ones."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ltx_ref.ltx_video.upsampler import LatentUpsampler
from ltx_ref.ltx_video.upsampler_config import CLASS_NAME, SPATIAL
from tests.ref.oracles import randomize


def write_upsampler(path: Path, channels: int, dtype: torch.dtype = torch.float32) -> Path:
    config = replace(SPATIAL, in_channels=channels, mid_channels=64, num_blocks_per_stage=1)
    with torch.device("meta"):
        module = LatentUpsampler(config)
    randomize(module, seed=5)
    metadata = {"config": json.dumps({"_class_name": CLASS_NAME, **asdict(config)})}
    save_file(module.to(dtype).state_dict(), path, metadata)
    return path
