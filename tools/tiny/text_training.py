"""Teach the text encoder to read, before and apart from the pictures.

LTX-Video's text encoder was trained on text alone too. Here the mean of its output must tell what a
caption says about a scene. When it learned together with the pictures, words stayed a bag: which of
two colours belongs to the background was not understood within half an hour.
"""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny import captions, clips, text
from tiny.clips import Scene
from tiny.denoiser_training import Denoiser
from tiny.muon import optimizers
from tiny.recipe import TextTraining
from tiny.training import Budget, console, save, set_learning_rate

ATTRIBUTES = tuple(
    tuple(table)
    for table in (
        clips.SHAPES,
        clips.PALETTE,
        clips.PALETTE,
        clips.DIRECTIONS,
        clips.SPEEDS,
        clips.SIZES,
    )
)
"""What a scene's attributes can be, in the order of its fields."""


def labels(scenes: list[Scene]) -> Tensor:
    """Numbers of the attributes' values, [attributes, scenes]."""
    rows = [
        [values.index(name) for values, name in zip(ATTRIBUTES, astuple(scene), strict=True)]
        for scene in scenes
    ]
    return torch.tensor(rows).T


def train(
    denoiser: Denoiser, training: TextTraining, budget: Budget, work: Path, seed: int
) -> float:
    """Train the text encoder in place; the share of attributes read rightly in the end."""
    encoder, file = denoiser.text_encoder, work / "text_encoder.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        encoder.load_state_dict(state["text_encoder"])
        encoder.requires_grad_(False)
        return float(state["right"])
    heads = nn.Linear(encoder.config.d_model, sum(map(len, ATTRIBUTES)))
    steppers = optimizers(nn.ModuleList([encoder, heads]), training.learning_rate)
    rng = np.random.default_rng((seed, 3))
    torch.manual_seed(seed)
    right = 0.0
    for share in budget.ticks():
        set_learning_rate(steppers, share)
        scenes = [clips.sample(rng) for _ in range(training.batch)]
        loss, right = _read(denoiser, heads, scenes, training, rng)
        for stepper in steppers:
            stepper.zero_grad()
        loss.backward()
        for stepper in steppers:
            stepper.step()
        if budget.step % 50 == 0:
            console.print(f"step {budget.step} loss {loss.item():.4f} read rightly {right:.3f}")
    save(file, {"text_encoder": encoder.state_dict(), "right": right})
    encoder.requires_grad_(False)
    return right


def _read(
    denoiser: Denoiser,
    heads: nn.Linear,
    scenes: list[Scene],
    training: TextTraining,
    rng: np.random.Generator,
) -> tuple[Tensor, float]:
    """The loss over all attributes, and the share that is right."""
    captioned = [captions.describe(scene, rng) for scene in scenes]
    encodings = denoiser.tokenizer.encode_batch(captioned)
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    unknown = text.SPECIAL.index("<unk>")
    stray = (torch.rand(ids.shape) < training.stray_words) & (ids > unknown)
    output = denoiser.text_encoder(input_ids=ids.where(~stray, unknown), attention_mask=mask)
    mean = (output.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    guesses = heads(mean).split([len(values) for values in ATTRIBUTES], dim=-1)
    pairs = list(zip(guesses, labels(scenes), strict=True))
    losses = [F.cross_entropy(guess, wanted) for guess, wanted in pairs]
    hits = [(guess.argmax(-1) == wanted).float().mean() for guess, wanted in pairs]
    return torch.stack(losses).sum(), torch.stack(hits).mean().item()
