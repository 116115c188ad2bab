"""Floats on their way into an engine and out of it: NumPy has no bfloat16."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STORED = {"bfloat16": "uint16"}
"""How NumPy holds the bits of a type that it lacks."""


def stored(dtype: str) -> np.dtype[Any]:
    return np.dtype(STORED.get(dtype, dtype))


def narrowed(values: Array, dtype: str) -> Array:
    """As an engine of this element type reads it: contiguous, floats rounded to nearest even."""
    if dtype == "bfloat16":
        return to_bfloat16(values)
    return np.ascontiguousarray(values, dtype)


def widened(values: Array, dtype: str) -> Array:
    """Back to what sessions hand out: float32 for every float."""
    if dtype == "bfloat16":
        return from_bfloat16(values)
    return values.astype(np.float32) if dtype == "float16" else values


def to_bfloat16(values: Array) -> Array:
    """The upper halves of float32 words, rounded to nearest even; NaN stays NaN."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (words + 0x7FFF + (words >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(words: Array) -> Array:
    return (words.astype(np.uint32) << 16).view(np.float32)
