"""How a quantized linear layer X lies in a safetensors file, and which layers of a file are so.

    format    X.weight           X.weight_scale     and
    fp8       F8_E4M3 [N, K]     F32 [N]            X.input_scale F32 []
    int8      I8 [N, K]          F32 [N]            X.input_scale F32 [], X.pre_quant_scale F32 [K]
    fp8-cast  F8_E4M3 [N, K]     none               each number is its own value
    int8-wo   I8 [N, K]          F32 [N]
    int4-wo   U8 [N, K/2]        F32 [N, K/128]
    nvfp4     U8 [N, K/2]        F8_E4M3 [N, K/16]  X.weight_scale_2 F32 [], X.input_scale F32 []

N outputs, K inputs; pre_quant_scale only after smoothing. The names are those of NVIDIA ModelOpt
and of Hugging Face. Two codes of four bits share a byte, the first one in its lower half, in the
order of the row: as ONNX packs INT4 (two's complement) and FLOAT4E2M1. A weight's value is its code
times the scale of its row or block; for nvfp4 times weight_scale_2 as well.

An activation becomes round(x * pre_quant_scale / input_scale), to nearest even, clamped to the
codes' range: -448 to 448, or -128 to 127. For nvfp4 each block of 16 activations gets an e4m3 scale
of its own at run time, in units of input_scale.

Each F32 scale is a bfloat16 number, so that a graph in bfloat16 has it exactly.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from ltx_ref.checkpoint import CheckpointError, Header, TensorInfo

Format = Literal["fp8", "int8", "fp8-cast", "int8-wo", "int4-wo", "nvfp4"]
FORMATS: tuple[Format, ...] = get_args(Format)
CALIBRATED: frozenset[Format] = frozenset({"fp8", "int8", "nvfp4"})
"""Formats whose activations are quantized too, which wants their ranges."""

METADATA = "ltx_trt.quantization"
"""Key of the file's metadata: a JSON object with the recipe, the format of each of the `layers`,
and where the ranges come from."""

PARTS = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
INT4_BLOCK, NVFP4_BLOCK = 128, 16

SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn2.to_k", "attn2.to_v"),
)
"""Layers of one block that read the same tensor, and so have the same range and smoothing."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantized linear layer of a file. `path` is the weight's name without `.weight`."""

    path: str
    format: Format
    weight: TensorInfo
    weight_scale: TensorInfo | None = None
    weight_scale_2: TensorInfo | None = None
    input_scale: TensorInfo | None = None
    pre_quant_scale: TensorInfo | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """N outputs and K inputs."""
        rows, columns = self.weight.shape
        return rows, columns * (2 if self.weight.dtype == "U8" else 1)

    def parts(self) -> Iterator[tuple[str, TensorInfo]]:
        """The names and the entries of its scales."""
        for part in PARTS:
            if (info := getattr(self, part)) is not None:
                yield f"{self.path}.{part}", info


def layers(header: Header) -> dict[str, Layer]:
    """The quantized layers of a file, by path, in the file's order; none if it has none.

    Raises:
        CheckpointError: a scale is missing, of wrong shape or type, or belongs to nothing; or the
            file's own list of layers says otherwise.
    """
    found = {
        name.removesuffix(".weight"): _layer(header, name.removesuffix(".weight"), info)
        for name, info in header.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and info.dtype in _FORMATS
    }
    _check_strays(header, found)
    _check_listed(header, found)
    return found


def provenance(header: Header) -> Mapping[str, Any] | None:
    """What our own quantizer wrote about the file; None if it did not write it.

    Raises:
        CheckpointError: it is not the JSON that it writes.
    """
    text = header.metadata.get(METADATA)
    if text is None:
        return None
    try:
        found = json.loads(text)
        listed = found["layers"]
        if not all(isinstance(k, str) and v in FORMATS for k, v in listed.items()):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{header.path}: its metadata {METADATA} is not what ltx-export quantize writes; "
            "quantize the bfloat16 checkpoint again"
        ) from None
    return MappingProxyType(found)


def shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's own tensors: packed weights unpacked, scales left out."""
    quantized = layers(header)
    scales = {name for layer in quantized.values() for name, _ in layer.parts()}
    own = {name: shape for name, shape in header.shapes().items() if name not in scales}
    return own | {f"{path}.weight": layer.shape for path, layer in quantized.items()}


_FORMATS: Mapping[str, tuple[Format, ...]] = MappingProxyType(
    {
        "F8_E4M3": ("fp8", "fp8-cast"),
        "I8": ("int8", "int8-wo"),
        "U8": ("nvfp4", "int4-wo"),
    }
)
"""By the weight's type: with ranges of the activations, and without."""


def _layer(header: Header, path: str, weight: TensorInfo) -> Layer:
    parts = {part: header.tensors.get(f"{path}.{part}") for part in PARTS}
    calibrated, plain = _FORMATS[weight.dtype]
    layer = Layer(path, plain if parts["input_scale"] is None else calibrated, weight, **parts)
    scales = wanted(layer)
    for part, info in parts.items():
        found = None if info is None else (info.dtype, info.shape)
        if found != scales.get(part) and not (part == "pre_quant_scale" and found is None):
            raise CheckpointError(
                f"{header.path}: {path}.{part} is {_said(found)}, {layer.format} wants "
                f"{_said(scales.get(part))}; quantize the bfloat16 checkpoint again"
            )
    return layer


def wanted(layer: Layer) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type and the shape of each scale that such a layer has."""
    rows, columns = layer.shape
    one: tuple[str, tuple[int, ...]] = ("F32", ())
    row: tuple[str, tuple[int, ...]] = ("F32", (rows,))
    known: dict[Format, dict[str, tuple[str, tuple[int, ...]]]] = {
        "fp8": {"weight_scale": row, "input_scale": one},
        "int8": {"weight_scale": row, "input_scale": one, "pre_quant_scale": ("F32", (columns,))},
        "fp8-cast": {},
        "int8-wo": {"weight_scale": row},
        "int4-wo": {"weight_scale": ("F32", (rows, columns // INT4_BLOCK))},
        "nvfp4": {
            "weight_scale": ("F8_E4M3", (rows, columns // NVFP4_BLOCK)),
            "weight_scale_2": one,
            "input_scale": one,
        },
    }
    return known[layer.format]


def _said(found: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if found is None else f"{found[0]} {list(found[1])}"


def _check_strays(header: Header, found: Mapping[str, Layer]) -> None:
    for name in header.tensors:
        path, _, part = name.rpartition(".")
        if part in PARTS and path not in found:
            raise CheckpointError(
                f"{header.path}: {name} is a scale, and {path}.weight is not quantized; "
                "quantize the bfloat16 checkpoint again"
            )


def _check_listed(header: Header, found: Mapping[str, Layer]) -> None:
    written = provenance(header)
    if written is None:
        return
    listed, here = written["layers"], {path: layer.format for path, layer in found.items()}
    for path in sorted(listed.keys() | here.keys()):
        if listed.get(path) != here.get(path):
            raise CheckpointError(
                f"{header.path}: {path} is {here.get(path, 'not quantized')}, its recipe says "
                f"{listed.get(path, 'not quantized')}; quantize the bfloat16 checkpoint again"
            )
