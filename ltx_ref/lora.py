"""LoRAs for a checkpoint: what the user wishes, whether it fits, what it adds to each weight."""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ltx_ref import casts, lora_file
from ltx_ref.casts import Numbers
from ltx_ref.checkpoint import CheckpointError, Header, TensorInfo
from ltx_ref.lora_file import LoraFile, Module, flat, listed

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
            down = casts.cast(casts.read(file, self.down), "F32", self.key)
            up = casts.cast(casts.read(file, self.up, begin * rank, end * rank), "F32", self.key)
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
            numbers = casts.read(file, self.info, begin * row, end * row)
        change: Numbers = casts.cast(numbers, "F32", self.key) * self.scale
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
        CheckpointError: what follows the last colon is meant as a strength and is none.
    """
    return tuple(_wish(word) for word in words)


def read(wishes: Iterable[Wish], header: Header) -> tuple[Adapter, ...]:
    """The LoRAs, ready to be added. One that is named twice has the sum of its strengths.

    Raises:
        CheckpointError: a file is not a LoRA, not one for this checkpoint, or it changes nothing.
    """
    several: dict[str, list[Wish]] = {}
    for wish in wishes:
        several.setdefault(os.path.realpath(wish.path), []).append(wish)
    found = [(lora_file.read(same[0].path), _sum(same)) for same in several.values()]
    patches = [effective(file, header, strength) for file, strength in found]
    return tuple(
        Adapter(file.path, _sha256(file.path), strength, added, _inputs(file))
        for (file, strength), added in zip(found, patches, strict=True)
    )


def fused(numbers: Numbers, patches: Sequence[Patch], begin: int, end: int) -> Numbers:
    """Rows `begin` to `end` of a weight with everything added that belongs to them.

    Raises:
        CheckpointError: what is added is not finite.
    """
    wide = numbers if numbers.dtype == np.float64 else casts.cast(numbers, "F32", "")
    added = change(patches, begin, end)
    with np.errstate(over="ignore", invalid="ignore"):
        result: Numbers = wide + added
    return result


def change(patches: Sequence[Patch], begin: int, end: int) -> Numbers:
    """What is added to rows `begin` to `end` of a weight, flattened, in float32.

    Raises:
        CheckpointError: it is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        added = patches[0].rows(begin, end)
        for patch in patches[1:]:
            added = added + patch.rows(begin, end)
    if not np.isfinite(added).all():
        files = ", ".join(sorted({str(patch.path) for patch in patches}))
        raise CheckpointError(
            f"{files}: what {patches[0].key} adds is not finite; "
            "lower the strength, or download the file again"
        )
    return added


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
    raise CheckpointError(
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


def effective(file: LoraFile, header: Header, strength: float) -> Mapping[str, tuple[Patch, ...]]:
    """The same, if it is anything at all."""
    patches = _patches(file, header, strength)
    if any(patch.scale for added in patches.values() for patch in added):
        return patches
    why = "strength times alpha is 0 in each module" if strength else "its strength is 0 in all"
    raise CheckpointError(
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
        raise CheckpointError(
            f"{file.path}: {next(iter(targets))} looks made for {made_for}, {header.path} is "
            f"{here}; take a LoRA that was trained on this model"
        )


def _unmatched(file: LoraFile, header: Header, lost: list[str]) -> CheckpointError:
    known = [lora_file.bare(name) for name in header.tensors]
    ending = next(end for end in lora_file.ENDINGS if lost[0].endswith(end))
    module = lora_file.bare(lost[0].removesuffix(ending))
    near = get_close_matches(f"{module}.weight", known, n=1)
    hint = "".join(f"; did you mean {match!r}?" for match in near)
    return CheckpointError(
        f"{file.path}: {len(lost):,} of its modules match no weight of {header.path}: "
        f"{listed(lost)} (made for {file.likeness()}); take a LoRA that was trained on this model"
        f"{hint}"
    )


def _check_shape(file: LoraFile, header: Header, patch: Patch, name: str) -> None:
    if (found := _shape(patch)) != (wanted := header.tensors[name].shape):
        raise CheckpointError(
            f"{file.path}: {patch.key} changes a weight of shape {list(found)}, {name} of "
            f"{header.path} is {list(wanted)}; take a LoRA that was trained on this model"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
