"""The recipe of ltx-tiny: `recipe.json` beside this file, as frozen values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_ref.ltx_video.config import ModelConfig, parse_config
from tiny.clips import Format

RECIPE = Path(__file__).with_name("recipe.json")


@dataclass(frozen=True, slots=True)
class VAETraining:
    minutes: float
    pixels: int  # of a batch; so many clips as fit in are drawn
    learning_rate: float
    outline_weight: float  # how much more a pixel near the outline counts than background
    kl_weight: float
    latent_noise: float  # the decoder sees up to this much noise, and twice that as its timestep


@dataclass(frozen=True, slots=True)
class TextTraining:
    minutes: float
    batch: int
    learning_rate: float
    stray_words: float  # share of words made unknown, so that strange ones do no harm


@dataclass(frozen=True, slots=True)
class DenoiserTraining:
    minutes: float
    batch: int
    clips: int  # how many clips are drawn and encoded beforehand
    learning_rate: float
    caption_dropout: float
    unknown_words: float  # share of captions with a stray word the tokenizer does not know
    sigma_shift: float  # above 1, noisy steps are trained more often: they decide what is where
    average_decay: float
    exact_from: float  # until this share of the budget, matrix products run in bfloat16


@dataclass(frozen=True, slots=True)
class Recipe:
    config: dict[str, Any]  # goes into the checkpoint's metadata as it is
    text_encoder: dict[str, Any]
    formats: tuple[tuple[float, Format], ...]
    vae_training: VAETraining
    text_training: TextTraining
    denoiser_training: DenoiserTraining

    @property
    def model(self) -> ModelConfig:
        return parse_config(self.config)


def load(path: Path = RECIPE) -> Recipe:
    table = json.loads(path.read_text(encoding="utf-8"))
    formats = table.pop("formats")
    return Recipe(
        config=table.pop("config"),
        text_encoder=table.pop("text_encoder"),
        formats=tuple((entry.pop("share"), Format(**entry)) for entry in formats),
        vae_training=VAETraining(**table.pop("vae_training")),
        text_training=TextTraining(**table.pop("text_training")),
        denoiser_training=DenoiserTraining(**table.pop("denoiser_training")),
        **table,
    )
