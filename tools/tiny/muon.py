"""Muon: momentum whose matrix is made orthogonal, so that weak directions learn as fast as strong.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon/. Unlike `torch.optim.Muon` it takes
convolutions, as matrices of one row for each output channel: they are most of a video VAE.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
STEPS = 5
RMS = 0.2  # of an update with learning rate 1: about AdamW's, so that one rate serves both
REST = 0.4  # of the learning rate, for what AdamW trains
ENDS = ("shared", "relative_attention_bias", "scale_shift_table", "patchify_proj", "proj_out")


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is None:
                    continue
                buffer = self.state[value].setdefault("momentum", torch.zeros_like(value))
                buffer.lerp_(value.grad, 1 - group["momentum"])
                ahead = value.grad.lerp(buffer, group["momentum"])
                update = orthogonal(ahead.flatten(1))
                scale = RMS * max(update.shape) ** 0.5
                value.sub_(update.view_as(value), alpha=group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, by Newton-Schulz iteration."""
    x = (matrix / (matrix.norm() + 1e-7)).bfloat16()  # rough is enough, and much faster
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.T if tall else x).float()
    return result


def optimizers(module: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices and convolutions, AdamW for tables, biases and the two ends."""
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, value in module.named_parameters():
        matrix = value.ndim >= 2 and not any(end in name for end in ENDS)
        (inner if matrix else rest).append(value)
    return [
        Muon(inner, rate),
        torch.optim.AdamW(rest, REST * rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
