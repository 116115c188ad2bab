"""What each layer costs in each format: kept as JSON, shown as a table, drawn as a picture.

The error of a layer is that of its block's output when this layer alone is quantized, relative to
what the block does: |y_q - y| / |y - x|, over all calls. That of a block: with all of its layers.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ltx_engines.errors import UserError
from ltx_export import outputs
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX
from ltx_ref.quantization import FORMATS, Format

VERSION = 1
"""Of the file: a reader that does not know it stops."""

SHOWN = 30
"""Layers in the table: the largest errors."""

BAR = 24
"""Columns of the longest bar."""

_IN_BLOCK = re.compile(rf"{re.escape(TRANSFORMER_PREFIX)}transformer_blocks\.(\d+)\.(.+)")

FINEST = 1e-5
"""The lightest colour of the picture: an error that nobody sees."""


@dataclass(frozen=True, slots=True)
class Errors:
    """What one recipe does to each of its layers alone, and to blocks with all of them."""

    recipe: Mapping[str, Any]
    """As `Recipe.table` has it."""
    formats: Mapping[str, Format]
    layers: Mapping[str, float]
    blocks: Mapping[str, float]

    @property
    def name(self) -> str:
        return str(self.recipe["name"])


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """`facts`: the checkpoint, the calibration, the runs on which it was measured."""

    facts: Mapping[str, Any]
    measured: tuple[Errors, ...]

    def check_same(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """`path` is where it was read from, `checkpoint` what `calibration.identity` says.

        Raises:
            UserError: it was measured on another checkpoint.
        """
        known = self.facts["checkpoint"]
        if any(known.get(key) != checkpoint[key] for key in ("bytes", "sha256", "sample")):
            raise UserError(
                f"{path} was measured on {known.get('name')} of {known.get('bytes')} bytes, which "
                f"is not {checkpoint['name']}; measure this checkpoint"
            )


@dataclass(frozen=True, slots=True)
class Place:
    """Of a layer: its block, and its name in each block."""

    block: int
    kind: str


def place(path: str) -> Place:
    """
    Raises:
        ValueError: it is not in a block.
    """
    found = _IN_BLOCK.fullmatch(path)
    if found is None:
        raise ValueError(f"{path} is no layer of a block")
    return Place(int(found[1]), found[2])


def block_path(index: int) -> str:
    return f"{TRANSFORMER_PREFIX}transformer_blocks.{index}"


def save(sensitivity: Sensitivity, path: Path) -> None:
    """Atomically, in the place of what was there."""
    measured = [
        {
            "recipe": dict(errors.recipe),
            "layers": {
                layer: {"format": errors.formats[layer], "error": error}
                for layer, error in errors.layers.items()
            },
            "blocks": dict(errors.blocks),
        }
        for errors in sensitivity.measured
    ]
    document = {"version": VERSION, "facts": dict(sensitivity.facts), "measured": measured}
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    _appear(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read(path: Path) -> Sensitivity:
    """
    Raises:
        UserError: the file is not what `ltx-export sensitivity` writes.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            raise ValueError
        measured = tuple(_errors(entry) for entry in document["measured"])
        facts = dict(document["facts"])
        if not isinstance(facts["checkpoint"], dict):
            raise ValueError
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(
            f"{path} is not what ltx-export sensitivity writes; measure it again"
        ) from None
    return Sensitivity(facts, measured)


def _errors(entry: Mapping[str, Any]) -> Errors:
    layers = {path: _error(layer["error"]) for path, layer in entry["layers"].items()}
    formats = {path: layer["format"] for path, layer in entry["layers"].items()}
    blocks = {path: _error(error) for path, error in entry["blocks"].items()}
    for path in layers:
        place(path)
    if not set(formats.values()) <= set(FORMATS) or not isinstance(entry["recipe"]["name"], str):
        raise ValueError
    return Errors(entry["recipe"], formats, layers, blocks)


def _error(value: Any) -> float:
    if type(value) not in {int, float} or not math.isfinite(value) or value < 0:
        raise ValueError
    return float(value)


def _appear(path: Path, make: Callable[[Path], object]) -> None:
    """Under another name first; its suffix is the same, which tells matplotlib the format."""
    partial = path.with_name(f".{path.stem}.{uuid4().hex[:8]}.partial{path.suffix}")
    try:
        make(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def show(sensitivity: Sensitivity, console: Console) -> None:
    """The largest errors first, then what kinds of layers and what blocks have in common."""
    for title, table in (
        _worst(sensitivity),
        ("By kind of layer: the mean error (and the largest)", _kinds(sensitivity)),
        ("By block, all of its layers quantized", _blocks(sensitivity)),
    ):
        console.print(title, highlight=False)
        console.print(table)


def ranked(sensitivity: Sensitivity) -> list[tuple[str, Format, float]]:
    """Each layer in each recipe, the largest error first."""
    entries = [
        (path, errors.formats[path], error)
        for errors in sensitivity.measured
        for path, error in errors.layers.items()
    ]
    return sorted(entries, key=lambda entry: -entry[2])


def _worst(sensitivity: Sensitivity) -> tuple[str, Table]:
    entries = ranked(sensitivity)
    shown = entries[:SHOWN]
    table = _table()
    table.add_column("layer", no_wrap=True)
    table.add_column("format", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    largest = max((error for *_, error in shown), default=0.0) or 1.0
    for path, form, error in shown:
        bar = Bar(largest, 0, error, width=BAR)
        table.add_row(path.removeprefix(TRANSFORMER_PREFIX), form, f"{error:.5f}", bar)
    return f"The {len(shown)} largest of {len(entries)} errors of single layers", table


def _kinds(sensitivity: Sensitivity) -> Table:
    table = _table()
    table.add_column("kind", no_wrap=True)
    for errors in sensitivity.measured:
        table.add_column(errors.name, justify="right", no_wrap=True)
    for kind in kinds(sensitivity):
        cells = []
        for errors in sensitivity.measured:
            found = [error for path, error in errors.layers.items() if place(path).kind == kind]
            mean = sum(found) / len(found) if found else None
            cells.append("" if mean is None else f"{mean:.5f} ({max(found):.5f})")
        table.add_row(kind, *cells)
    return table


def _blocks(sensitivity: Sensitivity) -> Table:
    table = _table()
    table.add_column("block", justify="right", no_wrap=True)
    for errors in sensitivity.measured:
        table.add_column(errors.name, justify="right", no_wrap=True)
    for index in block_indices(sensitivity):
        found = [errors.blocks.get(block_path(index)) for errors in sensitivity.measured]
        table.add_row(str(index), *("" if error is None else f"{error:.5f}" for error in found))
    return table


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, show_edge=False)


def kinds(sensitivity: Sensitivity) -> list[str]:
    """In the order in which they were first measured."""
    paths = (path for errors in sensitivity.measured for path in errors.layers)
    return list(dict.fromkeys(place(path).kind for path in paths))


def block_indices(sensitivity: Sensitivity) -> list[int]:
    paths = (path for errors in sensitivity.measured for path in errors.layers)
    return sorted({place(path).block for path in paths})


def plot(sensitivity: Sensitivity, path: Path) -> None:
    """A map of blocks and kinds for each recipe, with one scale of colours for all.

    Raises:
        UserError: the file's suffix is not .png, or matplotlib is not installed.
    """
    check_plot(path)
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows, columns = block_indices(sensitivity), [*kinds(sensitivity), "all"]
    count = len(sensitivity.measured)
    size = (1.5 + 0.32 * len(columns) * count + 1.2 * count, 2.2 + 0.2 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grids = [_grid(errors, rows, columns) for errors in sensitivity.measured]
    largest = max((error for grid in grids for row in grid for error in row if error), default=1.0)
    norm = LogNorm(FINEST, max(largest, 10 * FINEST))
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis, grid, errors in zip(axes, grids, sensitivity.measured, strict=True):
        shown = [[math.nan if e is None else max(e, FINEST) for e in row] for row in grid]
        image = axis.imshow(shown, norm=norm, cmap="viridis", aspect="auto")
        axis.set_title(errors.name)
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
        axis.set_yticks(range(len(rows)), [str(index) for index in rows], fontsize=8)
    axes[0].set_ylabel("block")
    figure.colorbar(image, ax=axes, label="relative error of the block's output")
    _appear(path, lambda partial: figure.savefig(partial, dpi=120))


PACKAGES = ("safetensors", "torch", "transformers")
"""What runs the reference."""


def check(
    out: Path | None, picture: Path | None, inputs: Mapping[str, Path], *, overwrite: bool
) -> None:
    """Everything that is known before anything is measured.

    Raises:
        UserError: something is not installed, or a file must not or cannot be written.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"ltx-export sensitivity needs {', '.join(missing)}; pip install 'ltx-trt[quantize]'"
        )
    if out is not None:
        outputs.check(out, inputs, overwrite=overwrite)
    if picture is not None:
        others = inputs if out is None else {**inputs, "--out": out}
        outputs.check(picture, others, overwrite=overwrite, option="--plot")
        check_plot(picture)


def check_plot(path: Path) -> None:
    if path.suffix != ".png":
        raise UserError(f"--plot {path} must end with .png")
    if find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib; pip install 'ltx-trt[quantize]'")


def _grid(errors: Errors, rows: list[int], columns: list[str]) -> list[list[float | None]]:
    found = {place(path): error for path, error in errors.layers.items()}
    return [
        [
            *(found.get(Place(row, kind)) for kind in columns[:-1]),
            errors.blocks.get(block_path(row)),
        ]
        for row in rows
    ]
