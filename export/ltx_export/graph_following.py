"""The reference follows a graph, part by part: each part is given what the graph gave the one
before, and its own output is compared with the graph's.

So nothing adds up. Codes of activations do: a sum in another order flips one of them at a rounding
boundary, that changes a few inputs of the next layer by a step, and after six blocks two correct
programs are as far apart as each is from the float model (ltx-tiny, fp8: 0.02 of 0.03).
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltx_export.bisection import LAST
from ltx_export.denoising import Inputs
from ltx_export.ladder import distance
from ltx_export.onnx_transformer import Graph, OnnxTransformer
from ltx_ref.ltx_video.transformer import Transformer
from ltx_ref.quantized import BLOCKS, QuantizedLinear

TOGETHER = 16
"""Blocks whose outputs are in memory at once."""


@dataclass(frozen=True, slots=True)
class Part:
    """A module of the reference that followed, what it gave and what the graph gives."""

    path: str
    own: Tensor
    graph: Tensor
    distance: float


@dataclass(frozen=True, slots=True)
class Follower:
    """Graph and reference, for one step's inputs."""

    graph: Graph
    reference: Transformer
    inputs: Inputs

    def worst_block(self) -> Generator[str, None, Part]:
        """The block, or the layer outside the blocks, that is farthest from the graph's."""
        front = [
            path
            for path in linear_layers(self.reference)
            if not path.startswith((f"{BLOCKS}.", *LAST))
        ]
        blocks = [f"{BLOCKS}.{index}" for index in range(len(self.reference.transformer_blocks))]
        rest = [*blocks, *LAST]
        yield "following: in front of the blocks"
        worst = self._worst(front, front)
        for begin in range(0, len(rest), TOGETHER):
            yield f"following: block {begin} of {len(blocks)}"
            chosen = rest[begin : begin + TOGETHER]
            worst = _worse(worst, self._worst(chosen, [*front, *rest[:begin][-1:], *chosen]))
        return worst

    def worst_layer(self) -> Generator[str, None, Part]:
        """The linear layer of a block that is farthest from the graph's, given its input there."""
        found: list[Part] = []
        for index in range(len(self.reference.transformer_blocks)):
            yield f"following: layers of block {index}"
            found[:] = [_worse(self._worst_layer(f"{BLOCKS}.{index}"), *found)]
        (worst,) = found
        return worst

    def _worst_layer(self, block: str) -> Part:
        paths = [path for path in linear_layers(self.reference) if path.startswith(f"{block}.")]
        entrances = {path: self.graph.layer_input(path) for path in paths}
        exits = {path: self.graph.layer_output(path) for path in paths}
        found = self._found([*entrances.values(), *exits.values()])
        seen: list[Part] = []
        with ExitStack() as stack:
            for path in paths:
                module = self.reference.get_submodule(path)
                given = partial(_give, found[entrances[path]])
                hook = partial(_follow, seen, path, found[exits[path]])
                stack.callback(module.register_forward_pre_hook(given).remove)
                stack.callback(module.register_forward_hook(hook).remove)
            self._run()
        (worst,) = seen
        return worst

    def _worst(self, chosen: Sequence[str], followed: Sequence[str]) -> Part:
        """Of the chosen parts. Behind each one that is followed, the graph's output goes on."""
        values = {path: self._value(path) for path in followed}
        found = self._found(values.values())
        seen: list[Part] = []
        with ExitStack() as stack:
            for path, value in values.items():
                hook = partial(_follow, seen if path in chosen else [], path, found[value])
                module = self.reference.get_submodule(path)
                stack.callback(module.register_forward_hook(hook).remove)
            self._run()
        (worst,) = seen
        return worst

    def _value(self, path: str) -> str:
        home, _, index = path.rpartition(".")
        if home == BLOCKS:
            return self.graph.block_output(int(index))
        return self.graph.layer_output(path)

    def _found(self, names: Iterable[str]) -> dict[str, Tensor]:
        return OnnxTransformer(self.graph, dict.fromkeys(names)).run(self.inputs.tensors())

    @torch.no_grad()
    def _run(self) -> None:
        device = next(self.reference.proj_out.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.tensors().items()}
        self.reference(**inputs, stg_mode=self.graph.bundle.manifest.model.stg_mode)


def _give(wanted: Tensor, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A forward pre-hook: the graph's input takes the place of the module's own."""
    return (wanted.to(inputs[0]),)


def _follow(seen: list[Part], path: str, wanted: Tensor, *call: Any) -> Tensor:
    """A forward hook: keeps the worst part, and hands on what the graph gives."""
    output: Tensor = call[-1]
    own = output.float().cpu()
    part = Part(path, own, wanted, distance(wanted.numpy(), own.numpy()))
    seen[:] = [_worse(part, *seen)]
    return wanted.to(output)


def _worse(part: Part, *others: Part) -> Part:
    """NaN is the worst."""
    return max((*others, part), key=lambda one: (one.distance != one.distance, one.distance))


def linear_layers(model: nn.Module) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
    ]
