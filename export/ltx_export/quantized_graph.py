"""Quantized layers in a graph: codes and scales are the file's bytes, the operators are ONNX's own.

    x -> [Mul X.pre_quant_scale] -> QuantizeLinear -> DequantizeLinear ---\\
                                                                      MatMul -> Add X.bias
    X.weight -> DequantizeLinear -> Transpose -----------------------------/

Layers that read one value with one scale share what is in front of the MatMul, so that TensorRT
merges their products. Scales are float32 in the file. A bfloat16 stage casts them, which loses
nothing; a float16 stage cannot hold them, so there the activations are cast instead.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from ltx_engines.errors import UserError
from ltx_export.weights import PLAIN, STORED, Weights
from ltx_ref.checkpoint import Header
from ltx_ref.quantization import INT4_BLOCK, NVFP4_BLOCK, Format, Layer

CODES: Mapping[Format, ir.DataType] = MappingProxyType(
    {
        "fp8": ir.DataType.FLOAT8E4M3FN,
        "fp8-cast": ir.DataType.FLOAT8E4M3FN,
        "int8": ir.DataType.INT8,
        "int8-wo": ir.DataType.INT8,
        "int4-wo": ir.DataType.INT4,
        "nvfp4": ir.DataType.FLOAT4E2M1,
    }
)
"""What a layer's weight is in the graph."""

BLOCKS: Mapping[Format, int] = MappingProxyType({"int4-wo": INT4_BLOCK, "nvfp4": NVFP4_BLOCK})
"""How many numbers of a row share a scale, where not the whole row does."""

INT4_OPSET, NVFP4_OPSET = 21, 23
"""The first whose DequantizeLinear has blocks, and has four-bit floats."""

INPUT_PARTS = (".input_scale", ".pre_quant_scale")

TENSORRT = "trt"
"""Domain of what TensorRT alone has."""

ONE = "one"
"""The scale of weights that have none."""

Read = Callable[[str], bytes]
"""The bytes of the scale of this name."""

log = logging.getLogger(__name__)


def reader(header: Header) -> Read:
    """Reads from a file."""

    def read(name: str) -> bytes:
        info = header.tensors[name]
        with header.path.open("rb") as file:
            file.seek(info.begin)
            data = file.read(info.end - info.begin)
        if len(data) < info.end - info.begin:
            raise UserError(f"{header.path} became shorter while it was read; start again")
        return data

    return read


def insert(model: ir.Model, layers: Mapping[str, Layer], read: Read) -> int:
    """Quantize these layers' products; returns how many. fp8-cast is left to `widen`.

    Raises:
        UserError: a quantized weight is not that of a linear layer, or the opset is too low for it.
    """
    writer = _Writer(model, read)
    chosen = {f"{p}.weight": layer for p, layer in layers.items() if layer.format != "fp8-cast"}
    products = list(_products(model, chosen))
    for product in products:
        writer.quantize(product)
        log.info("%s: %s", product.layer.path, product.layer.format)
    for name in chosen.keys() - {f"{product.layer.path}.weight" for product in products}:
        if name in model.graph.initializers:
            raise UserError(
                f"{name} is {chosen[name].format} in the file, and not of a linear layer; "
                "quantize the bfloat16 checkpoint again without it"
            )
    return len(products)


def widen(model: ir.Model, weights: Weights) -> int:
    """Dequantize, to its own type, every weight that is a plain 8-bit cast in the file."""
    edits = 0
    for value in list(model.graph.initializers.values()):
        weight = weights.get(str(value.name))
        if value.const_value is not None or weight is None or value.dtype not in FLOATS:
            continue
        if weight.info.dtype in PLAIN:
            _widen(model, value)
            edits += 1
    return edits


FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def _widen(model: ir.Model, value: ir.Value) -> None:
    if value.dtype is None:
        raise AssertionError(f"{value.name} has no type")
    node = ir.node("DequantizeLinear", [value, _constant(model, ONE, 1, value.dtype)])
    node.name = f"{str(value.name).rpartition('.')[0]}/DequantizeLinear"
    wide = node.outputs[0]
    wide.name, wide.type, wide.shape = f"{node.name}:0", value.type, value.shape
    for use in tuple(value.uses()):
        if use.node is not node:
            use.node.replace_input_with(use.idx, wide)
    value.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)  # a new one: stamped weights share theirs
    model.graph.insert_before(model.graph[0], node)


@dataclass(frozen=True, slots=True)
class _Product:
    """MatMul(x, Transpose(weight)) of a quantized layer."""

    layer: Layer
    weight: ir.Value
    transpose: ir.Node
    matmul: ir.Node

    @property
    def source(self) -> ir.Value:
        value = self.matmul.inputs[0]
        if value is None or value.dtype not in FLOATS:
            raise AssertionError(f"{self.matmul.name}: the type of its input is not known")
        return value


def _products(model: ir.Model, layers: Mapping[str, Layer]) -> Iterator[_Product]:
    """In the order of the graph."""
    for matmul in model.graph:
        turned = matmul.inputs[1] if matmul.op_type == "MatMul" else None
        transpose = None if turned is None else turned.producer()
        weight = None if transpose is None else transpose.inputs[0]
        layer = None if weight is None else layers.get(str(weight.name))
        if layer is None or weight is None or transpose is None:
            continue
        if transpose.op_type == "Transpose" and len(weight.uses()) == 1:
            yield _Product(layer, weight, transpose, matmul)


class _Writer:
    """Puts the nodes of one layer after another into a graph; `shared` are inputs made before."""

    def __init__(self, model: ir.Model, read: Read) -> None:
        self.model, self.read = model, read
        self.shared: dict[tuple[object, ...], ir.Value] = {}
        self.at = model.graph[0]
        self.layer = ""

    def quantize(self, product: _Product) -> None:
        layer, source = product.layer, product.source
        self.layer = layer.path
        _check_opset(self.model, layer)
        if layer.input_scale is not None:
            scales = (name for name, _ in layer.parts() if name.endswith(INPUT_PARTS))
            key = source, layer.format, *map(self.read, scales)
            if key not in self.shared:
                self.at = product.matmul
                self.shared[key] = self._input(layer, source)
            product.matmul.replace_input_with(0, self.shared[key])
        self.at = product.transpose
        product.transpose.replace_input_with(0, self._weight(product))

    def _input(self, layer: Layer, source: ir.Value) -> ir.Value:
        """As the engine will see the activations: rounded to codes."""
        own = _type(source)
        x = (
            source
            if own == ir.DataType.BFLOAT16
            else self._cast("input", source, ir.DataType.FLOAT)
        )
        if layer.pre_quant_scale is not None:
            factor = self._scale(layer, "pre_quant_scale", _type(x))
            x = self._node("input/Mul", "Mul", [x, factor], _type(x))
        if layer.format == "nvfp4":
            return self._cast("input/back", self._blocks(layer, x), own)
        zero = _constant(
            self.model, f"zero_{CODES[layer.format].name.lower()}", 0, CODES[layer.format]
        )
        scale = self._scale(layer, "input_scale", _type(x))
        inputs = (scale, zero)
        codes = self._node("input/QuantizeLinear", "QuantizeLinear", [x, *inputs], _type(zero))
        wide = self._node("input/DequantizeLinear", "DequantizeLinear", [codes, *inputs], _type(x))
        return self._cast("input/back", wide, own)

    def _blocks(self, layer: Layer, x: ir.Value) -> ir.Value:
        """Four-bit activations, whose blocks get their scales at run time."""
        unit = self._part(layer, "input_scale")
        node = ir.node(
            "TRT_FP4DynamicQuantize",
            [x, unit],
            {"axis": -1, "block_size": NVFP4_BLOCK, "scale_type": int(ir.DataType.FLOAT8E4M3FN)},
            domain=TENSORRT,
            num_outputs=2,
        )
        self.model.graph.opset_imports[TENSORRT] = 1
        codes, scales = node.outputs
        self._place("input/TRT_FP4DynamicQuantize", node, CODES["nvfp4"])
        scales.dtype = ir.DataType.FLOAT8E4M3FN
        own = self._scale(layer, "input_scale", _type(x))
        wide = self._node("input/DequantizeLinear", "DequantizeLinear", [scales, own], _type(x))
        name = "input/DequantizeLinear_1"
        return self._node(
            name, "DequantizeLinear", [codes, wide], _type(x), axis=-1, block_size=NVFP4_BLOCK
        )

    def _weight(self, product: _Product) -> ir.Value:
        layer, weight = product.layer, product.weight
        own = _type(weight)
        scaled = ir.DataType.FLOAT if own == ir.DataType.FLOAT16 else own
        weight.type = ir.TensorType(CODES[layer.format])  # a new one: stamped weights share theirs
        scale = self._scale(layer, "weight_scale", scaled)
        blocks = BLOCKS.get(layer.format)
        attributes = {"axis": 0} if blocks is None else {"axis": 1, "block_size": blocks}
        inputs = [weight, scale]
        wide = self._node("DequantizeLinear", "DequantizeLinear", inputs, scaled, **attributes)
        wide.shape = weight.shape
        return self._cast("weight", wide, own)

    def _scale(self, layer: Layer, part: str, dtype: ir.DataType) -> ir.Value:
        """A scale in this type. Those of nvfp4's blocks are in units of the whole layer's."""
        value = self._part(layer, part)
        if _type(value) != ir.DataType.FLOAT8E4M3FN:
            return self._cast(part, value, dtype)
        unit = self._scale(layer, f"{part}_2", dtype)
        return self._node(f"{part}/DequantizeLinear", "DequantizeLinear", [value, unit], dtype)

    def _part(self, layer: Layer, part: str) -> ir.Value:
        name, info = f"{layer.path}.{part}", getattr(layer, part)
        known = self.model.graph.initializers
        if name not in known:
            (dtype,) = STORED[info.dtype]
            known[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(info.shape))
        return known[name]

    def _cast(self, what: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype == dtype:
            return value
        return self._node(f"{what}/Cast", "Cast", [value], dtype, to=int(dtype))

    def _node(
        self, name: str, op_type: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: int
    ) -> ir.Value:
        return self._place(name, ir.node(op_type, inputs, attributes), dtype)

    def _place(self, name: str, node: ir.Node, dtype: ir.DataType) -> ir.Value:
        node.name = f"{self.layer}/{name}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}:{index}"
        node.outputs[0].dtype = dtype
        self.model.graph.insert_before(self.at, node)
        return node.outputs[0]


def _type(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise AssertionError(f"{value.name} has no type")
    return value.dtype


def _check_opset(model: ir.Model, layer: Layer) -> None:
    opsets = model.graph.opset_imports
    if layer.format == "int4-wo":
        opsets[""] = max(opsets[""], INT4_OPSET)
    if layer.format == "nvfp4" and opsets[""] < NVFP4_OPSET:
        raise UserError(
            f"{layer.path} is nvfp4, which only TensorRT computes, on SM120: export it with "
            f"--opset {NVFP4_OPSET}, or quantize to int8 for ONNX Runtime"
        )


def _constant(model: ir.Model, name: str, number: int, dtype: ir.DataType) -> ir.Value:
    known = model.graph.initializers
    if name not in known:
        tensor = ir.Tensor(np.full((), number, dtype.numpy()), dtype=dtype, name=name)
        known[name] = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape([]), const_value=tensor
        )
    return known[name]
