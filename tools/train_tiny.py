"""Train ltx-tiny, a small model of LTX-Video's architecture, from nothing in about an hour.

    python tools/train_tiny.py --out runtime/ltx_trt/ltx_tiny

Four stages, each taken up where an interrupted run left it: the video VAE on drawn clips, a set of
encoded clips, the text encoder on captions, then the transformer. Sizes are in
`tools/tiny/recipe.json`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ltx_ref.ltx_video.vae import VideoVAE
from tiny import denoiser_training, latents, recipe, ship, text_training, vae_training
from tiny.denoiser_training import Denoiser
from tiny.training import Budget

ROOT = Path(__file__).resolve().parents[1]
console = Console()


def main(  # noqa: PLR0913 - each is an option of the command
    out: Annotated[Path, typer.Option(help="Folder for checkpoint and text encoder.")] = ROOT
    / "runtime/ltx_trt/ltx_tiny",
    work: Annotated[Path, typer.Option(help="Folder for what a resumed run needs.")] = ROOT
    / "build/train-tiny",
    recipe_file: Annotated[Path, typer.Option("--recipe")] = recipe.RECIPE,
    minutes: Annotated[
        float | None, typer.Option(help="For the transformer; default: recipe's.")
    ] = None,
    vae_minutes: Annotated[float | None, typer.Option(help="Default: recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each training, instead of minutes.")] = None,
    clips: Annotated[int | None, typer.Option(help="Clips to encode; default: recipe's.")] = None,
    threads: Annotated[int, typer.Option(help="Of the processor; 0: all.")] = 0,
    seed: int = 0,
) -> None:
    """Train the VAE, encode clips, train text encoder and transformer, write the files."""
    if threads:
        torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    plan = recipe.load(recipe_file)
    torch.manual_seed(seed)

    console.rule("video VAE")
    vae = VideoVAE(plan.model.vae)
    budget = Budget(vae_minutes or plan.vae_training.minutes, steps)
    vae_training.train(vae, plan, budget, work, seed)
    vae.eval().requires_grad_(False)

    console.rule("clips to latents")
    count = clips or plan.denoiser_training.clips
    encoded = latents.load_or_encode(vae, plan, count, work, seed)

    console.rule("text encoder")
    denoiser = Denoiser(plan)
    text_budget = Budget(plan.text_training.minutes, steps)
    read = text_training.train(denoiser, plan.text_training, text_budget, work, seed)

    console.rule("transformer")
    flow_budget = Budget(minutes or plan.denoiser_training.minutes, steps)
    denoiser_training.train(denoiser, encoded, plan, flow_budget, work, seed)

    size = ship.ship(plan, vae, denoiser, out)
    console.print(f"{out}: {size / 1e6:.1f} MB")
    report = {
        "vae": dataclasses.asdict(budget),
        "text": dataclasses.asdict(text_budget) | {"read_rightly": read},
        "denoiser": dataclasses.asdict(flow_budget),
        "bytes": size,
    }
    console.print(json.dumps(report), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
