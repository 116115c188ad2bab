"""What the convolutions of a decoder that goes on keep between two calls: the last two frames."""

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from ltx_engines.bundle import StageEntry, TensorEntry
from ltx_engines.stages import PAST
from ltx_trt.session import Array, sizes

Past = Mapping[str, Any]
"""By the names of the inputs; whatever the session has it in."""


def begun(entry: StageEntry, grid: tuple[int, ...]) -> dict[str, Array]:
    """Before the first call: nothing that is read."""
    past = (tensor for tensor in entry.inputs if tensor.name.startswith(PAST))
    return {tensor.name: np.zeros(shape(tensor, grid), np.float32) for tensor in past}


def kept_bytes(entry: StageEntry, grid: tuple[int, ...]) -> int:
    """Of all that is kept, once."""
    past = (tensor for tensor in entry.inputs if tensor.name.startswith(PAST))
    return sum((4 if t.dtype == "float32" else 2) * prod(shape(t, grid)) for t in past)


def shape(tensor: TensorEntry, grid: tuple[int, ...], clips: int = 1) -> tuple[int, ...]:
    """For clips of so many latent frames, rows and columns."""
    known = sizes.of_grid(grid) | {"batch": clips}
    return tuple(axis if isinstance(axis, int) else known[axis] for axis in tensor.axes)
