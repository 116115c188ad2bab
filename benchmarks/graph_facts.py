"""What an exported graph is: its nodes, the names and places of its weights, and who accepts it.

    python benchmarks/graph_facts.py BUNDLE/transformer.onnx --weights FILE [FILE ...] [--part P]

Prints one JSON object. `--part` is the beginning of the names of the stage's weights.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import onnx

from ltx_ref.checkpoint import read_header

SMALL = 1024
"""Bytes. Smaller weights may be folded; what is larger is wanted by name."""

BLOCK = re.compile(r"(?:transformer_blocks|encoder\.block)\.(\d+)\.")


Place = tuple[int, int, int]
"""Inode of the file, begin and end in it."""


def facts(graph: Path, checkpoints: Sequence[Path], parts: Sequence[str]) -> dict[str, Any]:
    model = onnx.load(str(graph), load_external_data=False)
    wanted = {
        name: (path.stat().st_ino, info.begin, info.end)
        for path in checkpoints
        for name, info in read_header(path).tensors.items()
        if not parts or name.startswith(tuple(parts))
    }
    found = {tensor.name: place(tensor, graph.parent) for tensor in model.graph.initializer}
    large = {name for name, (_, begin, end) in wanted.items() if end - begin > SMALL}
    inline = [tensor for tensor in model.graph.initializer if not tensor.external_data]
    return {
        "opset": {entry.domain: entry.version for entry in model.opset_import},
        "nodes": sum(sizes(model)),
        "nodes_per_block": nodes_per_block(model),
        "scatter_nd": sum(node.op_type == "ScatterND" for node in model.graph.node),
        "weights": len(wanted),
        "weights_by_name": len(wanted.keys() & found.keys()),
        "weights_in_place": sum(found.get(name) == where for name, where in wanted.items()),
        "large_weights": len(large),
        "large_weights_by_name": len(large & found.keys()),
        "inline_bytes": sum(tensor.ByteSize() for tensor in inline),
        "largest_inline": max((prod(tensor.dims) for tensor in inline), default=0),
        **checked(graph, model),
    }


def place(tensor: onnx.TensorProto, folder: Path) -> Place | None:
    """Where a weight's bytes lie; None for a tensor inside the graph."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not entries:
        return None
    begin = int(entries["offset"])
    inode = (folder / entries["location"]).stat().st_ino
    return inode, begin, begin + int(entries["length"])


def sizes(model: onnx.ModelProto) -> list[int]:
    """Of each node: 1, or what the function that it calls has, as a runtime sees it."""
    bodies = {(f.domain, f.name): f.node for f in model.functions}

    def size(node: onnx.NodeProto) -> int:
        body = bodies.get((node.domain, node.op_type))
        return 1 if body is None else sum(size(inner) for inner in body)

    return [size(node) for node in model.graph.node]


def nodes_per_block(model: onnx.ModelProto) -> int | None:
    """The usual distance, in nodes, from a block's first weight to the next block's."""
    weights = {tensor.name for tensor in model.graph.initializer}
    first: dict[int, int] = {}
    before = 0
    for node, size in zip(model.graph.node, sizes(model), strict=True):
        for name in weights.intersection(node.input):
            if match := BLOCK.search(name):
                first.setdefault(int(match[1]), before)
        before += size
    distances = Counter(b - a for a, b in pairwise(first[block] for block in sorted(first)))
    return distances.most_common(1)[0][0] if distances else None


def checked(graph: Path, model: onnx.ModelProto) -> dict[str, str]:
    """onnx.checker by path, without and with shape inference.

    It refuses files of weights that have a second hard link, so what it sees is the graph beside
    holes of the same names and sizes.
    """
    with tempfile.TemporaryDirectory(dir=graph.parent.parent) as folder:
        copy = Path(shutil.copy(graph, folder))
        for location in locations(model):
            twin = Path(folder) / location
            twin.parent.mkdir(parents=True, exist_ok=True)
            with twin.open("wb") as file:
                file.truncate((graph.parent / location).stat().st_size)
        return {"checker": check(copy, full=False), "full_check": check(copy, full=True)}


def check(path: Path, *, full: bool) -> str:
    try:
        onnx.checker.check_model(str(path), full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return " ".join(str(error).split())[:300]
    return "ok"


def locations(model: onnx.ModelProto) -> Iterator[str]:
    """The files of weights, as the graph names them."""
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    yield from sorted({entry.value for entry in entries if entry.key == "location"})


def kept(graph: Path, names: Mapping[str, tuple[int, ...]]) -> int:
    """How many of these weights a graph has under a name that ends with theirs, shape unchanged."""
    model = onnx.load(str(graph), load_external_data=False)
    found = {(tensor.name, tuple(tensor.dims)) for tensor in model.graph.initializer}
    endings = {(name[start:], dims) for name, dims in found for start in _parts(name)}
    return sum((name, tuple(shape)) in endings for name, shape in names.items())


def _parts(name: str) -> Iterator[int]:
    """Where the dotted parts of a name begin."""
    yield 0
    yield from (index + 1 for index, letter in enumerate(name) if letter == ".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--weights", type=Path, nargs="+", required=True)
    parser.add_argument("--part", nargs="*", default=[])
    options = parser.parse_args()
    print(json.dumps(facts(options.graph, options.weights, options.part)))


if __name__ == "__main__":
    main()
