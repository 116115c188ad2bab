"""A graph with int8 layers as ONNX Runtime's CPU computes it fastest; nothing else can read it.

The integer product is `QGemm`, which takes weights as they lie in the file, [N, K]; products are
all that int8 makes faster, so what is left between them must not be slow: attention becomes one
node, which never has all its scores in memory.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ltx_export.edits import take_place
from ltx_export.lower import Writer

DOMAIN = "com.microsoft"

ZERO = 128
"""The unsigned code of zero. Products of signed activations are 3 to 5 times slower than float32 on
x86, of unsigned ones 3 times faster (onnxruntime 1.31, EPYC with VNNI). Without VNNI their sums are
wrong unless the session is told (`ltx_engines.cpu`)."""

ZERO_POINT = "weight_zero_point"
"""What a weight's zero points are called behind their layer's name."""


def specialise(model: ir.Model) -> int:
    """Write int8 layers and, if there are any, attention as ONNX Runtime has them.

    Returns how many integer products there are.
    """
    count = multiply_integers(model)
    if count:
        fuse_attention(model)
        repeat_by_concat(model)
    return count


@dataclass(frozen=True, slots=True)
class _Product:
    """MatMul(Dequantize(Quantize(x)), Transpose(Dequantize(weight)))."""

    matmul: ir.Node
    quantize: ir.Node
    dequantize: ir.Node


def multiply_integers(model: ir.Model) -> int:
    """Multiply the codes of int8 layers. The numbers are the same: each activation's code is 128
    more and without a sign."""
    products = list(_products(model))
    for product in products:
        write = Writer(model, product.matmul)
        product.quantize.replace_input_with(2, write.constant(ZERO, ir.DataType.UINT8))
        product.quantize.outputs[0].dtype = ir.DataType.UINT8
        result = _integer_product(write, product)
        model.graph.insert_before(product.matmul, write.nodes)
        take_place(result, product.matmul.outputs[0])
        model.graph.remove(product.matmul, safe=True)
    _finish(model, len(products))
    return len(products)


def _products(model: ir.Model) -> Iterator[_Product]:
    for matmul in model.graph:
        if matmul.op_type != "MatMul":
            continue
        transpose = _maker(matmul.inputs[1], "Transpose")
        weight = transpose and _maker(_uncast(transpose.inputs[0]), "DequantizeLinear")
        wide = _maker(_uncast(matmul.inputs[0]), "DequantizeLinear")
        quantize = wide and _maker(wide.inputs[0], "QuantizeLinear")
        if weight is None or quantize is None or weight.inputs[0] is None:
            continue
        scale = weight.inputs[1]
        exact = scale is not None and scale.dtype == ir.DataType.FLOAT  # QGemm has no other
        if exact and weight.inputs[0].dtype == ir.DataType.INT8:
            yield _Product(matmul, quantize, weight)


def _integer_product(write: Writer, product: _Product) -> ir.Value:
    """codes W^T, times the scales. QGemm has two axes: those before the last become one."""
    own, codes = product.matmul.outputs[0].dtype, product.quantize.outputs[0]
    weight, scales = product.dequantize.inputs[:2]
    source, scale, zero = product.quantize.inputs
    if own is None or weight is None or weight.shape is None:
        raise AssertionError(f"{product.matmul.name}: type or shape are not known")
    rows, columns = weight.shape.numpy()
    flat = write("Reshape", [codes, write.constant([-1, columns], ir.DataType.INT64)])
    inputs = [flat, scale, zero, weight, scales, _zero_points(write.model, weight, rows)]
    sums = write("QGemm", inputs, ir.DataType.FLOAT, domain=DOMAIN, transB=1)
    leading = write("Shape", [source], ir.DataType.INT64, end=-1)
    shape = write("Concat", [leading, write.constant([rows], ir.DataType.INT64)], axis=0)
    result = write("Reshape", [sums, shape])
    return result if own == ir.DataType.FLOAT else write("Cast", [result], to=int(own))


def _zero_points(model: ir.Model, weight: ir.Value, rows: int) -> ir.Value:
    """Nothing for each row. Where the weight becomes unsigned, ONNX Runtime replaces them with its
    own (`session.x64quantprecision`), which is an error if another product has the same ones."""
    name = f"{str(weight.name).removesuffix('.weight')}.{ZERO_POINT}"
    known = model.graph.initializers
    if name not in known:
        tensor = ir.Tensor(np.zeros(rows, np.int8), name=name)
        known[name] = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.INT8),
            shape=ir.Shape([rows]),
            const_value=tensor,
        )
    return known[name]


@dataclass(frozen=True, slots=True)
class _Attention:
    """What `lower` has written out: `last` has the heads side by side again."""

    sources: Sequence[ir.Value]
    """Queries, keys and values: batch, tokens, heads * channels."""
    mask: ir.Value | None
    heads: int
    scale: float
    last: ir.Node


FLOAT32 = frozenset({ir.DataType.FLOAT})
FLOATS = FLOAT32 | {ir.DataType.FLOAT16}


def fuse_attention(model: ir.Model, types: Collection[ir.DataType] = FLOAT32) -> int:
    """One node for each attention in one of these types; the scale goes into it."""
    edits = 0
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        found = _attention(softmax)
        if found is None or found.last.outputs[0].dtype not in types:
            continue
        write = Writer(model, softmax)
        mask = None if found.mask is None else _for_each_query(write, found)
        inputs = [*found.sources, *([] if mask is None else [None, None, mask])]
        result = write(
            "MultiHeadAttention", inputs, domain=DOMAIN, num_heads=found.heads, scale=found.scale
        )
        model.graph.insert_before(found.last, write.nodes)
        take_place(result, found.last.outputs[0])
        edits += 1
    _finish(model, edits)
    return edits


def _for_each_query(write: Writer, found: _Attention) -> ir.Value:
    """[batch, 1, 1, keys] -> [batch, 1, queries, keys], which the operator wants."""
    number = write("Shape", [found.sources[0]], ir.DataType.INT64, start=1, end=2)
    one = write.constant([1], ir.DataType.INT64)
    return write("Expand", [found.mask, write("Concat", [one, one, number, one], axis=0)])


def _attention(softmax: ir.Node) -> _Attention | None:
    """softmax(scale * Q K^T + mask) V."""
    added = _maker(softmax.inputs[0], "Add")
    scores = _maker(softmax.inputs[0] if added is None else added.inputs[0], "MatMul")
    mixed = _only_user(softmax, "MatMul")
    turned = mixed and _only_user(mixed, "Transpose")
    last = turned and _only_user(turned, "Reshape")
    if scores is None or mixed is None or last is None:
        return None
    split = [_split(value) for value in (*scores.inputs, mixed.inputs[1])]
    scaled = split[0] and _maker(split[0].inputs[0], "Mul")
    if scaled is None or split[1] is None or split[2] is None:
        return None
    scale, shape = _constant(scaled.inputs[1]), _constant(split[1].inputs[1])
    sources = (scaled.inputs[0], split[1].inputs[0], split[2].inputs[0])
    known = [source for source in sources if source is not None]
    if scale is None or shape is None or len(known) < len(sources):
        return None
    mask = None if added is None else added.inputs[1]
    return _Attention(known, mask, int(shape[2]), float(scale[0]), last)


def _split(value: ir.Value | None) -> ir.Node | None:
    """The Reshape that makes heads."""
    turned = _maker(value, "Transpose")
    return turned and _maker(turned.inputs[0], "Reshape")


def repeat_by_concat(model: ir.Model) -> int:
    """Repeat a last axis of one by Concat, which is 5 times as fast as Expand (rotary tables)."""
    edits = 0
    for node in [node for node in model.graph if node.op_type == "Expand"]:
        added, shape = _maker(node.inputs[0], "Unsqueeze"), _constant(node.inputs[1])
        if added is None or shape is None:
            continue
        *others, times = map(int, shape)
        last = _constant(added.inputs[1]) in ([-1.0], [float(len(others))])
        if last and set(others) <= {1}:
            write = Writer(model, node)
            result = write("Concat", [node.inputs[0]] * times, axis=-1)
            model.graph.insert_before(node, write.nodes)
            take_place(result, node.outputs[0])
            model.graph.remove(node, safe=True)
            edits += 1
    return edits


def _finish(model: ir.Model, edits: int) -> None:
    """Remove what nothing reads any more."""
    if edits:
        RemoveUnusedNodesPass()(model)
        model.graph.opset_imports[DOMAIN] = 1


def _maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _only_user(node: ir.Node, op_type: str) -> ir.Node | None:
    users = [use.node for use in node.outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def _uncast(value: ir.Value | None) -> ir.Value | None:
    cast = _maker(value, "Cast")
    return value if cast is None else cast.inputs[0]


def _constant(value: ir.Value | None) -> list[float] | None:
    tensor = None if value is None else value.const_value
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return None
    return [float(number) for number in tensor.numpy().ravel()]
