"""LoRAs for a checkpoint: what the user wishes, whether it fits, what it adds to each weight."""

import math
import os
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType

from ltx_engines import hashes
from ltx_engines.errors import UserError, nearest
from ltx_export import convert, lora_file
from ltx_export.convert import Numbers
from ltx_export.lora_file import LoraFile, Module, flat, listed
from ltx_ref.checkpoint import Header, TensorInfo

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
SPELLINGS = str.maketrans({",": ".", "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", " ": None})
"""What people write for a decimal point and a minus."""


@dataclass(frozen=True, slots=True)
class Wish:
    """--lora FILE[:STRENGTH]"""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale * B @ A, in float32."""

    path: Path
    key: str
    down: TensorInfo
    up: TensorInfo
    scale: float

    def rows(self, begin: int, end: int) -> Numbers:
        """The change of the weight's rows, flattened."""
        rank = self.down.shape[0]
        with self.path.open("rb") as file:
            down = convert.cast(convert.read(file, self.down), "F32", self.key)
            up = convert.cast(
                convert.read(file, self.up, begin * rank, end * rank), "F32", self.key
            )
        change: Numbers = (up.reshape(-1, rank) * self.scale) @ down.reshape(rank, -1)
        return change.reshape(-1)


@dataclass(frozen=True, slots=True)
class Difference:
    """scale * a tensor of the weight's own shape."""

    path: Path
    key: str
    info: TensorInfo
    scale: float

    def rows(self, begin: int, end: int) -> Numbers:
        row = math.prod(self.info.shape[1:])
        with self.path.open("rb") as file:
            numbers = convert.read(file, self.info, begin * row, end * row)
        change: Numbers = convert.cast(numbers, "F32", self.key) * self.scale
        return change


Patch = LowRank | Difference


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA that fits: what it adds to each weight of the checkpoint, by the weight's name."""

    path: Path
    sha256: str
    strength: float
    patches: Mapping[str, tuple[Patch, ...]]
    inputs: tuple[Path, ...]
    """The files that decide about it."""


def parse(words: Iterable[str]) -> tuple[Wish, ...]:
    """
    Raises:
        UserError: what follows the last colon is meant as a strength and is none.
    """
    return tuple(_wish(word) for word in words)


def read(wishes: Iterable[Wish], header: Header) -> tuple[Adapter, ...]:
    """The LoRAs, ready to be fused. One that is named twice has the sum of its strengths.

    Raises:
        UserError, CheckpointError: a file is not a LoRA, not one for this checkpoint, or it
            changes nothing; or the checkpoint is quantized.
    """
    _check_unquantized(header)
    several: dict[str, list[Wish]] = {}
    for wish in wishes:
        several.setdefault(os.path.realpath(wish.path), []).append(wish)
    found = [(lora_file.read(same[0].path), _sum(same)) for same in several.values()]
    patches = [_effective(file, header, strength) for file, strength in found]
    return tuple(
        Adapter(file.path, hashes.sha256(file.path), strength, added, _inputs(file))
        for (file, strength), added in zip(found, patches, strict=True)
    )


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
        if name in types and types[name] not in convert.FLOATS:
            raise UserError(
                f"{header.path}: {name} is {types[name]}, a LoRA is fused into float weights; "
                "add --precision bfloat16, or start from the bfloat16 checkpoint"
            )


def _wish(word: str) -> Wish:
    head, colon, tail = word.rpartition(":")
    if not colon or Path(word).exists():
        return Wish(Path(word))
    if NUMBER.fullmatch(tail) and math.isfinite(float(tail)):
        return Wish(Path(head), float(tail))
    meant = NUMBER.fullmatch(tail) or NOT_FINITE.fullmatch(tail) or Path(head).exists()
    if not meant and not head.endswith(".safetensors"):
        return Wish(Path(word))  # the colon is part of a path, as in C:\loras\a.safetensors
    better = tail.translate(SPELLINGS)
    hint = f"; did you mean {head}:{better}?" if NUMBER.fullmatch(better) else ""
    hint = "" if better == tail else hint
    raise UserError(
        f"--lora {word}: the strength {tail!r} is not a finite number; write it as in "
        f"{head}:0.8 or {head}:-0.5{hint}"
    )


def _sum(wishes: Iterable[Wish]) -> float:
    """As one adds up what was written: 0.1 and 0.2 are 0.3, and with -0.3 they are nothing."""
    return float(sum(Decimal(repr(wish.strength)) for wish in wishes))


def _inputs(file: LoraFile) -> tuple[Path, ...]:
    return (file.path,) if file.settings.file is None else (file.path, file.settings.file)


def _patches(file: LoraFile, header: Header, strength: float) -> Mapping[str, tuple[Patch, ...]]:
    """What the file adds to each weight of the checkpoint; all of it, or an error."""
    names = _index(header)
    targets = {
        key: name
        for place, module in file.modules.items()
        for key, name in _targets(place, module, names)
    }
    _check_model(file, header, targets)
    if lost := [key for key, name in targets.items() if name is None]:
        raise _unmatched(file, header, lost)
    patches: dict[str, tuple[Patch, ...]] = {}
    for module in file.modules.values():
        for patch in _of_module(file, module, strength):
            name = str(targets[patch.key])
            _check_shape(file, header, patch, name)
            patches[name] = (*patches.get(name, ()), patch)
    return MappingProxyType(patches)


def _effective(file: LoraFile, header: Header, strength: float) -> Mapping[str, tuple[Patch, ...]]:
    """The same, if it is anything at all."""
    patches = _patches(file, header, strength)
    if any(patch.scale for added in patches.values() for patch in added):
        return patches
    why = "strength times alpha is 0 in each module" if strength else "its strength is 0 in all"
    raise UserError(
        f"{file.path} changes nothing: {why}; leave it out, or give another "
        f"{'file' if strength else 'strength'}"
    )


def _index(header: Header) -> dict[str, str]:
    """The checkpoint's weights by flat module name, other tensors by flat name."""
    return {flat(name.removesuffix(".weight")): name for name in header.tensors}


def _targets(
    place: str, module: Module, names: Mapping[str, str]
) -> Iterator[tuple[str, str | None]]:
    """Each key that changes something, and the name of what it changes."""
    for role, key in module.keys.items():
        if role in {"up", "diff"}:
            yield key, names.get(place)
        elif role == "diff_b":
            yield key, names.get(f"{place}_bias")


def _of_module(file: LoraFile, module: Module, strength: float) -> Iterator[Patch]:
    tensors, keys = file.header.tensors, module.keys
    if "up" in keys:
        down, up, scale = tensors[keys["down"]], tensors[keys["up"]], file.scale(module)
        yield LowRank(file.path, keys["up"], down, up, strength * scale)
    for role in ("diff", "diff_b"):
        if (key := keys.get(role)) is not None:
            yield Difference(file.path, key, tensors[key], strength)


def _shape(patch: Patch) -> tuple[int, ...]:
    if isinstance(patch, Difference):
        return patch.info.shape
    return (patch.up.shape[0], *patch.down.shape[1:])


def _check_model(file: LoraFile, header: Header, targets: Mapping[str, str | None]) -> None:
    """The wrong model is said as such, not as a thousand wrong shapes."""
    shapes = {flat(name.removesuffix(".weight")): s for name, s in header.shapes().items()}
    made_for, here = file.likeness(), lora_file.likeness(shapes)
    if made_for.contradicts(here):
        raise UserError(
            f"{file.path}: {next(iter(targets))} looks made for {made_for}, {header.path} is "
            f"{here}; take a LoRA that was trained on this model"
        )


def _unmatched(file: LoraFile, header: Header, lost: list[str]) -> UserError:
    known = [lora_file.bare(name) for name in header.tensors]
    ending = next(end for end in lora_file.ENDINGS if lost[0].endswith(end))
    module = lora_file.bare(lost[0].removesuffix(ending))
    return UserError(
        f"{file.path}: {len(lost):,} of its modules match no weight of {header.path}: "
        f"{listed(lost)} (made for {file.likeness()}); take a LoRA that was trained on this model"
        f"{nearest(f'{module}.weight', known)}"
    )


def _check_shape(file: LoraFile, header: Header, patch: Patch, name: str) -> None:
    if (found := _shape(patch)) != (wanted := header.tensors[name].shape):
        raise UserError(
            f"{file.path}: {patch.key} changes a weight of shape {list(found)}, {name} of "
            f"{header.path} is {list(wanted)}; take a LoRA that was trained on this model"
        )


def _verdict(file: LoraFile, header: Header, strength: float) -> tuple[bool, str]:
    try:
        types = convert.types(header, None)
        check_fusible(header)
        patches = _effective(file, header, strength)
        check_float(header, types, patches)
    except UserError as error:
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
