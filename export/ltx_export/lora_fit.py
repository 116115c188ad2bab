"""Whether LoRAs can be fused into a checkpoint, and a report about one."""

import re
from collections import Counter
from collections.abc import Generator, Iterable, Mapping

from ltx_engines.errors import UserError
from ltx_export import convert
from ltx_ref import lora, lora_file
from ltx_ref.casts import FLOATS
from ltx_ref.checkpoint import CheckpointError, Header
from ltx_ref.lora import Adapter, Wish
from ltx_ref.lora_file import LoraFile


def read(wishes: Iterable[Wish], header: Header) -> tuple[Adapter, ...]:
    """The LoRAs, ready to be fused. One that is named twice has the sum of its strengths.

    Raises:
        UserError, CheckpointError: a file is not a LoRA, not one for this checkpoint, or it
            changes nothing; or the checkpoint is quantized.
    """
    _check_unquantized(header)
    return lora.read(wishes, header)


def lines(wish: Wish, header: Header | None = None) -> Generator[str, None, bool]:
    """A report, line by line; whether it fits comes last, and is returned.

    Raises:
        UserError, CheckpointError: not a LoRA that can be fused.
    """
    path, file = wish.path, lora_file.read(wish.path)
    modules = file.modules.values()
    pairs = [module for module in modules if "down" in module.keys]
    size, count = path.stat().st_size, len(file.header.tensors)
    types = sorted({info.dtype for info in file.header.tensors.values()})
    yield f"{path}: {size:,} bytes, {count:,} tensors ({', '.join(types)})"
    yield f"  strength: {wish.strength:g}"
    yield f"  names: {file.style()}"
    yield f"  made for: {file.likeness()}"
    yield f"  modules: {len(modules):,}, {len(modules) - len(pairs):,} of them as plain differences"
    yield f"  rank: {_counted(file.rank(module) for module in pairs)}"
    yield f"  alpha: {_counted(file.alpha(module) for module in pairs)}"
    yield f"  factor (from alpha and rank): {_counted(file.scale(module) for module in pairs)}"
    for kind, number in sorted(Counter(_without_numbers(m.name) for m in modules).items()):
        yield f"    {number:,} {kind}"
    for key, value in sorted(file.header.metadata.items()):
        yield f"  metadata {key}: {' '.join(value.split())[:80]}"
    if header is None:
        return True
    fits, verdict = _verdict(file, header, wish.strength)
    yield f"  {verdict}"
    return fits


def check_fusible(header: Header) -> None:
    """A LoRA goes into float weights; what is to be quantized is quantized afterwards.

    Raises:
        UserError: the checkpoint is quantized, other than by plain casts.
    """
    _check_unquantized(header)
    convert.check_kind(header, "takes no LoRA")


def _check_unquantized(header: Header) -> None:
    if (found := convert.kind(header)).name == "quantized":
        raise UserError(
            f"{header.path} takes no LoRA: {found.sentence}; fuse it into the bfloat16 checkpoint "
            "with ltx-export lora --out, and quantize that"
        )


def check_float(header: Header, types: Mapping[str, str], names: Iterable[str]) -> None:
    """`types` are those that the tensors will have.

    Raises:
        UserError: one of the weights that are changed is cast to 8 bits.
    """
    for name in names:
        if name in types and types[name] not in FLOATS:
            raise UserError(
                f"{header.path}: {name} is {types[name]}, a LoRA is fused into float weights; "
                "add --precision bfloat16, or start from the bfloat16 checkpoint"
            )


def _verdict(file: LoraFile, header: Header, strength: float) -> tuple[bool, str]:
    try:
        types = convert.types(header, None)
        check_fusible(header)
        patches = lora.effective(file, header, strength)
        check_float(header, types, patches)
    except (UserError, CheckpointError) as error:
        return False, f"cannot be fused: {error}"
    count = f"{len(patches):,} of {len(header.tensors):,} tensors"
    return True, f"fits {header.path}: changes {count}"


def _without_numbers(module: str) -> str:
    """transformer_blocks.*.attn1.to_q: what modules of all blocks have in common."""
    return re.sub(r"(?<=blocks[._])\d+", "*", module)


def _counted(values: Iterable[float | None]) -> str:
    """Each value, and how often; `none` where there is nothing to count."""
    counts = Counter("not given" if value is None else f"{value:g}" for value in values)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(8)) or "none"
