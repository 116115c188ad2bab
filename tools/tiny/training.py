"""What both trainings share: a clock, a learning rate, a log, and files that appear whole."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

WARM_UP = 0.03  # share of the budget in which the learning rate rises
console = Console()


@dataclass(slots=True)
class Budget:
    """A training ends after so many minutes of its own time, or after so many steps."""

    minutes: float
    steps: int | None = None
    step: int = 0
    spent: float = 0.0  # seconds, over all runs

    def ticks(self) -> Iterator[float]:
        """The share of the budget that is spent, before each step."""
        while (share := self.share) < 1:
            start = time.perf_counter()
            yield share
            self.step += 1
            self.spent += time.perf_counter() - start

    @property
    def share(self) -> float:
        if self.steps is not None:
            return self.step / self.steps
        return self.spent / (60 * self.minutes)


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """A short straight rise to each optimizer's own rate, then half a cosine down to nothing."""
    factor = 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))
    if share < WARM_UP:
        factor = share / WARM_UP + 0.01
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * optimizer.defaults["lr"]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, and give it its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.chmod(0o644)  # safetensors would have it for the owner alone
    os.replace(partial, path)


def save(path: Path, state: dict[str, Any]) -> None:
    write_whole(path, lambda partial: torch.save(state, partial))


class Log:
    """Rows of numbers to the terminal and, one CSV line each, to a file that a resume extends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, **row: float) -> None:
        new = not self.path.exists()
        values = {key: f"{value:.5g}" for key, value in row.items()}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(values))
            if new:
                writer.writeheader()
            writer.writerow(values)
        console.print(" ".join(f"[dim]{key}[/dim] {value}" for key, value in values.items()))


class Average:
    """An exponential moving average of a module's parameters; the result is what is shipped."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        names, values = zip(*module.named_parameters(), strict=True)
        torch._foreach_lerp_([self.shadow[name] for name in names], list(values), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, value in module.named_parameters():
            value.copy_(self.shadow[name])


def initialise(module: nn.Module) -> None:
    """Linear layers: Xavier; what leaves a residual branch or a modulation starts at nothing."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
            if name.endswith(("adaln_single.linear", "attn2.to_out.0", "proj_out")):
                nn.init.zeros_(part.weight)
    for name, table in module.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.normal_(table, std=table.shape[-1] ** -0.5)


def to_pixels(clips: Tensor) -> Tensor:
    """uint8 B F H W 3 -> float32 B 3 F H W, from -1 to 1."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
