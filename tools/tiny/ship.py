"""Write the trained parts as a user would have them: one checkpoint file, one text encoder."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from ltx_ref.ltx_video.model import LTXVideo
from ltx_ref.ltx_video.vae import VideoVAE
from tiny import text
from tiny.denoiser_training import Denoiser
from tiny.recipe import Recipe
from tiny.training import write_whole

CHECKPOINT = "ltx-tiny.safetensors"
TEXT_ENCODER = "text_encoder"


def ship(recipe: Recipe, vae: VideoVAE, denoiser: Denoiser, folder: Path) -> int:
    """The bytes written. Keys and metadata are those of LTX-Video 0.9.5."""
    model = LTXVideo(recipe.model)
    model.vae.load_state_dict(vae.state_dict())
    model.transformer.load_state_dict(denoiser.transformer.state_dict())
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    metadata = {"config": json.dumps(recipe.config), "format": "pt"}
    write_whole(folder / CHECKPOINT, lambda path: save_file(weights, path, metadata=metadata))
    text.save(denoiser.text_encoder, recipe, folder / TEXT_ENCODER)
    files = [folder / CHECKPOINT, *(folder / TEXT_ENCODER).iterdir()]
    return sum(file.stat().st_size for file in files)
