"""An engine built by TensorRT-RTX for a GPU that need not be there, and the kernels that it runs.

Without a GPU no engine can be opened and inspected, but a verbose builder ends with the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

from ltx_export import layer_table
from ltx_export.layer_table import Layer


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
    return Built(engine.nbytes, tuple(layer_table.layers("\n".join(log.lines))))


def quantized(built: Built, path: str) -> str | None:
    """The type in which a linear layer's activations and weights are multiplied, if it is one of
    less than 16 bits and the product a kernel of its own or one with its neighbours'."""
    return next(iter(layer_table.products(built.layers).get(path, ())), None)


def attentions(built: Built) -> int:
    """Attentions that are one kernel."""
    return layer_table.attentions(built.layers)


def scores(built: Built, size: int) -> list[str]:
    """Kernels that write a score for each query and key to memory."""
    return layer_table.scores(built.layers, [size])
