"""An engine built by TensorRT-RTX for a GPU that need not be there, and the kernels that it runs.

Without a GPU no engine can be opened and inspected, but a verbose builder ends with the same table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt


@dataclass(frozen=True, slots=True)
class Operand:
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Layer:
    """A kernel of the builder's table, and the graph's nodes that it computes."""

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    nodes: frozenset[str]


class BuildError(Exception):
    """TensorRT's first complaint."""


class Log(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append(message)
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


@dataclass(frozen=True, slots=True)
class Built:
    """An engine for a GPU that need not be there: its size, and what it runs."""

    bytes: int
    layers: tuple[Layer, ...]


def build(path: Path, sizes: Mapping[str, int], capability: str) -> Built:
    """Build for one size of each axis. What an engine runs is read from the builder's log, because
    without a GPU no engine can be opened."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise BuildError(f"{path} was not parsed: {log.errors[:1]}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = map(tensor.get_dimension_name, range(len(tensor.shape)))
        shape = [n if n >= 0 else sizes[name] for n, name in zip(tensor.shape, names, strict=True)]
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(f"{path} was not built for {capability}: {log.errors[:1]}")
    return Built(engine.nbytes, tuple(layers("\n".join(log.lines))))


def quantized(built: Built, path: str) -> str | None:
    """The type in which a linear layer's activations and weights are multiplied, if it is one of
    less than 16 bits and the product a kernel of its own or one with its neighbours'."""
    for layer in built.layers:
        if layer.kind == "gemm" and f"{path}/MatMul" in layer.nodes and layer.constants:
            types = {layer.inputs[0].dtype, layer.constants[0].dtype}
            return types.pop() if len(types) == 1 and types <= CODES else None
    return None


CODES = {"FP8", "Int8", "FP4E2M1"}


def attentions(built: Built) -> int:
    """Attentions that are one kernel."""
    return sum(FUSED in layer.name for layer in built.layers)


FUSED = "_gemm_mha"


def scores(built: Built, size: int) -> list[str]:
    """Kernels that write a score for each query and key to memory."""
    return [
        layer.name
        for layer in built.layers
        if any(operand.shape[-2:] == (size, size) for operand in layer.outputs)
    ]


LINE = re.compile(r"(?=Name: [^,]+, LayerType: )")
NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
OPERAND = re.compile(r"Name: ([^,]+), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")


def layers(log: str) -> Iterator[Layer]:
    """The table that a verbose builder prints at its end."""
    for text in LINE.split(log):
        if head := re.match(r"Name: ([^,]+), LayerType: ([^,]+)", text):
            parts = (tuple(_operands(text, p)) for p in ("Inputs", "Constants", "Outputs"))
            inputs, constants, outputs = parts
            nodes = frozenset(NODE.findall(text))
            yield Layer(head[1], head[2], inputs, constants, outputs, nodes)


def _operands(text: str, part: str) -> Iterator[Operand]:
    listed = re.search(rf"{part}: \[(.*?)\](?=, (?:Constants|Outputs|TacticName))", text)
    for name, sizes, dtype in OPERAND.findall(listed[1] if listed else ""):
        yield Operand(name, tuple(map(int, filter(None, sizes.split(",")))), dtype)
