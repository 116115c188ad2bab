"""How far each way of computing a model is from the way before it, and how far it may be.

    float32     ltx_ref in float32: the yardstick
    bfloat16    ltx_ref in bfloat16
    quantized   ltx_ref in float32 with the file's codes
    onnx        the exported graph on ONNX Runtime
    engine      TensorRT or TensorRT-RTX, on the GPU

A rung has two outputs: `velocity`, all guidance branches of the first step, and `latents`, what is
left after the last. The rung quantized has one more, the `weights` of its worst layer; and onnx
the outputs of the worst of its `layers` and of its `blocks`, each given the same inputs.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import isnan, sqrt
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ltx_engines.bundle import Precision
from ltx_engines.errors import UserError, nearest
from ltx_ref.quantization import CALIBRATED, Format

Rung = Literal["float32", "bfloat16", "quantized", "onnx", "engine"]
Output = Literal["velocity", "latents", "weights", "layers", "blocks"]
Outputs = Mapping[Output, NDArray[Any]]

YARDSTICK: Rung = "float32"


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest relative distance that an output may have: the L2 norm of the difference, in
    units of what it is compared with."""

    limit: float
    why: str


Bounds = Mapping[str, Bound]
"""By `RUNG.OUTPUT`."""

VELOCITY: Mapping[Format, float] = MappingProxyType(
    {
        **{"fp8": 0.1, "int8": 0.06, "fp8-cast": 0.08, "int8-wo": 0.04},
        **{"int4-wo": 0.25, "nvfp4": 0.3},
    }
)
"""About three times what a true-width 2B slice with random weights loses (4 blocks, 80 tokens: fp8
0.031, int8 0.010, fp8-cast 0.029, int8-wo 0.007, int4-wo 0.10, nvfp4 0.11; ltx-tiny has the same to
0.007), and twice what ModelOpt's own defaults do (fp8 0.053, int8 0.029)."""

WEIGHTS: Mapping[Format, float] = MappingProxyType(
    {
        **{"fp8": 0.1, "int8": 0.1, "fp8-cast": 0.2, "int8-wo": 0.1},
        **{"int4-wo": 0.3, "nvfp4": 0.3},
    }
)
"""The worst layer of that slice: fp8 0.027, int8 0.011, fp8-cast 0.051 (small numbers have fewer
bits), int8-wo 0.009, int4-wo 0.12, nvfp4 0.095. Rows with outliers lose more."""

STEPS_AMPLIFY, MOST = 4.0, 0.5
"""A walk carries each error on, and guidance multiplies it: latents of ltx-tiny are 1.8 to 3.9
times as far apart as velocities (8 steps, scale 3). At half of its own size it is another clip."""

BFLOAT16 = Bound(0.04, "eight bits of mantissa: 0.004 in each product, through all blocks")


@dataclass(frozen=True, slots=True)
class Graphs:
    """How far graphs of one element type may be from the reference, in float32, given the same
    inputs; and through all blocks, where no codes of activations are to flip."""

    layers: Bound
    blocks: Bound
    through: Bound
    coded_layers: Bound
    coded_blocks: Bound


_SUMS = "the same arithmetic; only the order of sums differs"
_BITS = "eleven bits of mantissa: 0.0005 in each product"
_FLIPS = "float16 values at a rounding boundary become other codes than in float32"

GRAPHS: Mapping[Literal["float32", "float16"], Graphs] = MappingProxyType(
    {
        "float32": Graphs(
            layers=Bound(1e-4, _SUMS),
            blocks=Bound(0.001, _SUMS),
            through=Bound(0.001, _SUMS),
            coded_layers=Bound(1e-4, f"codes of the same inputs are the same; {_SUMS}"),
            coded_blocks=Bound(
                0.01, "the same codes; other orders of sums flip a few at rounding boundaries"
            ),
        ),
        "float16": Graphs(
            layers=Bound(0.002, _BITS),
            blocks=Bound(0.002, _BITS),
            through=Bound(0.005, f"{_BITS}, through all blocks"),
            coded_layers=Bound(0.03, _FLIPS),
            coded_blocks=Bound(0.04, _FLIPS),
        ),
    }
)
"""Three times what was measured, or more. Coded blocks in float32: 0.0007 on ltx-tiny, 0.002 on the
slice. In float16, on ltx-tiny: 0.0005 without codes of activations; layers with them fp8 0.010,
int8 0.004, blocks 0.012 and 0.008. That is the root of a rounding times a step between two codes:
ONNX Runtime computes in float32 what it has no float16 kernel for, and rounds elsewhere."""


def bounds(
    formats: Collection[Format],
    wishes: Iterable[str] = (),
    precision: Precision = "float32",
    engine: Precision = "bfloat16",
) -> dict[str, Bound]:
    """Those of a file with these formats, the loosest of which counts, of a graph in this
    element type, and of an engine in its own; `wishes` are `NAME=VALUE`.

    Raises:
        UserError: a wish is for no bound, or not a number.
    """
    found = _over_steps("bfloat16", BFLOAT16)
    if formats:
        loosest = max(formats, key=lambda form: VELOCITY[form])
        quantized = Bound(VELOCITY[loosest], f"three times what {loosest} costs random weights")
        widest = max(formats, key=lambda form: WEIGHTS[form])
        why = f"rounding to {widest}, with outliers"
        found |= {"quantized.weights": Bound(WEIGHTS[widest], why)}
        found |= _over_steps("quantized", quantized)
    graphs = GRAPHS["float16" if precision == "float16" else "float32"]
    if CALIBRATED & set(formats):
        why = "codes that flip at rounding boundaries add up to the error of quantization itself"
        found |= {"onnx.layers": graphs.coded_layers, "onnx.blocks": graphs.coded_blocks}
        found |= _over_steps("onnx", replace(quantized, why=why))
        found |= _over_steps("engine", replace(quantized, why=why))
    else:
        found |= {"onnx.layers": graphs.layers, "onnx.blocks": graphs.blocks}
        found |= _over_steps("onnx", graphs.through)
        rounds = BFLOAT16 if engine == "bfloat16" else GRAPHS[engine].through
        found |= _over_steps("engine", rounds)
    for wish in wishes:
        name, _, text = wish.partition("=")
        if name not in found:
            raise UserError(
                f"unknown bound {name!r}{nearest(name, found)}; known are {', '.join(found)}"
            )
        found[name] = Bound(_number(wish, text), "as it was asked for")
    return found


def _over_steps(rung: Rung, bound: Bound) -> dict[str, Bound]:
    why = f"{bound.why}; {STEPS_AMPLIFY:g} times that over all steps, at most {MOST:g}"
    latents = Bound(min(bound.limit * STEPS_AMPLIFY, MOST), why)
    return {f"{rung}.velocity": bound, f"{rung}.latents": latents}


def _number(wish: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if isnan(value) or value < 0:
        raise UserError(f"--bounds {wish}: wanted NAME=VALUE with a number from 0, as in =0.05")
    return value


@dataclass(frozen=True, slots=True)
class Row:
    """One output of a rung beside that of another."""

    rung: Rung
    against: Rung
    output: Output
    distance: float
    """Relative, in L2."""
    cosine: float
    largest: float
    """Of all absolute differences."""
    bound: Bound
    place: str | None = None
    """The layer that it is of, if it is of one."""

    @property
    def passed(self) -> bool:
        """NaN is within no bound."""
        return self.distance <= self.bound.limit


@dataclass(frozen=True, slots=True)
class Skipped:
    """A rung that was not climbed."""

    rung: Rung
    why: str


@dataclass(frozen=True, slots=True)
class Culprit:
    """What takes a rung over its bound."""

    place: str
    """A part of the model, by its name in the checkpoint."""
    after: float
    """The distance with it."""
    before: float | None = None
    """The distance without it, but with everything in front of it."""
    alone: float | None = None
    """The distance with this part alone."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. `facts` say of what, and how it was run."""

    facts: Mapping[str, Any]
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    coverage: str | None = None
    culprit: Culprit | None = None

    @property
    def broken(self) -> Row | None:
        """Of the first rung that exceeds a bound."""
        return first_broken(self.rows)


def first_broken(rows: Iterable[Row]) -> Row | None:
    return next((row for row in rows if not row.passed), None)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rungs, the later one first, and the limit of each output that is compared."""

    rung: Rung
    against: Rung
    bounds: Mapping[Output, Bound]


def compare(pair: Pair, found: Outputs, wanted: Outputs) -> Iterator[Row]:
    """By polygraphy's comparators.

    Raises:
        AssertionError: the outputs are not of one shape.
    """
    from polygraphy.comparator import (
        Comparator,
        CosineSimilarityCompareFunc,
        L2CompareFunc,
        RunResults,
        SimpleCompareFunc,
    )
    from polygraphy.logger import G_LOGGER

    norms = {name: _norm(wanted[name]) for name in pair.bounds}
    results = RunResults()
    for rung, outputs in ((pair.rung, found), (pair.against, wanted)):
        wide = {name: np.asarray(outputs[name], np.float64) for name in pair.bounds}
        results.add([wide], runner_name=rung)
    limits = {name: bound.limit * norms[name] for name, bound in pair.bounds.items()}
    no_limit = float("inf")
    functions = (
        L2CompareFunc(l2_threshold=limits),
        CosineSimilarityCompareFunc(cosine_similarity_threshold=-1.0),
        SimpleCompareFunc(check_error_stat="max", atol=no_limit, rtol=no_limit),
    )
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(invalid="ignore", over="ignore"):
        compared = Comparator.compare_accuracy(results, compare_func=list(functions))
    l2, cosine, simple = (next(iter(result.values()))[0] for result in compared)
    for name, bound in pair.bounds.items():
        if not hasattr(l2[name], "l2_norm"):
            shapes = f"{found[name].shape}, {pair.against} {wanted[name].shape}"
            raise AssertionError(f"{name} of {pair.rung} is {shapes}")
        yield Row(
            pair.rung,
            pair.against,
            name,
            l2[name].l2_norm / (norms[name] or 1.0),
            cosine[name].cosine_similarity,
            simple[name].max_absdiff,
            bound,
        )


def distance(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """As `compare` measures it, for one array."""
    wide = np.asarray(wanted, np.float64)
    with np.errstate(invalid="ignore"):
        return _norm(np.asarray(found, np.float64) - wide) / (_norm(wide) or 1.0)


def _norm(numbers: NDArray[Any]) -> float:
    flat = np.asarray(numbers, np.float64).ravel()
    return sqrt(flat @ flat)


def check_packages() -> None:
    """
    Raises:
        UserError: what the ladder needs is not installed.
    """
    wanted = ("onnxruntime", "polygraphy", "torch", "transformers")
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise UserError(
            f"ltx-export verify needs {', '.join(missing)}; pip install 'ltx-trt[quantize]'"
        )
