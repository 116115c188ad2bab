"""Where each latent token lies in the clip: the latent grid, its order as tokens, coordinates.

B batch, C channels, N tokens: frame-major, then row, then column. Source: Lightricks/LTX-Video
`models/transformers/symmetric_patchifier.py`, `models/autoencoders/vae_encode.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ltx_ref.ltx_video.config import SPACE, TIME


@dataclass(frozen=True, slots=True)
class LatentGrid:
    frames: int
    rows: int
    columns: int

    @classmethod
    def of_video(cls, frames: int, height: int, width: int) -> "LatentGrid":
        """The grid of a clip in pixels; frames come as 8k + 1, sides in multiples of 32."""
        if frames < 1 or (frames - 1) % TIME or min(height, width) < SPACE:
            raise ValueError(f"no latent grid for {frames} frames of {height}x{width}")
        if height % SPACE or width % SPACE:
            raise ValueError(f"{height}x{width} is not a multiple of {SPACE}")
        return cls((frames - 1) // TIME + 1, height // SPACE, width // SPACE)

    @property
    def tokens(self) -> int:
        return self.frames * self.rows * self.columns


def patchify(latents: Tensor) -> Tensor:
    """B C frames rows columns -> B N C."""
    return latents.flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, grid: LatentGrid) -> Tensor:
    """B N C -> B C frames rows columns."""
    latents: Tensor = tokens.transpose(1, 2).unflatten(2, (grid.frames, grid.rows, grid.columns))
    return latents


def coordinates(grid: LatentGrid, frame_rate: float, *, causal: bool) -> Tensor:
    """First corner of each token, float32 [1, 3, N]: seconds, pixel rows, pixel columns.

    The first latent frame holds one frame, each other eight. `causal` says that the checkpoint
    knows this (frames 0, 1, 9, 17, ...); older ones count 0, 8, 16, ...
    """
    axes = (torch.arange(n) for n in (grid.frames, grid.rows, grid.columns))
    frame, row, column = (t.flatten() for t in torch.meshgrid(*axes, indexing="ij"))
    frame = (frame * TIME + 1 - TIME).clamp(min=0) if causal else frame * TIME
    seconds = frame.to(torch.float32) * (1.0 / frame_rate)
    return torch.stack([seconds, (row * SPACE).float(), (column * SPACE).float()])[None]
