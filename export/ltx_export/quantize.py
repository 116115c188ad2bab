"""A checkpoint with codes and scales in the place of weights, as a recipe says, written layer by
layer: nothing larger than some rows of one weight is in memory.

    fit(header, recipe)               -> a rule for each layer, before anything is calibrated
    plan(header, recipe, calibration) -> what will be where; every check that needs no weight
    write(plan, out)                  -> the file, atomically, and a line for each layer
    summary(plan, header)             -> what is quantized in the file, of what was to be

How the layers lie in the file says `ltx_ref.quantization`, how codes are made `ltx_ref.codes`.
Every other tensor is copied byte by byte.
"""

import os
from collections import Counter
from collections.abc import Generator, Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_export import clipping, derive, outputs
from ltx_export.quantization_plan import (
    QuantizationPlan,
    fit,
    is_clipped,
    is_smoothed,
    linear_layers,
    plan,
    shared,
)
from ltx_export.recipes import KEEP
from ltx_ref import casts, codes, quantization
from ltx_ref.checkpoint import Header, TensorInfo, read_header
from ltx_ref.codes import Rows, Vector
from ltx_ref.quantization import CALIBRATED

__all__ = ["QuantizationPlan", "fit", "linear_layers", "plan", "summary", "write"]

PIECE = 1 << 20
"""Weights in memory at once: 4 MiB in float32, and about ten such arrays."""


def write(plan: QuantizationPlan, out: Path, *, overwrite: bool = False) -> Generator[str]:
    """Write the quantized checkpoint; it appears at `out` when it is complete and its header, not
    its numbers, was read again.

    Raises:
        UserError: `out` is there already or its folder is not, the disk is full, a number is not
            finite, or is too large for its format.
    """
    outputs.check(out, {"the checkpoint": plan.source.path}, overwrite=overwrite)
    derive.check_unchanged(plan.source)
    derive.check_room(out, derive.size(plan.target))
    partial = out.with_name(f".{out.name}.{uuid4().hex[:8]}.partial")
    try:
        with derive.told(out), plan.source.path.open("rb") as file, partial.open("xb") as made:
            made.write(derive.head(plan.target))
            yield from _copied(file, made, plan)
            yield from _quantized(file, made, plan)
            made.truncate(derive.size(plan.target))
            made.flush()
            os.fsync(made.fileno())
        derive.check_unchanged(plan.source)
        _check_written(partial, plan)
        with derive.told(out):
            os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def summary(plan: QuantizationPlan, header: Header) -> Iterator[str]:
    """How many layers of a file are quantized, of those for which the recipe has a format, and
    what it keeps.

    Raises:
        CheckpointError: the file is not what it says of itself.
    """
    found = quantization.layers(header)
    counts = Counter(layer.format for layer in found.values())
    listed = f"{sum(counts.values())} of {len(plan.formats)} linear layers"
    if len(counts) == 1:
        yield f"Quantized {listed} to {next(iter(counts))}"
    else:
        formats = ", ".join(f"{count} to {form}" for form, count in counts.most_common())
        yield f"Quantized {listed}: {formats}"
    kept = (rule for rule in plan.rules.values() if rule.format == KEEP)
    for rule, count in Counter(kept).items():
        yield f"Kept {count} of {rule.layers}: {rule.why}"


def _copied(file: BinaryIO, made: BinaryIO, plan: QuantizationPlan) -> Iterator[str]:
    """Everything that is not quantized, in the order in which it is read."""
    others = [
        (name, info)
        for name, info in derive.in_order(plan.source.tensors)
        if name.removesuffix(".weight") not in plan.formats or not name.endswith(".weight")
    ]
    total, done, what = sum(i.end - i.begin for _, i in others), 0, "copying what is kept"
    yield what
    for name, info in others:
        count = prod(info.shape)
        made.seek(plan.target.tensors[name].begin)
        for begin in range(0, count, PIECE):
            piece = casts.read(file, info, begin, min(begin + PIECE, count))
            if info.dtype in casts.NUMPY and not np.isfinite(piece).all():
                raise UserError(
                    f"{plan.source.path}: {name} has NaN or infinity; download it again"
                )
            done += made.write(piece.view(np.uint8).data)
        yield f"{what}: {100 * done // max(total, 1)} %"


def _quantized(file: BinaryIO, made: BinaryIO, plan: QuantizationPlan) -> Iterator[str]:
    smoothings: dict[tuple[str, ...], Vector] = {}
    for path, form in plan.formats.items():
        yield f"{path} to {form}"
        pre = None
        if is_smoothed(plan.recipe, form):
            group = shared(path, [p for p, f in plan.formats.items() if f == form])
            if group not in smoothings:
                smoothings = {group: _smoothing(file, plan, group)}
            pre = smoothings[group]
        _write_layer(file, made, plan, path, pre)


def _smoothing(file: BinaryIO, plan: QuantizationPlan, group: tuple[str, ...]) -> Vector:
    """One vector for all layers that read a tensor, so that it is multiplied once."""
    largest = [
        np.abs(rows).max(axis=0)
        for path in group
        for _, rows in _rows(file, plan.source, f"{path}.weight")
    ]
    alpha = plan.recipe.alpha
    if alpha is None:
        raise AssertionError("a recipe without alpha smooths nothing")
    return codes.smoothing(plan.ranges[group[0]], np.max(largest, axis=0), alpha)


def _write_layer(
    file: BinaryIO, made: BinaryIO, plan: QuantizationPlan, path: str, pre: Vector | None
) -> None:
    form, tensors = plan.formats[path], plan.target.tensors
    largest: Vector | None = None
    if form == "nvfp4":
        pieces = _rows(file, plan.source, f"{path}.weight")
        largest = np.asarray(max(np.abs(rows).max() for _, rows in pieces), np.float32)
        _put(made, tensors[f"{path}.weight_scale_2"], 0, codes.weight_scale_2(float(largest)))
    for begin, rows in _rows(file, plan.source, f"{path}.weight"):
        smooth = codes.smoothed(rows, pre)
        if form == "fp8-cast":
            _check_castable(plan, path, rows)
        clip = clipping.best(smooth, form) if is_clipped(plan.recipe, form) else largest
        coded = codes.encode(smooth, form, clip)
        _put(made, tensors[f"{path}.weight"], begin, coded.weight)
        if coded.weight_scale is not None:
            _put(made, tensors[f"{path}.weight_scale"], begin, coded.weight_scale)
    if form in CALIBRATED:
        scale = codes.input_scale(plan.ranges[path], form, pre)
        _put(made, tensors[f"{path}.input_scale"], 0, scale)
    if pre is not None:
        _put(made, tensors[f"{path}.pre_quant_scale"], 0, pre)


def _check_castable(plan: QuantizationPlan, path: str, rows: Rows) -> None:
    """A cast alone has no scale that would bring a large number into e4m3.

    Raises:
        UserError: one is beyond it.
    """
    if (largest := np.abs(rows).max()) > codes.E4M3_MAX:
        raise UserError(
            f"{plan.source.path}: {path}.weight reaches {largest:g}, fp8-cast ends at "
            f"{codes.E4M3_MAX:g}; choose fp8, or keep the layer in the recipe"
        )


def _rows(file: BinaryIO, header: Header, name: str) -> Iterator[tuple[int, Rows]]:
    """A weight's rows in float32, in pieces, with the number of the first of them.

    Raises:
        UserError: one has a number that is not finite.
    """
    info = header.tensors[name]
    count, columns = info.shape
    step = max(1, PIECE // columns)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        numbers = casts.read(file, info, begin * columns, end * columns)
        rows = numbers.astype(np.float32).reshape(-1, columns)
        if not np.isfinite(rows).all():
            bad = begin + int(np.argmax(~np.isfinite(rows).all(axis=1)))
            raise UserError(
                f"{header.path}: {name} has NaN or infinity in row {bad}; download it again"
            )
        yield begin, rows


def _put(made: BinaryIO, info: TensorInfo, row: int, numbers: NDArray[Any] | np.float32) -> None:
    """At the place of the tensor's row."""
    per_row = (info.end - info.begin) // (info.shape[0] if info.shape else 1)
    made.seek(info.begin + row * per_row)
    made.write(numbers.tobytes())


def _check_written(path: Path, plan: QuantizationPlan) -> None:
    header = read_header(path)
    found = {layer.path: layer.format for layer in quantization.layers(header).values()}
    if header.tensors != plan.target.tensors or found != plan.formats:
        raise AssertionError(f"{path} is not what was planned")
