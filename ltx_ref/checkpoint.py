"""What a checkpoint file says about itself, and loading that either fits exactly or stops.

Only the safetensors format is read (https://huggingface.co/docs/safetensors): eight bytes of header
length, a JSON header with the byte range of each tensor, then the bytes. Nothing here needs more
than the header until weights are asked for.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

BITS = MappingProxyType(
    {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8}
    | {"U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "U32": 32, "U64": 64}
)
"""Bits of one element, for each element type that the safetensors format names."""

HEADER_LIMIT = 100_000_000
"""The format's own limit on the header's length, in bytes."""

MOST_AXES = 64
"""Of a tensor: numpy's limit."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, said in one line."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. `begin` and `end` are offsets in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A safetensors file without its bytes."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}


def read_header(path: Path) -> Header:
    """Read and check the header: every byte range lies inside the file, fits its shape, and is one
    tensor's alone.

    Raises:
        CheckpointError: not a safetensors file, malformed, or cut short.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    text = _text(path, size)
    table = _table(path, text)
    metadata = _metadata(path, table.pop("__metadata__", {}))
    start = 8 + len(text)
    tensors = {name: _tensor(path, name, entry, start) for name, entry in table.items()}
    wanted = max((info.end for info in tensors.values()), default=start)
    if size < wanted:
        raise _truncated(path, found=size, wanted=wanted)
    _check_apart(path, tensors)
    return Header(path, MappingProxyType(tensors), MappingProxyType(metadata))


def _text(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else None
        if length is None or not 2 <= length <= HEADER_LIMIT:
            raise CheckpointError(
                f"{path} is not a safetensors file (pickled checkpoints are not loaded); "
                "convert it with safetensors first"
            )
        text = file.read(length)
    if len(text) < length:
        raise _truncated(path, found=size, wanted=8 + length)
    return text


def _table(path: Path, text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except RecursionError:
        raise CheckpointError(
            f"{path}: its header is nested too deeply for JSON; download it again"
        ) from None
    except ValueError:
        raise CheckpointError(f"{path}: its header is not JSON; download it again") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; download it again")
    return table


def _metadata(path: Path, found: Any) -> dict[str, str]:
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: its __metadata__ is not a JSON object; download it again")
    for key, value in found.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{path}: metadata {key!r} is a {type(value).__name__}, wanted a string; "
                "save it with safetensors, which refuses anything else"
            )
    return found


def _truncated(path: Path, *, found: int, wanted: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated: {found:,} bytes, its header promises {wanted:,}; download it again"
    )


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, sizes = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _malformed(path, name, "wanted dtype, shape and data_offsets") from None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(
            f"{path}: {name!r} has element type {dtype!r}, which is not known here; "
            f"known are {', '.join(BITS)}"
        )
    if not isinstance(sizes, list) or len(sizes) > MOST_AXES or not all(map(_is_size, sizes)):
        raise _malformed(path, name, f"wanted at most {MOST_AXES} sizes from 0 in its shape")
    if not (_is_size(begin) and _is_size(end) and begin <= end):
        raise _malformed(path, name, "wanted data_offsets [begin, end], 0 <= begin <= end")
    shape = tuple(sizes)
    if (end - begin) * 8 != prod(shape) * BITS[dtype]:
        raise CheckpointError(
            f"{path}: {name!r} has {end - begin} bytes, shape {sizes} of {dtype} needs "
            f"{prod(shape) * BITS[dtype] // 8}; download it again"
        )
    return TensorInfo(dtype, shape, start + begin, start + end)


def _is_size(value: Any) -> bool:
    """An integer that the format's 64 bits hold; JSON's true, 2.0 and 1e400 are none."""
    return type(value) is int and 0 <= value < 1 << 63


def _malformed(path: Path, name: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: the header's entry of {name!r} is malformed, {wanted}; download it again"
    )


def _check_apart(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Tensors lie in any order; those without bytes lie anywhere."""
    ranges = sorted((i.begin, i.end, name) for name, i in tensors.items() if i.begin < i.end)
    for (_, end, name), (begin, _, following) in pairwise(ranges):
        if begin < end:
            raise CheckpointError(
                f"{path}: {name!r} and {following!r} lie on the same bytes; "
                "download it again, or save it with safetensors"
            )


def difference(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
) -> str | None:
    """How the tensors of a file differ from a model's, in one line; None when they fit.

    Names in `ignored` may be in the file without being wanted.
    """
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys() - set(ignored))
    reshaped = [
        f"{name} is {list(found[name])}, wanted {list(shape)}"
        for name, shape in sorted(wanted.items())
        if name in found and found[name] != shape
    ]
    parts = [
        f"{len(items)} {what}: {', '.join(items[:3])}{', ...' if len(items) > 3 else ''}"
        for what, items in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of wrong shape", reshaped),
        )
        if items
    ]
    return "; ".join(parts) or None


def load_weights(model: "nn.Module", header: Header, ignored: Iterable[str] = ()) -> None:
    """Fill the model with the file's tensors, sharing the mapped file's memory.

    The model may be on the meta device. Afterwards each parameter has the file's element type.

    Raises:
        CheckpointError: names or shapes do not fit; nothing was changed.
    """
    from safetensors import safe_open

    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wrong := difference(header.shapes(), wanted, ignored):
        raise CheckpointError(f"{header.path} does not fit the model: {wrong}")
    with safe_open(header.path, framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in wanted}, assign=True)
