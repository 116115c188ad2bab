"""Element types of weights: what a header says about them, and casts from one to another."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ltx_engines.bundle import Precision
from ltx_engines.errors import UserError
from ltx_export import foreign
from ltx_ref import quantization
from ltx_ref.checkpoint import BITS, CheckpointError, Header, TensorInfo

Numbers = NDArray[Any]

TYPES: MappingProxyType[Precision, str] = MappingProxyType(
    {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
)
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

FLOATS = frozenset({"F64", *TYPES.values()})
"""The types in which weights are trained and computed with."""

START = "start from the bfloat16 checkpoint"

LARGEST = MappingProxyType(
    {
        "F32": float(np.finfo(np.float32).max),
        "F16": float(np.finfo(np.float16).max),
        "BF16": (2 - 2**-7) * 2.0**127,
    }
)
E4M3 = np.arange(256, dtype=np.uint8).view(NUMPY["F8_E4M3"]).astype(np.float32)
"""The value of each byte: four times as fast as ml_dtypes' own cast."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What the weights of a file are, and a sentence about it."""

    name: Literal["float", "fp8_plain", "quantized", "scaled", "unsupported"]
    sentence: str

    @property
    def means_itself(self) -> bool:
        """Each number is the weight's value, so that casts and LoRAs make sense."""
        return self.name in {"float", "fp8_plain"}

    @property
    def is_read(self) -> bool:
        """Everything that reads a checkpoint here knows what its numbers mean."""
        return self.means_itself or self.name == "quantized"


def kind(header: Header) -> Kind:
    """Recognise quantized files by their names and element types.

    Raises:
        CheckpointError: it says that `ltx-export quantize` wrote it, and is damaged.
    """
    if (own := _own(header)) is not None:
        return own
    if (what := foreign.sentence(header)) is not None:
        return Kind("scaled", what)
    for name, info in header.tensors.items():
        stored = len(info.shape) > 1 and info.dtype not in NUMPY
        if info.dtype == "F8_E5M2" or (stored and name.endswith(".weight")):
            return Kind("unsupported", f"{name} is {info.dtype}, in which no release is published")
    counts = Counter(info.dtype for info in header.tensors.values() if info.dtype in NUMPY)
    listed = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(counts.items()))
    if eights := counts["F8_E4M3"]:
        what = f"plain 8-bit casts without scales: {eights:,} weights, each number is its value"
        return Kind("fp8_plain", f"{what} ({listed})")
    return Kind("float", f"floating-point weights ({listed or 'none'})")


def _own(header: Header) -> Kind | None:
    """Of a file in the layout that `ltx-export quantize` writes, whoever wrote it."""
    written = quantization.provenance(header)
    try:
        found = quantization.layers(header)
    except CheckpointError:
        if written is not None:
            raise
        return None
    if written is None and not any(True for layer in found.values() for _ in layer.parts()):
        return None  # plain casts, of whoever published them, or nothing
    counts = Counter(layer.format for layer in found.values())
    formats = ", ".join(f"{count:,} to {form}" for form, count in counts.most_common())
    recipe = written.get("recipe") if written else None
    name = recipe.get("name") if isinstance(recipe, dict) else None
    origin = f"by the recipe {name}" if name else "by another program, in the layout of ltx-export"
    return Kind("quantized", f"linear layers quantized {origin}: {formats}")


def types(header: Header, precision: Precision | None) -> dict[str, str]:
    """The element type of each tensor when all float numbers are brought to this precision; codes
    and their scales stay.

    Raises:
        UserError: the numbers of a quantized file are not understood.
    """
    if precision is None:
        return {name: info.dtype for name, info in header.tensors.items()}
    fixed = _codes(header)
    check_read(header, f"cannot be converted to {precision}")
    return {
        name: TYPES[precision] if info.dtype in NUMPY and name not in fixed else info.dtype
        for name, info in header.tensors.items()
    }


def _codes(header: Header) -> frozenset[str]:
    """The tensors of quantized layers that stay as they are; none of published casts."""
    if kind(header).name != "quantized":
        return frozenset()
    layers = quantization.layers(header).values()
    scales = {name for layer in layers for name, _ in layer.parts()}
    return frozenset(scales | {f"{layer.path}.weight" for layer in layers})


def check_kind(header: Header, refusal: str) -> None:
    """
    Raises:
        UserError: the numbers of a quantized file mean nothing by themselves.
    """
    if not (found := kind(header)).means_itself:
        raise UserError(f"{header.path} {refusal}: {found.sentence}; {START}")


def check_read(header: Header, refusal: str) -> None:
    """
    Raises:
        UserError: the numbers of a quantized file are not understood.
    """
    if not (found := kind(header)).is_read:
        raise UserError(f"{header.path} {refusal}: {found.sentence}; {START}")


def element(dtype: str) -> np.dtype[Any]:
    """As numpy sees it. What is not a number here is so many bytes."""
    return NUMPY.get(dtype, np.dtype(f"V{BITS[dtype] // 8}"))


def read(file: BinaryIO, info: TensorInfo, begin: int = 0, end: int | None = None) -> Numbers:
    """The flattened tensor's numbers `begin` to `end`. Read and not mapped: a mapped file's
    pages would count as this process's memory for as long as nobody else asks for it.

    Raises:
        UserError: the file has become shorter.
    """
    dtype = element(info.dtype)
    count = (prod(info.shape) if end is None else end) - begin
    file.seek(info.begin + begin * dtype.itemsize)
    data = np.fromfile(file, np.uint8, count * dtype.itemsize)
    if data.size < count * dtype.itemsize:
        raise UserError(f"{file.name} became shorter while it was read; start again")
    return data.view(dtype)


def cast(numbers: Numbers, dtype: str, what: str) -> Numbers:
    """Rounded to the nearest number of the type, ties to even; themselves if they have it.

    Raises:
        UserError: a finite number is too large for the type.
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


def _overflow(largest: float, dtype: str, what: str) -> UserError:
    advice = "the checkpoint is damaged" if dtype == "F32" else "choose --precision float32"
    return UserError(
        f"{what} reaches {largest:.3g}, {element(dtype)} ends at {LARGEST[dtype]:.3g}; {advice}"
    )
