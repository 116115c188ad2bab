"""Engines whose weights are inputs, as a bundle has them: keys, graphs, and what kernels must be.

Their keys have no weights, and for a graph what all pieces are together: both stay the same when
another checkpoint of that width and those formats takes the place of this one.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from ltx_engines.bundle import Bundle, TensorEntry
from ltx_engines.cache_key import EngineKey, Part
from ltx_export import weight_inputs
from ltx_export.engine_jobs import Piece
from ltx_export.engine_order import Order, check_inputs
from ltx_export.engine_work import AS_INPUTS, Work
from ltx_export.layer_table import CODES, Wanted
from ltx_export.weights import STORED
from ltx_ref import quantization
from ltx_ref.checkpoint import read_header

TYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.FLOAT8E4M3FN: "float8e4m3fn",
    ir.DataType.INT8: "int8",
}


def keys(opened: Bundle, whole: EngineKey, order: Order) -> tuple[EngineKey, ...]:
    """Of the pieces, in order.

    Raises:
        UserError: something else that was asked for does not go with it.
    """
    check_inputs(order)
    graphs = [_serialized(piece) for piece in _cut(opened, whole.stage)]
    digest = hashlib.sha256(b"".join(graphs)).hexdigest()
    parts = (Part(index=i, of=len(graphs), first=i, end=i + 1) for i in range(len(graphs)))
    alike = {"graph": digest, "weights": {}, "options": whole.options | {AS_INPUTS: 1}}
    return tuple(whole.model_copy(update=alike | {"part": part}) for part in parts)


def pieces(opened: Bundle, works: Sequence[Work], folder: Path) -> dict[str, Piece]:
    """By the names of the work; the graphs are written into the folder."""
    stage = opened.stage(works[0].key.stage)
    cut = _cut(opened, works[0].key.stage)
    found = {}
    for work in works:
        if work.key.part is None:
            raise AssertionError(f"{work.name} is no piece")
        piece = cut[work.key.part.index]
        graph = folder / f"{work.name}.onnx"
        graph.write_bytes(_serialized(piece))
        inputs, outputs = (
            tuple(_entries(values))
            for values in (piece.model.graph.inputs, piece.model.graph.outputs)
        )
        own = stage.model_copy(update={"inputs": inputs, "outputs": outputs})
        found[work.name] = Piece(graph, own, {}, dict(piece.weights), piece.blocks)
    return found


def wanted(opened: Bundle, key: EngineKey, graph: Path) -> Wanted:
    """What the files say that a piece's kernels must be; its layers have no number."""
    proto = onnx.load(graph)
    types = {value.name: value.type.tensor_type for value in proto.graph.input}
    products = {}
    for name in opened.stage(key.stage).weights:
        header = read_header(opened.file(name))
        for path, layer in quantization.layers(header).items():
            tensor = types.get(f"{weight_inputs.relative(path)}.weight")
            stored = STORED[header.tensors[f"{path}.weight"].dtype]
            if layer.format in CODES and tensor is not None and tensor.elem_type in stored:
                products[weight_inputs.relative(path)] = layer.format
    sizes = {dim.dim_value for tensor in types.values() for dim in tensor.shape.dim}
    tokens = {profile["tokens"][2] for profile in key.profiles} - sizes
    attentions = sum(node.op_type == "Attention" for node in proto.graph.node)
    return Wanted(len(key.profiles), products, attentions, frozenset(tokens))


def _cut(opened: Bundle, stage: str) -> tuple[weight_inputs.Piece, ...]:
    return weight_inputs.cut(ir.load(opened.file(opened.stage(stage).file)))


def _serialized(piece: weight_inputs.Piece) -> bytes:
    data: bytes = ir.to_proto(piece.model).SerializeToString(deterministic=True)
    return data


def _entries(values: Sequence[ir.Value]) -> Iterator[TensorEntry]:
    for value in values:
        if value.dtype is None or value.shape is None:
            raise AssertionError(f"{value.name} has no type or no shape")
        axes = tuple(a if isinstance(a, int) else str(a.value) for a in value.shape)
        yield TensorEntry(name=str(value.name), dtype=TYPES[value.dtype], axes=axes)
