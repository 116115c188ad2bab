"""What LoRAs make of a stage's weights: computed one after the other, when somebody takes them.

    float weights   W' = round(W + sum of strength * alpha / rank * (B @ A)), as a fused export
    codes           the same sum over their scales becomes codes again (`codes.dithered`); a row has
                    its stored scale unless the sum is beyond it. Smoothed weights are W / pre, so
                    what is added to them is divided by pre as well.

The second differs from a checkpoint that was fused and then quantized: what the codes have lost
before is lost. Ranges of activations stay those that were calibrated without the LoRA.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ltx_engines.bundle import Bundle
from ltx_engines.errors import UserError
from ltx_ref import casts, codes, lora, quantization
from ltx_ref.checkpoint import Header, TensorInfo, read_header
from ltx_ref.lora import Patch, Wish
from ltx_ref.quantization import Format, Layer
from ltx_trt.session import external_data
from ltx_trt.session.checkpoint_weights import STORED
from ltx_trt.session.driver import Bytes

Weight = tuple[str, str, NDArray[Any]]
"""A tensor's name, its element type in the graph and in an engine, and its numbers."""

RECODED: Mapping[Format, float] = MappingProxyType(
    {
        "fp8": codes.E4M3_MAX,
        "fp8-cast": codes.E4M3_MAX,
        "int8": codes.INT8_MAX,
        "int8-wo": codes.INT8_MAX,
    }
)
"""Formats that take a LoRA, with their largest code. Four bits have too few for that."""

PIECE = 1 << 20
"""Weights in memory at once beside the one that is made: 4 MiB in float32, a few such arrays."""

FUSE = (
    "fuse it into the checkpoint instead: ltx-export lora FILE:STRENGTH --checkpoint CHECKPOINT "
    "--out FUSED"
)


@dataclass(frozen=True, slots=True)
class Changed:
    """A weight and what LoRAs add to it; `layer` if it is one of codes."""

    name: str
    header: Header
    patches: tuple[Patch, ...]
    layer: Layer | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are set together."""
        scaled = self.layer is not None and self.layer.weight_scale is not None
        return (self.name, f"{self.name}_scale") if scaled else (self.name,)

    def weights(self) -> Iterator[Weight]:
        """
        Raises:
            UserError, CheckpointError: a number is beyond its type, or a file is damaged.
        """
        with self.header.path.open("rb") as file:
            yield from _floats(file, self) if self.layer is None else _codes(file, self, self.layer)

    def base(self) -> Iterator[Weight]:
        """As the bundle has them."""
        with self.header.path.open("rb") as file:
            for name in self.names:
                info = self.header.tensors[name]
                yield name, STORED[info.dtype], _read(file, info).reshape(info.shape)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that LoRAs change in a stage; nothing of it is computed yet."""

    stage: str
    changed: Mapping[str, Changed]
    """By the weight's name."""

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors that are set."""
        return frozenset(name for changed in self.changed.values() for name in changed.names)

    def weights(self, among: Collection[str] | None = None) -> Iterator[Weight]:
        """Those of them that are named; one weight is in memory at a time."""
        for changed in self.changed.values():
            if among is None or changed.name in among:
                yield from changed.weights()

    def patch(self) -> Callable[[str, Bytes], Bytes]:
        """For whoever reads the checkpoint tensor by tensor: the bytes to use in the place of its
        own. Codes are followed by their scale, so what was made last is kept."""
        owners = {name: changed for changed in self.changed.values() for name in changed.names}
        made: dict[str, Bytes] = {}

        def patched(name: str, given: Bytes) -> Bytes:
            if name not in owners:
                return given
            if name not in made:
                made.clear()
                made.update((n, _bytes(values)) for n, _, values in owners[name].weights())
            return made[name]

        return patched


def of_stage(found: Plan | None, stage: str) -> Iterator[Weight]:
    """What is set in this stage; nothing without a plan for it."""
    return iter(()) if found is None or found.stage != stage else found.weights()


def plan(bundle: Bundle, stage: str, wishes: Sequence[Wish]) -> Plan:
    """Everything that can be wrong with LoRAs is found here, before any weight is loaded.

    Raises:
        UserError, CheckpointError: one does not fit, or changes what cannot be changed.
    """
    entry = bundle.stage(stage)
    if len(entry.weights) != 1:
        raise UserError(
            f"stage {stage} has its weights in {len(entry.weights)} files, a LoRA is for one "
            f"checkpoint; {FUSE}"
        )
    changed = changes(read_header(bundle.file(entry.weights[0])), wishes)
    _check_stage(bundle, stage, changed)
    return Plan(stage, MappingProxyType(changed))


def changes(header: Header, wishes: Sequence[Wish]) -> dict[str, Changed]:
    """By the weight's name.

    Raises:
        UserError, CheckpointError: as `plan` does.
    """
    layers = quantization.layers(header)
    patches: dict[str, tuple[Patch, ...]] = {}
    for adapter in lora.read(wishes, _as_trained(header)):
        for name, added in adapter.patches.items():
            patches[name] = (*patches.get(name, ()), *added)
    _check_factors(patches)
    changed = {
        name: Changed(name, header, added, layers.get(name.removesuffix(".weight")))
        for name, added in patches.items()
    }
    for one in changed.values():
        _check_format(one)
    return changed


def _as_trained(header: Header) -> Header:
    """With the model's own tensors, in the shapes that a LoRA is trained for."""
    own = quantization.shapes(header)
    tensors = {name: replace(header.tensors[name], shape=shape) for name, shape in own.items()}
    return replace(header, tensors=MappingProxyType(tensors))


def _check_stage(bundle: Bundle, stage: str, changed: Mapping[str, Changed]) -> None:
    file = bundle.file(bundle.stage(stage).file)
    known = external_data.initializers(file.read_bytes())
    for name, one in changed.items():
        if name not in known:
            raise UserError(
                f"{one.patches[0].path} changes {name}, which stage {stage} does not read, the "
                f"only one that takes a LoRA at run time; {FUSE}"
            )


def _check_factors(patches: Mapping[str, tuple[Patch, ...]]) -> None:
    """A damaged file is found before the first weight is set."""
    for patch in (patch for added in patches.values() for patch in added):
        infos = [patch.info] if isinstance(patch, lora.Difference) else [patch.down, patch.up]
        with patch.path.open("rb") as file:
            for info in infos:
                if not np.isfinite(casts.cast(casts.read(file, info), "F32", patch.key)).all():
                    raise UserError(
                        f"{patch.path}: {patch.key} or its other factor is not finite; "
                        "download it again"
                    )


def _check_format(changed: Changed) -> None:
    """
    Raises:
        UserError: codes that a LoRA cannot be added to.
    """
    info, layer = changed.header.tensors[changed.name], changed.layer
    if layer is not None and layer.format not in RECODED:
        raise UserError(
            f"{changed.name} is {layer.format}: codes of four bits cannot take a LoRA at run time; "
            "fuse it into the bfloat16 checkpoint with ltx-export lora --out, and quantize that"
        )
    if info.dtype not in STORED:
        raise UserError(f"{changed.name} is {info.dtype}, which takes no LoRA; {FUSE}")


def _bytes(values: NDArray[Any]) -> Bytes:
    return values.reshape(-1).view(np.uint8)


def _read(file: BinaryIO, info: TensorInfo, begin: int = 0, end: int | None = None) -> Any:
    numbers = casts.read(file, info, begin, end)
    return numbers.view(np.int8) if info.dtype == "I8" else numbers


def _pieces(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """The rows of a tensor, some at a time."""
    rows = info.shape[0] if info.shape else 1
    step = max(1, PIECE // max(1, prod(info.shape[1:])))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def _floats(file: BinaryIO, changed: Changed) -> Iterator[Weight]:
    info = changed.header.tensors[changed.name]
    made, row = np.empty(prod(info.shape), casts.element(info.dtype)), prod(info.shape[1:])
    for begin, end in _pieces(info):
        old = casts.read(file, info, begin * row, end * row)
        new = lora.fused(old, changed.patches, begin, end)
        _check_range(changed, new, casts.LARGEST.get(info.dtype, np.inf))
        made[begin * row : end * row] = casts.cast(new, info.dtype, changed.name)
    yield changed.name, STORED[info.dtype], made.reshape(info.shape)


def _codes(file: BinaryIO, changed: Changed, layer: Layer) -> Iterator[Weight]:
    info, (rows, columns) = layer.weight, layer.shape
    made = np.empty((rows, columns), np.int8 if info.dtype == "I8" else casts.element(info.dtype))
    scales = np.ones(rows, np.float32)
    if layer.weight_scale is not None:
        scales[:] = _read(file, layer.weight_scale)
    pre = None if layer.pre_quant_scale is None else _read(file, layer.pre_quant_scale)
    random = np.random.default_rng(crc32(changed.name.encode()))  # the same in each run
    for begin, end in _pieces(info):
        old = _read(file, info, begin * columns, end * columns).reshape(-1, columns)
        added = lora.change(changed.patches, begin, end).reshape(-1, columns)
        piece = _Rows(changed, layer.format, _numbers(old), scales[begin:end])
        scales[begin:end], shares = piece.shares(added if pre is None else added / pre)
        noise = random.integers(0, 1 << 20, shares.shape, np.uint32)
        made[begin:end] = codes.dithered(shares, _kind(layer.format), noise)
    yield changed.name, STORED[info.dtype], made
    if layer.weight_scale is not None:
        yield f"{changed.name}_scale", "float32", scales


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of codes, as numbers, and the scale of each."""

    changed: Changed
    format: Format
    codes: NDArray[np.float32]
    scales: NDArray[np.float32]

    def shares(self, added: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Scales, and what the codes are to be on average: themselves where nothing is added."""
        wished: NDArray[Any] = self.codes + added / self.scales[:, None]
        largest, reached = RECODED[self.format], np.abs(wished).max(axis=1)
        if self.format == "fp8-cast":
            _check_range(self.changed, reached, largest)
            return self.scales, wished
        wider = codes.scale(reached * self.scales, largest)
        new = np.where(reached > largest, wider, self.scales)
        return new, wished * (self.scales / new)[:, None]


def _numbers(old: NDArray[Any]) -> NDArray[np.float32]:
    """What codes stand for, without their scale."""
    if old.dtype == np.int8:
        return old.astype(np.float32)
    return casts.E4M3[old.view(np.uint8)]


def _kind(form: Format) -> Format:
    return "fp8" if form in {"fp8", "fp8-cast"} else "int8"


def _check_range(changed: Changed, numbers: NDArray[Any], largest: float) -> None:
    """
    Raises:
        UserError: one is too large for the weight's type.
    """
    if numbers.size and (reached := float(np.abs(numbers).max())) > largest:
        files = ", ".join(sorted({str(patch.path) for patch in changed.patches}))
        raise UserError(
            f"{files}: {changed.name} reaches {reached:.3g} with it, its type ends at "
            f"{largest:.3g}; lower the strength"
        )
