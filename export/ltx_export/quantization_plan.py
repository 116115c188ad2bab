"""What a recipe and the ranges of activations make of a checkpoint, and where it will lie in the
new file: everything that can be known, and refused, before a weight is read."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from ltx_engines.errors import UserError
from ltx_export import __version__, calibration, clipping, convert, derive, recipes
from ltx_export.calibration import Calibration
from ltx_export.recipes import CLIPPED, Recipe, Rule
from ltx_ref import quantization
from ltx_ref.checkpoint import Header, TensorInfo
from ltx_ref.codes import Vector
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX
from ltx_ref.quantization import (
    CALIBRATED,
    INT4_BLOCK,
    NVFP4_BLOCK,
    SHARED_INPUTS,
    Format,
    Layer,
)

BLOCKS: Mapping[Format, int] = {"int4-wo": INT4_BLOCK, "nvfp4": NVFP4_BLOCK}
"""Inputs that share a scale: what a layer's inputs must be a multiple of."""

WEIGHTS = frozenset({"F32", "F16", "BF16"})
BLOCKS_OF = f"{TRANSFORMER_PREFIX}transformer_blocks."
"""What the paths of layers that may be quantized begin with: codes elsewhere nobody reads."""

STORED: Mapping[Format, str] = {
    **{"fp8": "F8_E4M3", "fp8-cast": "F8_E4M3", "int8": "I8", "int8-wo": "I8"},
    **{"int4-wo": "U8", "nvfp4": "U8"},
}
"""Element types of codes. A U8 is two of them."""


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """What becomes of each linear layer, and the header of the file that will be."""

    source: Header
    recipe: Recipe
    rules: Mapping[str, Rule]
    """The rule of each linear layer of the transformer, by its path."""
    ranges: Mapping[str, Vector]
    """The largest activation of each input, of the layers whose activations are quantized."""
    target: Header

    @property
    def formats(self) -> dict[str, Format]:
        return recipes.formats(self.rules)


def plan(header: Header, recipe: Recipe, found: Calibration | None = None) -> QuantizationPlan:
    """
    Raises:
        UserError: as `fit`, or a range of activations is missing, or not wanted.
    """
    rules = fit(header, recipe)
    ranges = _ranges(header, recipe, recipes.formats(rules), found)
    target = _target(header, recipe, recipes.formats(rules), found)
    return QuantizationPlan(header, recipe, rules, ranges, target)


def fit(header: Header, recipe: Recipe) -> dict[str, Rule]:
    """The recipe's rule for each linear layer: everything that is known before calibrating.

    Raises:
        UserError: the checkpoint is quantized already, or the recipe does not fit it.
    """
    if (found := convert.kind(header)).name != "float":
        raise UserError(f"{header.path} is quantized already: {found.sentence}; {convert.START}")
    if recipe.algorithm == "mse":
        clipping.check_packages()
    rules = recipes.decide(recipe, linear_layers(header))
    for path, form in recipes.formats(rules).items():
        if not path.startswith(BLOCKS_OF):
            raise UserError(
                f"recipe {recipe.name}: {path} would become {form}, and only layers of "
                f"transformer_blocks can be quantized; add a rule in front to keep it"
            )
        _check_weight(header, path, form)
    return rules


def linear_layers(header: Header) -> tuple[str, ...]:
    """The paths of the transformer's linear layers, in the file's order.

    Raises:
        UserError: there are none.
    """
    found = tuple(
        name.removesuffix(".weight")
        for name, info in derive.in_order(header.tensors)
        if name.startswith(TRANSFORMER_PREFIX) and name.endswith(".weight") and len(info.shape) == 2
    )
    if not found:
        raise UserError(
            f"{header.path} has no linear layer whose name begins with {TRANSFORMER_PREFIX}; "
            "give the original single-file checkpoint"
        )
    return found


def _check_weight(header: Header, path: str, form: Format) -> None:
    info = header.tensors[f"{path}.weight"]
    if info.dtype not in WEIGHTS:
        raise UserError(
            f"{header.path}: {path}.weight is {info.dtype}, wanted {', '.join(sorted(WEIGHTS))}; "
            "start from the bfloat16 checkpoint"
        )
    if not info.shape[0] or not info.shape[1] or info.shape[1] % BLOCKS.get(form, 1):
        raise UserError(
            f"{header.path}: {path} has {info.shape[1]} inputs, {form} wants a multiple of "
            f"{BLOCKS.get(form, 1)}; give it another format in the recipe, or keep it"
        )


def _ranges(
    header: Header,
    recipe: Recipe,
    formats: Mapping[str, Format],
    found: Calibration | None,
) -> dict[str, Vector]:
    """Of all layers that read one tensor, the largest. That each fits its layer and is a range has
    `calibration.read` checked."""
    wanted = [path for path, form in formats.items() if form in CALIBRATED]
    if found is None:
        if wanted:
            raise UserError(
                f"recipe {recipe.name} quantizes activations and wants their ranges; run "
                f"ltx-export calibrate {header.path}, and give its file with --calibration"
            )
        return {}
    if not wanted:
        raise UserError(
            f"recipe {recipe.name} quantizes no activations; leave out the calibration {found.path}"
        )
    for path in wanted:
        if path not in found.ranges:
            raise UserError(f"{found.path}: {path} was never reached; calibrate again")
    return {
        path: np.max([found.ranges[other] for other in shared(path, wanted)], axis=0)
        for path in wanted
    }


def shared(path: str, paths: Collection[str]) -> tuple[str, ...]:
    """Those of the paths that read the same tensor as this one, itself among them."""
    for group in SHARED_INPUTS:
        for member in group:
            if path.endswith(f".{member}"):
                stem = path.removesuffix(member)
                return tuple(stem + other for other in group if stem + other in paths)
    return (path,)


def _target(
    header: Header,
    recipe: Recipe,
    formats: Mapping[str, Format],
    found: Calibration | None,
) -> Header:
    """Where everything will lie. Scales follow their weight."""
    entries: dict[str, derive.Entry] = {}
    for name, info in derive.in_order(header.tensors):
        path = name.removesuffix(".weight")
        if path == name or path not in formats:
            entries[name] = (info.dtype, info.shape)
            continue
        entries |= _entries(path, info.shape, formats[path], is_smoothed(recipe, formats[path]))
    written = {
        "recipe": recipe.table(),
        "algorithm": recipe.algorithm,
        "layers": formats,
        "source": calibration.identity(header.path),
        "calibration": found and dict(found.facts),
        "versions": {"ltx-export": __version__, "numpy": np.__version__}
        | {name: version(name) for name in _packages(recipe)},
    }
    metadata = {**header.metadata, quantization.METADATA: json.dumps(written)}
    return derive.laid_out(header.path, entries, metadata)


def _entries(
    path: str, shape: tuple[int, ...], form: Format, smoothed: bool
) -> dict[str, derive.Entry]:
    rows, columns = shape
    stored = (rows, columns // 2 if STORED[form] == "U8" else columns)
    layer = Layer(path, form, TensorInfo(STORED[form], stored, 0, 0))
    parts = {"weight": (STORED[form], stored)} | quantization.wanted(layer)
    if not smoothed:
        parts.pop("pre_quant_scale", None)
    return {f"{path}.{part}": entry for part, entry in parts.items()}


def is_clipped(recipe: Recipe, form: Format) -> bool:
    return recipe.algorithm == "mse" and form in CLIPPED


def is_smoothed(recipe: Recipe, form: Format) -> bool:
    return recipe.algorithm == "smoothquant" and form == "int8"


def _packages(recipe: Recipe) -> tuple[str, ...]:
    """Those whose arithmetic is in the numbers."""
    return ("ml_dtypes", "nvidia-modelopt") if recipe.algorithm == "mse" else ("ml_dtypes",)
