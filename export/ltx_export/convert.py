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
from ltx_ref.checkpoint import BITS, Header, TensorInfo

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

SCALES = (
    *(".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale"),  # ModelOpt, LTX-2
    *(".scale_weight", ".scale_input", "scaled_fp8", ".comfy_quant"),  # ComfyUI
    *(
        "_scale_inv",
        ".absmax",
        ".quant_map",
        ".qweight",
        ".qzeros",
        ".scales",
    ),  # DeepSeek, bnb, AWQ
)
"""How the names end of tensors without which a quantized weight cannot be understood."""

QUANTIZED = ("_quantization_metadata", "quantization_config")
"""Keys of the metadata that say the same."""

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

    name: Literal["float", "fp8_plain", "scaled", "unsupported"]
    sentence: str

    @property
    def means_itself(self) -> bool:
        """Each number is the weight's value, so that casts and LoRAs make sense."""
        return self.name in {"float", "fp8_plain"}


def kind(header: Header) -> Kind:
    """Recognise quantized files by their names and element types."""
    scales = [name for name in header.tensors if name.endswith(SCALES)]
    scales += [f"metadata {key}" for key in QUANTIZED if key in header.metadata]
    if scales:
        what = f"quantized weights with scales ({scales[0]}), which give the numbers their meaning"
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


def types(header: Header, precision: Precision | None) -> dict[str, str]:
    """The element type of each tensor when all its numbers are brought to this precision.

    Raises:
        UserError: the numbers of a quantized file mean nothing by themselves.
    """
    if precision is None:
        return {name: info.dtype for name, info in header.tensors.items()}
    check_kind(header, f"cannot be converted to {precision}")
    return {
        name: TYPES[precision] if info.dtype in NUMPY else info.dtype
        for name, info in header.tensors.items()
    }


def check_kind(header: Header, refusal: str) -> None:
    """
    Raises:
        UserError: the numbers of a quantized file mean nothing by themselves.
    """
    if not (found := kind(header)).means_itself:
        raise UserError(
            f"{header.path} {refusal}: {found.sentence}; start from the bfloat16 checkpoint"
        )


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
