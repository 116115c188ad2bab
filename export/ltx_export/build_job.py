"""What a process that builds an engine is told, and what it tells at the end."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ltx_engines.targets import Flavour

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The smallest, likeliest and largest shape of an input."""


@dataclass(frozen=True, slots=True)
class Job:
    """`weights` are the files that the graph points into when it cannot be parsed where it lies:
    its own words for them, and where they are. `types` are the element types of inputs and outputs
    as the table of tensors has them. `weight_bytes` and `workspace` are in bytes. `refittable` are
    names of weights.
    """

    graph: Path
    engine: Path
    layers: Path
    flavour: Flavour
    version: str
    targets: tuple[int, ...]
    profiles: tuple[Mapping[str, Shapes], ...]
    types: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    weight_bytes: int = 0
    optimization_level: int | None = None
    workspace: int | None = None
    weight_streaming: bool = False
    refittable: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)


def from_json(text: str) -> Job:
    data = json.loads(text)
    paths = {name: Path(data[name]) for name in ("graph", "engine", "layers")}
    tuples = {name: tuple(data[name]) for name in ("targets", "refittable")}
    return Job(**data | paths | tuples)


@dataclass(frozen=True, slots=True)
class Built:
    """What was written: the engine's size and hash, and what it needs beside its weights."""

    bytes: int
    sha256: str
    activations: int


class BuildError(Exception):
    """The builder's first complaint."""
