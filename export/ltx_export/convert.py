"""A safetensors file in another float type, written tensor by tensor.

What the new file will look like is known from the old one's header alone, so a graph can be bound
to it before it is there. Only the largest tensor is ever in memory.
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import safe_open

from ltx_engines.bundle import Precision
from ltx_engines.errors import UserError
from ltx_ref.checkpoint import BITS, Header, TensorInfo

TYPES: MappingProxyType[Precision, str] = MappingProxyType(
    {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
)
FLOATS = frozenset({"F64", *TYPES.values()})


def planned(header: Header, precision: Precision) -> Header:
    """The header of the file with all its float tensors in this type; itself if they are already.

    Raises:
        UserError: a tensor is quantized; its numbers mean nothing without their scales.
    """
    for name, info in header.tensors.items():
        if info.dtype.startswith("F8_"):
            raise UserError(
                f"{header.path}: {name} is {info.dtype}; a quantized checkpoint is not converted, "
                "start from the float one"
            )
    types = {
        name: TYPES[precision] if info.dtype in FLOATS else info.dtype
        for name, info in header.tensors.items()
    }
    if all(types[name] == info.dtype for name, info in header.tensors.items()):
        return header
    path = header.path.with_name(f"{header.path.stem}.{precision}.safetensors")
    start = len(_head(header, types))
    tensors = {
        name: TensorInfo(types[name], header.tensors[name].shape, start + begin, start + end)
        for name, begin, end in _layout(header, types)
    }
    return Header(path, MappingProxyType(tensors), header.metadata)


def write(source: Header, target: Header, path: Path) -> None:
    """Write the file that `target`, from `planned(source, ...)`, describes.

    Raises:
        UserError: a number is too large for the new type.
    """
    types = {name: info.dtype for name, info in target.tensors.items()}
    with safe_open(source.path, framework="pt") as file, path.open("wb") as out:
        out.write(_head(source, types))
        for name, _, _ in _layout(source, types):
            tensor = _cast(file.get_tensor(name), types[name], f"{source.path}: {name}")
            tensor.flatten().view(torch.uint8).numpy().tofile(out)


def _cast(tensor: torch.Tensor, dtype: str, what: str) -> torch.Tensor:
    if dtype not in FLOATS:
        return tensor.contiguous()
    wanted = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    cast = tensor.to(wanted).contiguous()
    if cast.isfinite().all() or not tensor.isfinite().all():
        return cast
    raise UserError(
        f"{what} reaches {tensor.abs().max().item():.3g}, {wanted} ends at "
        f"{torch.finfo(wanted).max:.3g}; choose --precision float32"
    )


def _layout(header: Header, types: dict[str, str]) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of each tensor among the data, in the old file's order."""
    begin = 0
    for name, info in sorted(header.tensors.items(), key=lambda item: item[1].begin):
        end = begin + prod(info.shape) * BITS[types[name]] // 8
        yield name, begin, end
        begin = end


def _head(header: Header, types: dict[str, str]) -> bytes:
    """The length and the JSON header, padded so that the data begin at a multiple of eight."""
    table: dict[str, object] = {"__metadata__": dict(header.metadata)} if header.metadata else {}
    for name, begin, end in _layout(header, types):
        shape = list(header.tensors[name].shape)
        table[name] = {"dtype": types[name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
