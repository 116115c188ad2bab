"""The transformer's embedding of a noise level in numpy: how alike the model finds two steps.

waves     = cos and sin of 1000 sigma, at 128 wavelengths
embedding = linear_2(silu(linear_1(waves)))
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_ref import casts
from ltx_ref.checkpoint import CheckpointError, Header, read_header

Doubles = NDArray[np.float64]

WAVELENGTHS = 128

MLP = "adaln_single.emb.timestep_embedder."


def embeddings(checkpoint: Path, sigmas: Sequence[float]) -> Doubles:
    """[steps, width], of the weights in a safetensors file.

    Raises:
        UserError: it has no such weights, or not as plain numbers.
    """
    try:
        header = read_header(checkpoint)
        layers = [
            (_tensor(header, f"linear_{n}.weight"), _tensor(header, f"linear_{n}.bias"))
            for n in (1, 2)
        ]
    except (CheckpointError, OSError) as error:
        raise UserError(str(error)) from error
    (weight_1, bias_1), (weight_2, bias_2) = layers
    hidden = waves(np.float64(_multiplier(header)) * np.asarray(sigmas)) @ weight_1.T + bias_1
    return np.asarray(hidden / (1 + np.exp(-hidden)) @ weight_2.T + bias_2)


def waves(timesteps: Doubles) -> Doubles:
    """[steps] -> [steps, 256], cosines first."""
    frequencies = 10000.0 ** -(np.arange(WAVELENGTHS) / WAVELENGTHS)
    angles = timesteps[:, np.newaxis] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def changes(embedded: Doubles) -> tuple[float, ...]:
    """Of each step to the one before, relative, in the mean of absolute values; 0 of the first."""
    moved = np.abs(np.diff(embedded, axis=0)).mean(axis=1)
    return (0.0, *(moved / np.abs(embedded[:-1]).mean(axis=1)).tolist())


def _tensor(header: Header, name: str) -> Doubles:
    found = [key for key in header.tensors if key.endswith(MLP + name)]
    if len(found) != 1:
        raise UserError(
            f"{header.path} has {len(found)} tensors {MLP}{name}, wanted one: teacache is for "
            "LTX-Video's transformer; use easycache"
        )
    info = header.tensors[found[0]]
    if info.dtype not in casts.FLOATS:
        raise UserError(
            f"{header.path}: {found[0]} is quantized ({info.dtype}), teacache reads plain numbers; "
            "use easycache"
        )
    with header.path.open("rb") as file:
        return casts.read(file, info).astype(np.float64).reshape(info.shape)


def _multiplier(header: Header) -> float:
    """From a noise level to what the embedding sees; files without a config have the usual one."""
    config = json.loads(header.metadata.get("config", "{}"))
    return float(config.get("transformer", {}).get("timestep_scale_multiplier", 1000))
