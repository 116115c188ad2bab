"""Train ltx-tiny's transformer: rectified flow on encoded clips, told what the text says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ltx_ref.ltx_video.conditioning import LatentGrid, coordinates
from ltx_ref.ltx_video.transformer import Transformer
from tiny import captions, text
from tiny.clips import Format, Scene
from tiny.latents import Encoded
from tiny.muon import optimizers
from tiny.recipe import DenoiserTraining, Recipe
from tiny.training import Average, Budget, Log, initialise, save, set_learning_rate

if TYPE_CHECKING:
    from transformers import T5EncoderModel


class Denoiser(nn.Module):
    """From prompt and noisy latents to velocity. The text encoder can read already, and stays."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.tokenizer = text.tokenizer()
        self.tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
        self.tokenizer.enable_truncation(recipe.text_encoder["max_length"])
        self.text_encoder: T5EncoderModel = text.encoder(recipe, self.tokenizer.get_vocab_size())
        self.transformer = Transformer(recipe.model.transformer)
        initialise(self.transformer)

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings and mask, padded to the longest of these prompts."""
        encodings = self.tokenizer.encode_batch(prompts)
        ids = torch.tensor([encoding.ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings])
        with torch.no_grad():
            read = self.text_encoder(input_ids=ids, attention_mask=mask)
        embeds: Tensor = read.last_hidden_state
        return embeds, mask

    def forward(
        self, latents: Tensor, form: Format, sigma: Tensor, prompt: tuple[Tensor, Tensor]
    ) -> Tensor:
        embeds, mask = prompt
        grid = LatentGrid.of_video(form.frames, form.height, form.width)
        causal = self.transformer.config.causal_temporal_positioning
        coords = coordinates(grid, form.frame_rate, causal=causal).expand(len(latents), -1, -1)
        keep = latents.new_ones(self.transformer.config.num_layers, len(latents))
        velocity: Tensor = self.transformer(
            latents, coords, sigma[:, None], embeds, mask.to(latents.dtype), keep
        )
        return velocity


def prompt(scene: Scene, training: DenoiserTraining, rng: np.random.Generator) -> str:
    """A caption; sometimes none, or the default negative prompt, so that guidance has its other
    side; sometimes with a word from outside the little world in it."""
    if rng.random() < training.caption_dropout:
        return captions.NEGATIVE_PROMPT if rng.random() < 0.6 else ""
    caption = captions.describe(scene, rng)
    if rng.random() < training.unknown_words:
        parts = caption.split(" ")
        parts.insert(rng.integers(len(parts) + 1), "<unk>")
        caption = " ".join(parts)
    return caption


def sigmas(count: int, shift: float) -> Tensor:
    """Noise levels in (0, 1), evenly spread over the batch and pushed towards 1 by `shift`."""
    even = (torch.randperm(count) + torch.rand(count)) / count
    levels: Tensor = shift * even / (1 + (shift - 1) * even)
    return levels


def loss(
    denoiser: Denoiser, clips: Encoded, training: DenoiserTraining, rng: np.random.Generator
) -> Tensor:
    """Mean squared error of the velocity, for each sample of a random batch, sorted by sigma."""
    chosen = rng.integers(len(clips.scenes), size=training.batch)
    clean = clips.latents[torch.from_numpy(chosen)]
    prompts = [prompt(clips.scenes[index], training, rng) for index in chosen]
    sigma = sigmas(len(clean), training.sigma_shift).sort().values
    noise = torch.randn_like(clean)
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    velocity = denoiser(noisy, clips.form, sigma, denoiser.encode(prompts))
    errors: Tensor = (velocity.float() - (noise - clean)).square().mean((1, 2))
    return errors


def train(
    denoiser: Denoiser,
    clips: list[Encoded],
    recipe: Recipe,
    budget: Budget,
    work: Path,
    seed: int,
) -> None:
    """Train; the denoiser ends with the average of its weights. Resumes from `work`."""
    training, state_file = recipe.denoiser_training, work / "denoiser.pt"
    steppers = optimizers(denoiser.transformer, training.learning_rate)
    average = Average(denoiser.transformer, training.average_decay)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        denoiser.load_state_dict(state["denoiser"])
        average.shadow, average.updates = state["average"], state["step"]
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        budget.step, budget.spent = state["step"], state["spent"]
    torch.manual_seed(seed + budget.step)
    rng = np.random.default_rng((seed, 2, budget.step))
    shares = [part.share for part in clips]
    log, saved_at, window = Log(work / "denoiser.csv"), budget.spent, []

    def checkpoint() -> None:
        save(
            state_file,
            {
                "denoiser": denoiser.state_dict(),
                "average": average.shadow,
                "optimizers": [stepper.state_dict() for stepper in steppers],
                "step": budget.step,
                "spent": budget.spent,
            },
        )

    for share in budget.ticks():
        set_learning_rate(steppers, share)
        with torch.autocast("cpu", torch.bfloat16, enabled=share < training.exact_from):
            part = clips[rng.choice(len(clips), p=shares)]
            errors = loss(denoiser, part, training, rng)
        denoiser.zero_grad()
        errors.mean().backward()
        torch.nn.utils.clip_grad_norm_(denoiser.transformer.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        average.update(denoiser.transformer)
        window.append(errors.detach())
        if len(window) == 100:
            low, middle, high = (third.mean() for third in torch.stack(window).chunk(3, dim=1))
            log(
                step=budget.step,
                seconds=budget.spent,
                loss=torch.stack(window).mean().item(),
                low=low.item(),
                middle=middle.item(),
                high=high.item(),
            )
            window.clear()
        if budget.spent - saved_at > 60:
            checkpoint()
            saved_at = budget.spent
    checkpoint()
    average.copy_to(denoiser.transformer)
