"""Draw and encode the clips once: the denoiser then trains on latents alone."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from ltx_ref.ltx_video.vae import VideoVAE
from tiny import clips
from tiny.clips import Format, Scene
from tiny.recipe import Recipe
from tiny.training import save, to_pixels

BATCH = 8


@dataclass(frozen=True, slots=True)
class Encoded:
    """Clips of one format: normalised latents [clips, tokens, channels], and what they show."""

    form: Format
    share: float
    latents: Tensor
    scenes: list[Scene]


@torch.no_grad()
def encode(vae: VideoVAE, recipe: Recipe, count: int, seed: int) -> list[Encoded]:
    """Encode `count` clips, measure the channel statistics and put them into the VAE."""
    rng = np.random.default_rng((seed, 1))
    found = []
    for share, form in recipe.formats:
        scenes = [clips.sample(rng) for _ in range(round(count * share))]
        means = []
        for start in track(range(0, len(scenes), BATCH), f"encoding {form.width}x{form.height}"):
            drawn = [clips.draw(scene, form, rng) for scene in scenes[start : start + BATCH]]
            mean, _ = vae.encoder(to_pixels(torch.from_numpy(np.stack(drawn))))
            means.append(mean.flatten(2).transpose(1, 2))
        found.append(Encoded(form, share, torch.cat(means), scenes))

    tokens = torch.cat([part.latents.flatten(0, 1) for part in found]).double()
    statistics = vae.per_channel_statistics
    statistics.get_buffer("mean-of-means").copy_(tokens.mean(0))
    statistics.get_buffer("std-of-means").copy_(tokens.std(0))
    for part in found:
        part.latents.sub_(statistics.get_buffer("mean-of-means"))
        part.latents.div_(statistics.get_buffer("std-of-means"))
    return found


def load_or_encode(
    vae: VideoVAE, recipe: Recipe, count: int, work: Path, seed: int
) -> list[Encoded]:
    """The encoded clips of an earlier run in `work`, statistics included, or new ones."""
    file = work / "latents.pt"
    statistics = vae.per_channel_statistics
    if file.exists():
        state = torch.load(file, weights_only=True)
        statistics.load_state_dict(state["statistics"])
        return [
            Encoded(Format(*form), share, latents, [Scene(*names) for names in scenes])
            for form, share, latents, scenes in state["clips"]
        ]
    found = encode(vae, recipe, count, seed)
    rows = [
        (astuple(part.form), part.share, part.latents, [astuple(scene) for scene in part.scenes])
        for part in found
    ]
    save(file, {"statistics": statistics.state_dict(), "clips": rows})
    return found
