"""What a header says about the element types of weights, and which they may be cast to."""

from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ltx_engines.bundle import Precision
from ltx_engines.errors import UserError
from ltx_export import foreign
from ltx_ref import quantization
from ltx_ref.casts import NUMPY
from ltx_ref.checkpoint import CheckpointError, Header

TYPES: MappingProxyType[Precision, str] = MappingProxyType(
    {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
)
START = "start from the bfloat16 checkpoint"


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
