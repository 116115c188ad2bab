"""Random weights that exercise every tensor, and the measure of agreement with an oracle."""

import math

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
"""Of the oracle's largest value; float32 rounding through a few layers stays below it."""

ORIGINAL_MISSING = "the original package ltx_video is not installed (make dev installs it)"

# A model's tensors are cut from one pool, at places that depend on the seed: filling the widths of
# the released models with fresh normals would take longer than running them.
POOL = 1 << 20


def randomize(module: nn.Module, seed: int) -> None:
    """Fill all tensors: matrices keep the variance of what they multiply, norms stay near 1.

    The module may be on the meta device.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL, generator=generator)
    weights = {}
    for name, tensor in module.state_dict().items():
        start = int(torch.randint(POOL // 2, (), generator=generator))
        pieces = math.ceil((start + tensor.numel()) / POOL)
        values = pool.repeat(pieces)[start : start + tensor.numel()].view(tensor.shape)
        if name.endswith("timestep_scale_multiplier"):
            values = torch.tensor(900.0)
        elif name.endswith("std-of-means"):
            values = 1 + 0.5 * values.sigmoid()
        elif "norm" in name:
            values = 0.3 * values + (1 if name.endswith("weight") else 0)
        elif tensor.ndim >= 2 and "table" not in name and "per_channel" not in name:
            values = values / math.sqrt(tensor[0].numel())
        else:
            values = 0.3 * values
        weights[name] = values.clone()
    module.load_state_dict(weights, assign=True)


def difference(ours: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, in units of the oracle's largest value."""
    assert ours.shape == oracle.shape
    assert torch.isfinite(oracle).all()
    return float((ours - oracle).abs().max() / oracle.abs().max())


def normals(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
