"""Products whose weights come at run time, in the form that a builder has its best kernels for.

What TensorRT-RTX 1.7.1 makes of an input that is a weight (SM89 and SM120, 2026-11):

    MatMul(x, Transpose(w))          copies the weight, transposed, in each run
    Einsum(btk,nk->btn)              does not, but adds the bias in another kernel
    MatMul(w, Transpose(x))          neither; the transpositions of activations are only strides
    Q/DQ whose scales are inputs     dequantizes the weight and multiplies in bfloat16
    Q/DQ whose scales are constants  multiplies codes

So the weight comes first, Q and DQ get a constant, and the true scales s of activations and t of
weights stand outside:

    round(x / s) s @ round(w / t) t  =  (round(x / s) @ round(w / t)) s t
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ltx_export.edits import take_place
from ltx_export.lower import Writer

SWAP = (0, 2, 1)
"""Of activations: batch, tokens, channels <-> batch, channels, tokens."""

UNITS: Mapping[ir.DataType, float] = MappingProxyType(
    {ir.DataType.FLOAT8E4M3FN: 2.0**-9, ir.DataType.INT8: 2.0**-7}
)
"""The constants: powers of two, so that nothing is rounded by them. They bring codes below 1, so
that float16 holds the sum of 65,504 products."""

FLOAT = ir.DataType.FLOAT


def rewrite(model: ir.Model) -> int:
    """Write each linear layer so; returns how many. The types of the values must be known.

    Layers whose weights alone are codes keep their scales.
    """
    count = 0
    inputs: dict[ir.Node, ir.Value] = {}
    for layer in list(_layers(model)):
        write = Writer(model, layer.matmul)
        codes = layer.codes()
        if codes is None:
            product = _product(write, layer.source, layer.weight)
        else:
            if codes.quantize not in inputs:
                inputs[codes.quantize] = _input(model, codes, _type(layer.source))
            product = _product(
                write, inputs[codes.quantize], _weight(write, codes, _type(layer.source))
            )
            product = _scaled(write, product, codes)
        model.graph.insert_before(layer.matmul, write.nodes)
        take_place(product, layer.matmul.outputs[0])
        model.graph.remove(layer.matmul, safe=True)
        count += 1
    RemoveUnusedNodesPass()(model)
    return count


def _product(write: Writer, source: ir.Value, weight: ir.Value) -> ir.Value:
    """The product has the layer's name, by which its kernel is known."""
    turned = write("Transpose", [source], perm=SWAP)
    product = write("MatMul", [weight, turned], source.dtype)
    write.nodes[-1].name = write.origin.name
    return write("Transpose", [product], perm=SWAP)


@dataclass(frozen=True, slots=True)
class _Codes:
    """Dequantize(Quantize(x, s), s) and Dequantize(w, t), in this type."""

    quantize: ir.Node
    dequantize: ir.Node
    dtype: ir.DataType

    @property
    def scales(self) -> tuple[ir.Value, ir.Value]:
        """Of the activations and of the weights, in float32 wherever the file has them so."""
        return _known(_uncast(self.quantize.inputs[1])), _known(_uncast(self.dequantize.inputs[1]))


@dataclass(frozen=True, slots=True)
class _Layer:
    """MatMul(source, Transpose(weight))."""

    matmul: ir.Node
    source: ir.Value
    weight: ir.Value

    def codes(self) -> _Codes | None:
        wide, weight = (
            _maker(_uncast(value), "DequantizeLinear") for value in (self.source, self.weight)
        )
        quantize = None if wide is None else _maker(wide.inputs[0], "QuantizeLinear")
        if quantize is None or weight is None:
            return None
        dtype = _type(weight.inputs[0])
        return _Codes(quantize, weight, dtype) if dtype in UNITS else None


def _layers(model: ir.Model) -> Iterator[_Layer]:
    """Products of three axes with a weight of two."""
    for matmul in model.graph:
        transpose = _maker(matmul.inputs[1], "Transpose") if matmul.op_type == "MatMul" else None
        source = None if transpose is None else matmul.inputs[0]
        weight = None if transpose is None else transpose.inputs[0]
        if source is None or weight is None or source.shape is None or weight.shape is None:
            continue
        if (len(source.shape), len(weight.shape)) == (3, 2):
            yield _Layer(matmul, source, weight)


def _input(model: ir.Model, codes: _Codes, own: ir.DataType) -> ir.Value:
    """The codes of x / s, divided by the constant and dequantized by it."""
    write = Writer(model, codes.quantize)
    source = _known(codes.quantize.inputs[0])
    unit, scale = UNITS[codes.dtype], codes.scales[0]
    wide = source if source.dtype == FLOAT else write("Cast", [source], to=int(FLOAT))
    larger = write("Mul", [scale, write.constant(1 / unit, FLOAT)])
    small = write("Div", [wide, larger])
    zero = write.constant(0, codes.dtype)
    inputs = [write.constant(unit, FLOAT), zero]
    coded = write("QuantizeLinear", [small, *inputs], codes.dtype)
    inputs = [write.constant(unit, own), zero]
    result = write("DequantizeLinear", [coded, *inputs], own)
    model.graph.insert_before(codes.quantize, write.nodes)
    return result


def _weight(write: Writer, codes: _Codes, own: ir.DataType) -> ir.Value:
    inputs = [codes.dequantize.inputs[0], write.constant(UNITS[codes.dtype], own)]
    return write("DequantizeLinear", inputs, own)


def _scaled(write: Writer, product: ir.Value, codes: _Codes) -> ir.Value:
    """By the true scales, in float32."""
    own = _type(product)
    both = write("Mul", list(reversed(codes.scales)))
    factor = write("Mul", [both, write.constant(UNITS[codes.dtype] ** -2, FLOAT)])
    wide = product if own == FLOAT else write("Cast", [product], to=int(FLOAT))
    scaled = write("Mul", [wide, factor])
    return scaled if own == FLOAT else write("Cast", [scaled], to=int(own))


def _maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _uncast(value: ir.Value | None) -> ir.Value | None:
    cast = _maker(value, "Cast")
    return value if cast is None else cast.inputs[0]


def _known(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise AssertionError("an input is missing")
    return value


def _type(value: ir.Value | None) -> ir.DataType:
    if value is None or value.dtype is None:
        raise AssertionError(f"{value} has no type")
    return value.dtype
