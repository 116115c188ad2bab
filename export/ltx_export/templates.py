"""Graphs that were traced once and are shipped: with one of them an export needs no torch.

A template is the graph of a stage in the type `element_types.OWN`, at opset 23, with three of its
identical blocks and weights that have names and shapes but no place. Its name is made from all
that decides it, so a configuration either has its very own template or none. `make templates`
writes them; a test traces the reference again and finds the same.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

FOLDER = Path(__file__).with_name("templates")

Facts = Mapping[str, Any]
"""What decides a graph, as JSON has it."""


def name(stage: str, facts: Facts) -> str:
    digest = hashlib.sha256(_text(facts).encode()).hexdigest()
    return f"{stage}-{digest[:12]}.onnx.gz"


def find(stage: str, facts: Facts, folder: Path = FOLDER) -> onnx.ModelProto | None:
    """The shipped graph for exactly these facts."""
    path = folder / name(stage, facts)
    if not path.is_file():
        return None
    proto = onnx.ModelProto.FromString(gzip.decompress(path.read_bytes()))
    return proto if _facts_of(proto) == _text(facts) else None


def save(model: ir.Model, stage: str, facts: Facts, folder: Path = FOLDER) -> Path:
    """Write a traced graph; the same graph gives the same bytes."""
    path = folder / name(stage, facts)
    proto = to_proto(model)
    proto.metadata_props.add(key="facts", value=_text(facts))
    data = proto.SerializeToString(deterministic=True)
    path.write_bytes(gzip.compress(data, compresslevel=9, mtime=0))
    return path


def shipped(folder: Path = FOLDER) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stage and facts of every template."""
    for path in sorted(folder.glob("*.onnx.gz")):
        proto = onnx.ModelProto.FromString(gzip.decompress(path.read_bytes()))
        yield proto.graph.name, json.loads(_facts_of(proto))


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The graph, its weights as files of no name."""
    bare = [value for value in model.graph.initializers.values() if value.const_value is None]
    for value in bare:
        if value.shape is None or value.dtype is None or value.name is None:
            raise AssertionError(f"{value} has no shape or type")
        value.const_value = ir.ExternalTensor(
            "-", 0, 0, value.dtype, shape=value.shape, name=value.name
        )
    try:
        return ir.to_proto(model)
    finally:
        for value in bare:
            value.const_value = None


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """The inverse of `to_proto`."""
    model = ir.from_proto(proto)
    model.metadata_props.clear()
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model


def _text(facts: Facts) -> str:
    return json.dumps(facts, sort_keys=True)


def _facts_of(proto: onnx.ModelProto) -> str:
    return next((entry.value for entry in proto.metadata_props if entry.key == "facts"), "")
