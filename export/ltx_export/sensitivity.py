"""How much each layer suffers from each format, measured where it matters: in real denoising runs.

The model that is not quantized makes its way through the calibration's runs. At each block its true
inputs x, whose output is y, go through the block again: with one layer quantized, for each layer,
and with all of them. The layers come out of quantized checkpoints as `ltx-export quantize` writes
them, which lie in a temporary folder meanwhile; of a model whose blocks are read one at a time no
more than one block and its layers is in memory.

    error = sqrt(sum |y_q - y|^2 / sum |y - x|^2)        sums over all calls

The block computes in float32 here, whatever the model does: the rounding of a 16-bit y is as large
as what a good format changes (ltx-tiny in bfloat16: 0.003 everywhere).
"""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ltx_engines.errors import UserError
from ltx_export import calibrate, calibration, quantize, recipes
from ltx_export.calibration import Calibration
from ltx_export.recipes import Recipe
from ltx_export.sensitivity_report import Errors, Sensitivity, block_path, place
from ltx_ref.checkpoint import Header, read_header
from ltx_ref.ltx_video.config import TransformerConfig
from ltx_ref.ltx_video.transformer import Block, Transformer
from ltx_ref.quantization import Layer, layers
from ltx_ref.quantized import QuantizedLinear
from ltx_ref.tensor_file import TensorFile

SAMPLED = 4
"""Steps of a run that are measured if nobody says otherwise."""

ALL = "all"
"""In the place of a layer's path: all of the block's layers."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to measure, on which runs, whose `out` is not read."""

    runs: calibrate.Order
    recipes: tuple[Recipe, ...]
    calibration: Path | None = None
    sample_steps: int = SAMPLED
    scratch: Path | None = None
    """A folder for as many quantized checkpoints as there are recipes; else the system's."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe, and the checkpoint that was quantized with it."""

    recipe: Recipe
    layers: Mapping[str, Layer]
    file: TensorFile

    def within(self, block: int) -> dict[str, Layer]:
        """The block's layers by their names in it."""
        found = ((place(path), layer) for path, layer in self.layers.items())
        return {at.kind: layer for at, layer in found if at.block == block}

    def layer(self, layer: Layer, linear: nn.Linear) -> QuantizedLinear:
        """In the place of this linear layer, where it is."""
        device = linear.weight.device
        names = {"weight": f"{layer.path}.weight"}
        names |= {name.removeprefix(f"{layer.path}."): name for name, _ in layer.parts()}
        parts = {part: self.file.read(name, device) for part, name in names.items()}
        return QuantizedLinear.of(layer.format, parts, linear.bias)


@dataclass(slots=True)
class Watch:
    """Sums of squares, which grow while a model runs. Set `wanted` and `where` before each run."""

    candidates: Sequence[Candidate]
    wanted: frozenset[int] = frozenset()
    """Of the run's calls of the transformer, those that are measured."""
    where: str = ""
    """For an error: which run it is."""
    call: int = -1
    changes: dict[int, float] = field(default_factory=dict)
    """|y - x|^2 of each block."""
    errors: dict[tuple[int, int, str], float] = field(default_factory=dict)
    """|y_q - y|^2, by candidate, block, and the layer's name in it or ALL."""

    def begin(self, wanted: frozenset[int], where: str) -> None:
        self.wanted, self.where, self.call = wanted, where, -1

    def relative(self, number: int) -> Errors:
        """What a candidate does.

        Raises:
            UserError: a block was never called, or changes nothing.
        """
        candidate = self.candidates[number]
        formats = {path: layer.format for path, layer in candidate.layers.items()}
        found = {path: place(path) for path in formats}
        return Errors(
            candidate.recipe.table(),
            formats,
            {path: self._relative(number, at.block, at.kind) for path, at in found.items()},
            {
                block_path(block): self._relative(number, block, ALL)
                for block in sorted({at.block for at in found.values()})
            },
        )

    def _relative(self, number: int, block: int, kind: str) -> float:
        if block not in self.changes:
            raise UserError(f"{block_path(block)} was never called; nothing of it was measured")
        error, change = self.errors[number, block, kind], self.changes[block]
        if change == 0 and error > 0:
            raise UserError(f"{block_path(block)} changes nothing, so errors in it have no measure")
        return 0.0 if error == 0 else math.sqrt(error / change)


@contextmanager
def watched(transformer: Transformer, candidates: Sequence[Candidate]) -> Iterator[Watch]:
    """Within it every block of the transformer is measured in the calls that are wanted."""
    watch = Watch(candidates)
    with ExitStack() as stack:
        handle: Any = transformer.register_forward_pre_hook(partial(_count, watch))
        stack.callback(handle.remove)
        for index, block in enumerate(transformer.transformer_blocks):
            hook = partial(_measure, watch, index, transformer.config)
            # First of all hooks: another one may take the block's weights away.
            handle = block.register_forward_hook(hook, prepend=True)
            stack.callback(handle.remove)
        yield watch


def _count(watch: Watch, *_: Any) -> None:
    watch.call += 1


def _measure(
    watch: Watch, index: int, config: TransformerConfig, block: Block, args: tuple[Any, ...], _: Any
) -> None:
    if watch.call not in watch.wanted:
        return
    twin, inputs = widened(block, config), tuple(map(wide, args))
    y = twin(*inputs)
    change = _energy(y, inputs[0])
    _check(change, watch, block_path(index))
    watch.changes[index] = watch.changes.get(index, 0.0) + change
    for number, candidate in enumerate(watch.candidates):
        inside = candidate.within(index)
        quantized = {
            kind: candidate.layer(layer, _linear(twin, kind)) for kind, layer in inside.items()
        }
        trials = {kind: {kind: module} for kind, module in quantized.items()}
        if inside:
            trials[ALL] = quantized
        for kind, modules in trials.items():
            with replaced(twin, modules):
                error = _energy(twin(*inputs), y)
            _check(error, watch, f"{block_path(index)}.{kind}, {candidate.recipe.name}")
            key = number, index, kind
            watch.errors[key] = watch.errors.get(key, 0.0) + error


def widened(block: Block, config: TransformerConfig) -> Block:
    """The block in float32; where it is so already, it shares its weights. It has no hooks."""
    with torch.device("meta"):
        twin = Block(config)
    weights = {name: tensor.float() for name, tensor in block.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    return twin.eval().requires_grad_(False)


def wide(value: Any) -> Any:
    """All tensors of an argument in float32."""
    if isinstance(value, Tensor):
        return value.float()
    if isinstance(value, tuple):
        return tuple(map(wide, value))
    return replace(value, keep=value.keep.float(), perturb=value.perturb.float())


def _energy(found: Tensor, wanted: Tensor) -> float:
    """The squared distance of two tensors."""
    return float((found - wanted).square_().sum(dtype=torch.float64))


def _check(energy: float, watch: Watch, what: str) -> None:
    if not math.isfinite(energy):
        raise UserError(
            f"{what}: the output is not finite in {watch.where}, step {watch.call + 1}; "
            "a checkpoint in float16 overflows where bfloat16 does not"
        )


@contextmanager
def replaced(block: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it these modules stand in the place of the block's own."""
    own = {name: block.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            block.set_submodule(name, module)
        yield
    finally:
        for name, module in own.items():
            block.set_submodule(name, module)


def _linear(block: nn.Module, kind: str) -> nn.Linear:
    module = block.get_submodule(kind)
    if not isinstance(module, nn.Linear):
        raise AssertionError(f"{kind} is a {type(module).__name__}, wanted a linear layer")
    return module


def spread(count: int, steps: int) -> frozenset[int]:
    """`count` of the steps, evenly spaced from the first to the last; all if there are no more."""
    if count < 1:
        raise UserError(f"--sample-steps must be at least 1, not {count}")
    if count == 1:
        return frozenset({0})
    return frozenset(round(i * (steps - 1) / (count - 1)) for i in range(count))


@contextmanager
def opened(paths: Sequence[Path], chosen: Sequence[Recipe]) -> Iterator[list[Candidate]]:
    """The candidates in these files, each of its recipe."""
    with ExitStack() as stack:
        found = []
        for path, recipe in zip(paths, chosen, strict=True):
            header = read_header(path)
            file = stack.enter_context(TensorFile(header))
            found.append(Candidate(recipe, layers(header), file))
        yield found


def measure(order: Order) -> Generator[str, None, Sensitivity]:
    """Yields what is being done; what follows a colon is how far that is.

    Raises:
        UserError, CheckpointError, OSError: something that the user can mend.
    """
    yield "reading"
    header = read_header(order.runs.checkpoint)
    check(header, order.recipes)
    ranges = ranges_of(header, order.recipes, order.calibration)
    with TemporaryDirectory(prefix=".sensitivity-", dir=order.scratch) as name:
        folder = Path(name)
        plan = calibrate.check(replace(order.runs, out=folder / "ranges"))
        wanted = [spread(order.sample_steps, run.steps) for run in plan.runs]
        paths = yield from written(header, order.recipes, ranges, folder)
        encoded = yield from calibrate.encode(plan)
        yield "loading"
        with (
            calibrate.session(plan, encoded) as ready,
            opened(paths, order.recipes) as candidates,
            watched(ready.model.transformer, candidates) as watch,
        ):
            yield from _walked(ready, watch, wanted)
            found = tuple(watch.relative(number) for number in range(len(candidates)))
    return Sensitivity(_facts(plan, wanted, ranges), found)


def _walked(
    ready: calibrate.Session, watch: Watch, wanted: Sequence[frozenset[int]]
) -> Iterator[str]:
    done, total = 0, sum(map(len, wanted))
    yield f"measuring {total} steps"
    for run, chosen in zip(ready.plan.runs, wanted, strict=True):
        watch.begin(chosen, f"{run.prompt!r} at {calibrate.said(run.shape)}")
        for step in ready.steps(run):
            done += step.index in chosen
            yield f"measuring {total} steps: {100 * done // total} %"
        if watch.call + 1 != run.steps:
            raise AssertionError(f"{watch.call + 1} calls of the transformer in {run.steps} steps")


def _facts(
    plan: calibrate.Plan, wanted: Sequence[frozenset[int]], ranges: Calibration | None
) -> dict[str, Any]:
    facts = calibrate.facts_of(plan)
    for key in ("format_version", "collector", "done"):
        del facts[key]
    facts["measured_steps"] = {
        calibrate.said(run.shape): sorted(chosen)
        for run, chosen in zip(plan.runs, wanted, strict=True)
    }
    facts["calibration"] = ranges and {
        "file": calibration.identity(ranges.path),
        "facts": dict(ranges.facts),
    }
    return facts


def ranges_of(header: Header, chosen: Sequence[Recipe], path: Path | None) -> Calibration | None:
    """
    Raises:
        UserError: a recipe wants ranges and there are none, or there are and none wants them.
    """
    ranged = [recipe.name for recipe in chosen if recipe.calibrated]
    if path is None and ranged:
        raise UserError(
            f"{', '.join(ranged)} wants ranges of activations; give --calibration FILE from "
            "ltx-export calibrate, or choose among fp8-cast, int8-wo and int4-wo"
        )
    if path is not None and not ranged:
        raise UserError(f"nothing here quantizes activations; leave out --calibration {path}")
    return None if path is None else calibration.read(path, header)


def written(
    header: Header,
    chosen: Sequence[Recipe],
    ranges: Calibration | None,
    folder: Path,
) -> Generator[str, None, list[Path]]:
    """The checkpoint quantized with each recipe.

    Raises:
        UserError: a recipe does not fit, or quantizes a layer that is in no block.
    """
    plans = [
        quantize.plan(header, recipe, ranges if recipe.calibrated else None) for recipe in chosen
    ]
    paths = []
    for number, plan in enumerate(plans):
        what = f"quantizing to {plan.recipe.name}"
        yield what
        path = folder / f"{number}.safetensors"
        for line in quantize.write(plan, path):
            yield f"{what}: {line}"
        paths.append(path)
    return paths


def recipes_of(words: str) -> tuple[Recipe, ...]:
    """
    Raises:
        UserError: one is not known, or two have one name.
    """
    found = tuple(recipes.load(word.strip()) for word in words.split(","))
    names = [recipe.name for recipe in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--formats {words} has {twice[0]} twice; leave one out, or rename it")
    return found


def check(header: Header, chosen: Sequence[Recipe]) -> None:
    """Before anything runs.

    Raises:
        UserError: a recipe does not fit.
    """
    for recipe in chosen:
        quantize.fit(header, recipe)
