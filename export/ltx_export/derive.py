"""A safetensors file made from another: its numbers in another type, LoRAs added to its weights.

What the new file will look like is known from headers alone, so that a graph can be bound to it
before it is there. It is written piece by piece; a fused weight is rounded once, at the end:

    new = round(float32(old) + sum of strength * alpha / rank * (B @ A))
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, TypeVar
from uuid import uuid4

import numpy as np

from ltx_engines.bundle import Precision
from ltx_engines.errors import UserError
from ltx_export import convert, lora_fit
from ltx_ref import casts, lora, quantization
from ltx_ref.casts import Numbers
from ltx_ref.checkpoint import BITS, Header, TensorInfo, read_header
from ltx_ref.lora import Adapter, Patch
from ltx_ref.lora_file import listed

PROVENANCE = "ltx_trt.lora"
"""Key of the metadata: which LoRAs the weights contain, as a JSON list."""

PIECE = 1 << 22
"""Numbers in memory at once: 16 MiB in float32, and a few such arrays at a time."""

Entry = tuple[str, tuple[int, ...]]
"""Element type and shape."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of the new file: written, and in all."""

    done: int
    total: int


def planned(
    header: Header,
    precision: Precision | None = None,
    adapters: Sequence[Adapter] = (),
    keep: Collection[str] | None = None,
) -> Header:
    """The header of the file that `write` will make; the given one if there is nothing to do.

    Only tensors named in `keep` go into the new file, and the scales of weights among them; None
    keeps all; it may name others' too.

    Raises:
        UserError: the file is not understood, or a LoRA changes nothing that is kept.
    """
    types = convert.types(header, precision)
    tensors = {n: i for n, i in header.tensors.items() if keep is None or _weight(n) in keep}
    changed = any(types[name] != info.dtype for name, info in tensors.items())
    if not adapters and not changed:
        return header
    if adapters:
        _check_fusible(header, {name: types[name] for name in tensors}, adapters)
    words = [header.path.stem, "lora" if adapters else None, precision if changed else None]
    path = header.path.with_name(".".join(word for word in words if word) + ".safetensors")
    entries = {name: (types[name], info.shape) for name, info in in_order(tensors)}
    metadata = {**_metadata(header, tensors), **_provenance(header, adapters)}
    return laid_out(path, entries, metadata)


def laid_out(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Header:
    """The header of a file of these tensors: wide types first, so that every number is aligned,
    otherwise in their order."""
    known = MappingProxyType(dict(metadata))
    bare = Header(path, MappingProxyType(_layout(entries, 0)), known)
    return Header(path, MappingProxyType(_layout(entries, len(head(bare)))), known)


def write(
    source: Header, target: Header, path: Path, adapters: Sequence[Adapter] = ()
) -> Generator[Progress, None, str]:
    """Write the file that `target`, from `planned(source, ...)`, describes; return its sha256.

    It appears at `path` when it is complete. Whoever stops earlier leaves nothing behind.

    Raises:
        UserError: a number is too large for the new type, a LoRA is damaged, or the disk is full.
    """
    total = size(target)
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    digest = hashlib.sha256()
    check_unchanged(source)
    check_room(path, total)
    try:
        with source.path.open("rb") as file, told(path), partial.open("xb") as out:
            for piece in _pieces(file, source, target, adapters):
                out.write(piece)
                digest.update(piece)
                yield Progress(out.tell(), total)
            out.flush()
            os.fsync(out.fileno())  # a kept file is trusted later without being read
        with told(path):
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def percents(work: Generator[Progress, None, T], what: str) -> Generator[str, None, T]:
    """Say at each percent how far the work is, and return what it returns."""
    last = -1
    with closing(work):
        while True:
            try:
                progress = next(work)
            except StopIteration as end:
                result: T = end.value
                return result
            percent = 100 * progress.done // max(progress.total, 1)
            if percent > last:
                yield f"{what}: {percent} %"
                last = percent


def size(header: Header) -> int:
    """Bytes of the whole file."""
    return max((info.end for info in header.tensors.values()), default=len(head(header)))


def head(header: Header) -> bytes:
    """The length and the JSON header, padded so that the data begin at a multiple of eight."""
    metadata = dict(header.metadata)
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    start = min((info.begin for info in header.tensors.values()), default=0)
    for name, info in in_order(header.tensors):
        offsets = [info.begin - start, info.end - start]
        table[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_order(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    """As the data lie in the file; of tensors without data, which share a place, as named."""
    return sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))


def _weight(name: str) -> str:
    """The weight that a scale belongs to; any other tensor itself."""
    path, _, part = name.rpartition(".")
    return f"{path}.weight" if part in quantization.PARTS else name


def _metadata(header: Header, tensors: Collection[str]) -> dict[str, str]:
    """The header's, with those quantized layers listed that are among the tensors."""
    metadata = dict(header.metadata)
    if (written := quantization.provenance(header)) is not None:
        layers = {path: f for path, f in written["layers"].items() if f"{path}.weight" in tensors}
        metadata[quantization.METADATA] = json.dumps({**written, "layers": layers})
        if not layers:
            del metadata[quantization.METADATA]
    return metadata


def _layout(entries: Mapping[str, Entry], start: int) -> dict[str, TensorInfo]:
    placed = {}
    for name, (dtype, shape) in sorted(entries.items(), key=lambda item: -BITS[item[1][0]]):
        end = start + prod(shape) * BITS[dtype] // 8
        placed[name] = TensorInfo(dtype, shape, start, end)
        start = end
    return placed


def _provenance(header: Header, adapters: Sequence[Adapter]) -> dict[str, str]:
    if not adapters:
        return {}
    try:
        before = list(json.loads(header.metadata.get(PROVENANCE, "[]")))
    except (ValueError, TypeError, RecursionError):
        raise UserError(
            f"{header.path}: its metadata {PROVENANCE} is not a JSON list; start from the original"
        ) from None
    after = [
        {"file": adapter.path.name, "sha256": adapter.sha256, "strength": adapter.strength}
        for adapter in adapters
    ]
    return {PROVENANCE: json.dumps([*before, *after])}


def _check_fusible(header: Header, types: Mapping[str, str], adapters: Sequence[Adapter]) -> None:
    """`types` are those of the tensors that are kept."""
    lora_fit.check_fusible(header)
    for adapter in adapters:
        if not adapter.patches.keys() & types.keys():
            raise UserError(
                f"{adapter.path}: the stages that were chosen read none of the "
                f"{len(adapter.patches):,} weights that it changes ({listed(adapter.patches)}); "
                "choose their stage too, or leave the LoRA out"
            )
    lora_fit.check_float(header, types, (name for adapter in adapters for name in adapter.patches))


def check_unchanged(source: Header) -> None:
    """
    Raises:
        UserError: the file is not what it was when its header was read.
    """
    if read_header(source.path) != source:
        raise UserError(f"{source.path} has changed since it was looked at; start again")


def check_room(path: Path, needed: int) -> None:
    """
    Raises:
        UserError: the disk has fewer bytes than that left.
    """
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise UserError(f"{path} needs {needed:,} bytes, {path.parent} has {free:,} left")


def _pieces(
    file: BinaryIO, source: Header, target: Header, adapters: Sequence[Adapter]
) -> Iterator[memoryview]:
    yield memoryview(head(target))
    for name, info in in_order(target.tensors):
        patches = [patch for adapter in adapters for patch in adapter.patches.get(name, ())]
        what = f"{source.path}: {name}{' with its LoRA' if patches else ''}"
        for numbers in _numbers(file, source.tensors[name], patches):
            yield casts.cast(numbers, info.dtype, what).view(np.uint8).data


def _numbers(file: BinaryIO, info: TensorInfo, patches: Sequence[Patch]) -> Iterator[Numbers]:
    """The tensor, flattened, in pieces; whole rows of it if there is something to add."""
    count, row = prod(info.shape), prod(info.shape[1:]) if patches else 1
    step = max(1, PIECE // max(1, row)) * row
    for begin in range(0, count, max(1, step)):
        end = min(begin + step, count)
        numbers = casts.read(file, info, begin, end)
        yield lora.fused(numbers, patches, begin // row, end // row) if patches else numbers


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What the operating system refuses, a user can mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
