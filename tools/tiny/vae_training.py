"""Train ltx-tiny's video VAE on clips drawn as they are needed.

The decoder learns what LTX-Video's learned from 0.9.1 on: to clean up latents that still carry a
little noise, told by its timestep how much. Its normalisation is a running estimate here and is
measured again, over all the clips that the denoiser will see, in `latents.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx_ref.ltx_video.vae import VideoVAE
from tiny import clips
from tiny.muon import optimizers
from tiny.recipe import Recipe, VAETraining
from tiny.training import Budget, Log, save, set_learning_rate, to_pixels

TIMESTEP_PER_NOISE = 2.0  # the defaults of the released models: timestep 0.05 for noise 0.025
EXACT_FROM = 0.7  # until this share of the budget convolutions run in bfloat16: half as long
REMEMBER = 0.99  # of the running channel statistics
SMALL = (clips.Format(9, 96, 96, 24), clips.Format(17, 64, 96, 24), clips.Format(17, 96, 64, 24))
SMALL_UNTIL, LARGE_FROM = 0.25, 0.65  # shares of the budget


def batch(recipe: Recipe, rng: np.random.Generator, share: float) -> Tensor:
    """Pixels of one format. Many small clips at first, which teach the colours; then real sizes."""
    if rng.random() < (LARGE_FROM - share) / (LARGE_FROM - SMALL_UNTIL):
        form = SMALL[rng.integers(len(SMALL))]
    else:
        shares, forms = zip(*recipe.formats, strict=True)
        form = forms[rng.choice(len(forms), p=shares)]
    count = recipe.vae_training.pixels // (form.frames * form.height * form.width)
    drawn = [clips.draw(clips.sample(rng), form, rng) for _ in range(max(count, 1))]
    return to_pixels(torch.from_numpy(np.stack(drawn)))


def loss(vae: VideoVAE, pixels: Tensor, training: VAETraining) -> dict[str, Tensor]:
    mean, log_variance = vae.encoder(pixels)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    _remember(vae, mean.detach().float())
    normalised = vae.per_channel_statistics.normalise(latents)
    noise = training.latent_noise * torch.rand(len(pixels))
    mixed = torch.lerp(normalised, torch.randn_like(normalised), noise[:, None, None, None, None])
    decoded = vae.decode(mixed, TIMESTEP_PER_NOISE * noise)

    weight = 1 + training.outline_weight * _near_outline(pixels)
    error = decoded.float() - pixels
    distance = (weight * (error.abs() + error.square())).mean() / weight.mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {
        "loss": distance + training.kl_weight * kl,
        "l1": error.abs().mean(),
        "psnr": -10 * torch.log10(error.square().mean() / 4),
        "kl": kl,
        "std": mean.std(),
    }


def _near_outline(pixels: Tensor) -> Tensor:
    """1 at most four pixels from the outline, else 0; the upper left corner is background."""
    inside = ((pixels - pixels[..., :1, :1]).abs().amax(1, keepdim=True) > 0.02).float()
    grown, grown_outside = (
        F.max_pool3d(part, (1, 9, 9), stride=1, padding=(0, 4, 4)) for part in (inside, 1 - inside)
    )
    return grown * grown_outside


@torch.no_grad()
def _remember(vae: VideoVAE, mean: Tensor) -> None:
    statistics = vae.per_channel_statistics
    for name, now in (
        ("mean-of-means", mean.mean((0, 2, 3, 4))),
        ("std-of-means", mean.std((0, 2, 3, 4))),
    ):
        statistics.get_buffer(name).lerp_(now, 1 - REMEMBER)


def begin(vae: VideoVAE) -> None:
    """Start with a posterior so narrow that its noise does not drown the young means."""
    moments = vae.encoder.conv_out.conv
    nn.init.zeros_(moments.weight[-1])
    nn.init.constant_(moments.get_parameter("bias")[-1], -6.0)


def train(vae: VideoVAE, recipe: Recipe, budget: Budget, work: Path, seed: int) -> None:
    """Train in place; the state in `work` is written every minute and taken up again."""
    training, state_file = recipe.vae_training, work / "vae.pt"
    steppers = optimizers(vae, training.learning_rate)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        budget.step, budget.spent = state["step"], state["spent"]
    else:
        begin(vae)
    torch.manual_seed(seed + budget.step)
    rng = np.random.default_rng((seed, budget.step))
    log, saved_at = Log(work / "vae.csv"), budget.spent

    def checkpoint() -> None:
        save(
            state_file,
            {
                "vae": vae.state_dict(),
                "optimizers": [stepper.state_dict() for stepper in steppers],
                "step": budget.step,
                "spent": budget.spent,
            },
        )

    for share in budget.ticks():
        set_learning_rate(steppers, share)
        pixels = batch(recipe, rng, share)
        with torch.autocast("cpu", torch.bfloat16, enabled=share < EXACT_FROM):
            losses = loss(vae, pixels, training)
        vae.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        if budget.step % 50 == 0:
            numbers = {name: value.item() for name, value in losses.items()}
            log(step=budget.step, seconds=budget.spent, **numbers)
        if budget.spent - saved_at > 60:
            checkpoint()
            saved_at = budget.spent
    checkpoint()
