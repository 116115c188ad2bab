"""Numbers of a file's tensors: read piece by piece, and cast from one element type to another."""

from math import prod
from types import MappingProxyType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ltx_ref.checkpoint import BITS, CheckpointError, TensorInfo

Numbers = NDArray[Any]

NUMPY: MappingProxyType[str, np.dtype[Any]] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    }
)
"""The types whose numbers mean themselves."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""The types in which weights are trained and computed with."""

LARGEST = MappingProxyType(
    {
        "F32": float(np.finfo(np.float32).max),
        "F16": float(np.finfo(np.float16).max),
        "BF16": (2 - 2**-7) * 2.0**127,
    }
)
E4M3 = np.arange(256, dtype=np.uint8).view(NUMPY["F8_E4M3"]).astype(np.float32)
"""The value of each byte: four times as fast as ml_dtypes' own cast."""


def element(dtype: str) -> np.dtype[Any]:
    """As numpy sees it. What is not a number here is so many bytes."""
    return NUMPY.get(dtype, np.dtype(f"V{BITS[dtype] // 8}"))


def read(file: BinaryIO, info: TensorInfo, begin: int = 0, end: int | None = None) -> Numbers:
    """The flattened tensor's numbers `begin` to `end`. Read and not mapped: a mapped file's
    pages would count as this process's memory for as long as nobody else asks for it.

    Raises:
        CheckpointError: the file has become shorter.
    """
    dtype = element(info.dtype)
    count = (prod(info.shape) if end is None else end) - begin
    file.seek(info.begin + begin * dtype.itemsize)
    data = np.fromfile(file, np.uint8, count * dtype.itemsize)
    if data.size < count * dtype.itemsize:
        raise CheckpointError(f"{file.name} became shorter while it was read; start again")
    return data.view(dtype)


def cast(numbers: Numbers, dtype: str, what: str) -> Numbers:
    """Rounded to the nearest number of the type, ties to even; themselves if they have it.

    Raises:
        CheckpointError: a finite number is too large for the type.
    """
    wanted = element(dtype)
    if numbers.dtype == wanted:
        return numbers
    if numbers.dtype == NUMPY["F8_E4M3"]:
        numbers = E4M3[numbers.view(np.uint8)]
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = numbers.astype(wanted)
    finite = np.isfinite(rounded)
    if not finite.all() and (lost := np.isfinite(numbers) & ~finite).any():
        raise _overflow(float(np.abs(numbers[lost]).max()), dtype, what)
    return rounded


def _overflow(largest: float, dtype: str, what: str) -> CheckpointError:
    advice = "the checkpoint is damaged" if dtype == "F32" else "choose --precision float32"
    return CheckpointError(
        f"{what} reaches {largest:.3g}, {element(dtype)} ends at {LARGEST[dtype]:.3g}; {advice}"
    )
