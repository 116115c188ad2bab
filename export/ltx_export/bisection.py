"""Which part of a model takes it away from another: the first parts of one, the rest of the other.

With the first k parts of the candidate, the output is off by error(k). Errors that have nothing to
do with one another add up in squares; so halving goes where the squares grow most. (Tried: the
first k that breaks the bound. Where all small errors together nearly do, it names the last part.)
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor, nn

from ltx_export.ladder import Culprit
from ltx_ref.ltx_video.transformer import AdaLayerNormSingle, Skip, Transformer
from ltx_ref.quantized import BLOCKS

Parts = Mapping[str, nn.Module]
Measure = Callable[[Parts], float]
"""The distance of the reference's output when these parts of it are the candidate's, by path."""

FIRST, LAST = ("patchify_proj", "adaln_single", "caption_projection"), ("proj_out",)
"""Modules of a transformer in front of its blocks, and behind them."""

OUTSIDE = "scale_shift_table"
"""The only weights of a transformer that are in no module."""


def steepest(what: str, count: int, error: Callable[[int], float]) -> Generator[str, None, int]:
    """The k of 1 to `count` in which the error grows most, or where halving comes to. What is not a
    number is infinite."""

    def energy(place: int) -> float:
        found = error(place)
        return inf if isnan(found) else found * found

    low, high = 0, count
    while high - low > 1:
        yield f"bisecting {what}: {high - low} left"
        middle = (low + high) // 2
        grown = energy(middle)
        if grown == inf or grown - energy(low) >= energy(high) - grown:
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True, slots=True)
class Mixture:
    """A reference, and a candidate whose parts can stand in for its own.

    `found` is the distance of the whole candidate, which is beyond the limit. `held` gives a block
    of either with all its weights, also where a model has one at a time.
    """

    reference: Transformer
    candidate: Transformer
    measure: Measure
    limit: float
    found: float
    held: Callable[[Transformer, int], nn.Module]

    def culprit(self) -> Generator[str, None, Culprit]:
        """The part of the model that costs most, and if it is a block, the layer in it."""
        steps = _Steps("", {}, {}, self.measure)
        for name in parts(self.reference):
            steps.add(name, in_float32(self.candidate.get_submodule(name)))
        if steps.error(steps.count) <= self.limit:
            return Culprit(OUTSIDE, self.found, steps.error(steps.count))
        worst = yield from steepest("parts", steps.count, steps.error)
        name = steps.names[worst]
        if not name.startswith(f"{BLOCKS}."):
            return steps.culprit(worst)
        return (yield from self._layer(name, steps.parts[worst - 1]))

    def _layer(self, block: str, before: Parts) -> Generator[str, None, Culprit]:
        """Of a block of the reference, whose layers become the candidate's one after another, and
        at last all of it."""
        index = int(block.rpartition(".")[2])
        own, other = (self.held(model, index) for model in (self.reference, self.candidate))
        steps = _Steps(block, {**before, block: own}, {block: own}, self.measure)
        for name in layers(own):
            steps.add(f"{block}.{name}", in_float32(other.get_submodule(name)))
        steps.end(f"{block}, outside its layers", {**before, block: in_float32(other)})
        worst = yield from steepest("layers", steps.count, steps.error)
        return steps.culprit(worst)


class _Steps:
    """From the reference to the candidate, a part at a time: step 0 swaps what is given, step k
    the k first parts too. `alone` is what must be swapped for a part that is alone."""

    def __init__(self, name: str, given: Parts, alone: Parts, measure: Measure) -> None:
        self.names, self.parts = [name], [dict(given)]
        self.alone, self.measure = alone, measure
        self._known: dict[int, float] = {}

    @property
    def count(self) -> int:
        return len(self.parts) - 1

    def add(self, name: str, module: nn.Module) -> None:
        self.end(name, {**self.parts[-1], name: module})

    def end(self, name: str, parts: Parts) -> None:
        self.names.append(name)
        self.parts.append(dict(parts))

    def error(self, step: int) -> float:
        if step not in self._known:
            self._known[step] = self.measure(self.parts[step]) if self.parts[step] else 0.0
        return self._known[step]

    def culprit(self, step: int) -> Culprit:
        name = self.names[step]
        module = self.parts[step].get(name)
        alone = None if module is None else self.measure({**self.alone, name: module})
        return Culprit(name, self.error(step), self.error(step - 1), alone)


def parts(transformer: nn.Module) -> list[str]:
    """The modules of a transformer, in the order in which they run."""
    blocks = transformer.get_submodule(BLOCKS)
    return [*FIRST, *(f"{BLOCKS}.{name}" for name, _ in blocks.named_children()), *LAST]


def layers(block: nn.Module) -> list[str]:
    """The modules of a block that have weights of their own, in the order in which they run."""
    return [
        name
        for name, module in block.named_modules()
        if name and next(module.parameters(recurse=False), None) is not None
    ]


@contextmanager
def swapped(model: nn.Module, chosen: Parts) -> Iterator[None]:
    """Within it these modules of the model are others. A path that leads through another one comes
    after it."""
    before: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for path, module in chosen.items():
            parent, _, name = path.rpartition(".")
            home = model.get_submodule(parent)
            before.append((home, name, home.get_submodule(name)))
            setattr(home, name, module)
        yield
    finally:
        for home, name, module in reversed(before):
            setattr(home, name, module)


class Float32(nn.Module):
    """A part that computes in an element type of its own, between others that are float32."""

    def __init__(self, part: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.part, self.dtype = part, dtype

    def forward(self, *inputs: Any) -> Any:
        if isinstance(self.part, AdaLayerNormSingle):  # it rounds the timestep's waves itself
            return self._wide(self.part(inputs[0], self.dtype))
        return self._wide(self.part(*map(self._own, inputs)))

    def _own(self, value: Any) -> Any:
        """Cosines and sines, a tuple, are float32 everywhere."""
        if isinstance(value, Skip):
            keep, perturb = value.keep.to(self.dtype), value.perturb.to(self.dtype)
            return replace(value, keep=keep, perturb=perturb)
        return value.to(self.dtype) if isinstance(value, Tensor) else value

    def _wide(self, value: Any) -> Any:
        return tuple(map(self._wide, value)) if isinstance(value, tuple) else value.float()


def in_float32(part: nn.Module) -> nn.Module:
    """The part as one may put it into a model in float32."""
    dtype = next(part.parameters()).dtype
    return part if dtype == torch.float32 else Float32(part, dtype)
