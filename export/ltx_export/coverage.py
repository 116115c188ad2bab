"""Whether a graph quantizes what its file does: each layer's own codes and scales, each node there.

Between codes and product there is nothing but scales, casts and a transpose:

    QuantizeLinear -> DequantizeLinear -> MatMul <- Transpose <- DequantizeLinear <- X.weight
    QuantizeLinear -> Reshape -> QGemm <- X.weight           as ONNX Runtime multiplies integers
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from ltx_export import onnxruntime_graph
from ltx_export.quantized_graph import BLOCKS, CODES, INPUT_PARTS, Read
from ltx_ref.quantization import CALIBRATED, Format, Layer


@dataclass(frozen=True, slots=True)
class Coverage:
    """The layers that are quantized in the graph, and what is wrong with the others."""

    found: Mapping[str, Format]
    missing: Mapping[str, str]
    wanted: Mapping[Format, int]

    def counts(self) -> dict[Format, int]:
        """How many layers have which format."""
        return dict(Counter(self.found.values()))

    def sentences(self) -> Iterator[str]:
        for form, number in self.wanted.items():
            found = self.counts().get(form, 0)
            yield f"Quantized {found} of {number} linear layers to {form}"
        for path, problem in self.missing.items():
            yield f"{path} is not quantized: {problem}"


def count(model: ir.Model, layers: Mapping[str, Layer], read: Read) -> Coverage:
    """Look for each of the layers in the graph. `read` gives the file's scales
    (`quantized_graph.reader`)."""
    found: dict[str, Format] = {}
    missing: dict[str, str] = {}
    graph = _Graph(model, layers, read)
    for path, layer in layers.items():
        try:
            for product in graph.products(layer):
                graph.check_product(product, layer)
        except _MissingError as problem:
            missing[path] = str(problem)
        else:
            found[path] = layer.format
    return Coverage(found, missing, dict(Counter(layer.format for layer in layers.values())))


class _MissingError(Exception):
    """What a layer lacks."""


@dataclass(frozen=True)
class _Graph:
    """Where the layers are looked for."""

    model: ir.Model
    layers: Mapping[str, Layer]
    read: Read

    @cached_property
    def alive(self) -> set[ir.Node]:
        """The nodes that an output is computed from."""
        found = set[ir.Node]()
        waiting = [value.producer() for value in self.model.graph.outputs]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in found:
                found.add(node)
                waiting += [value.producer() for value in node.inputs if value is not None]
        return found

    def products(self, layer: Layer) -> list[ir.Node]:
        """What multiplies the layer's weight, whose way there is checked."""
        weight = self.model.graph.initializers.get(f"{layer.path}.weight")
        if weight is None or not weight.uses():
            raise _MissingError("its weight is not in the graph")
        if weight.dtype != CODES[layer.format]:
            raise _MissingError(f"its weight is {weight.dtype}, wanted {CODES[layer.format]}")
        found = []
        for node in [use.node for use in weight.uses()]:
            found += [node] if node.op_type == "QGemm" else _multiplied(node, layer)
        return found

    def check_product(self, product: ir.Node, layer: Layer) -> None:
        if product.op_type == "QGemm":
            _check_integers(product, layer)
        if layer.format in CALIBRATED:
            self._check_input(_quantizer(product, layer), layer)
        if product not in self.alive:
            raise _MissingError(f"its {product.op_type} goes into no output")

    def _check_input(self, quantizer: ir.Node, layer: Layer) -> None:
        """The activations become codes by scales that are the layer's, in number if not in name."""
        scale = _initializer(_input(quantizer, 1))
        owner = self._owner(scale, quantizer, layer)
        mul = _maker(_through(_input(quantizer, 0), "Cast"), "Mul")
        factors = "" if mul is None else _initializer(_input(mul, 1))
        if layer.pre_quant_scale is None and factors.endswith(".pre_quant_scale"):
            raise _MissingError(f"its activations are smoothed by {factors}, its weight is not")
        if layer.pre_quant_scale is not None:
            if mul is None:
                raise _MissingError(
                    "its activations are not smoothed: no Mul by its pre_quant_scale"
                )
            if factors != f"{owner}.pre_quant_scale":
                raise _MissingError(f"its pre_quant_scale is {factors}")

    def _owner(self, scale: str, quantizer: ir.Node, layer: Layer) -> str:
        """Whose input_scale this is: the layer's, or another's that reads the same codes and has
        the same numbers."""
        path, _, part = scale.rpartition(".")
        other = self.layers.get(path)
        if part != "input_scale" or other is None:
            raise _MissingError(f"its input_scale is {scale}")
        if other is not layer:
            if self._quantizers(other) != {quantizer}:
                raise _MissingError(f"its input_scale is {scale}, of a layer that reads others")
            if self._scales(other) != self._scales(layer):
                raise _MissingError(f"its input_scale is {scale}, which is another number")
        return path

    def _quantizers(self, layer: Layer) -> set[ir.Node]:
        try:
            return {_quantizer(product, layer) for product in self.products(layer)}
        except _MissingError:
            return set()

    def _scales(self, layer: Layer) -> dict[str, bytes]:
        """Those of its activations."""
        return {
            name.removeprefix(layer.path): self.read(name)
            for name, _ in layer.parts()
            if name.endswith(INPUT_PARTS)
        }


def _multiplied(dequantize: ir.Node, layer: Layer) -> list[ir.Node]:
    """The products of a weight that becomes numbers first."""
    if dequantize.op_type != "DequantizeLinear":
        raise _MissingError(f"its weight is read by a {dequantize.op_type}, not a DequantizeLinear")
    _check_weight(dequantize, layer)
    turned = list(_forward(dequantize.outputs[0], "Cast"))
    found = [use.node for node in turned for use in node.outputs[0].uses()]
    straight = all(node.op_type == "Transpose" for node in turned)
    if not found or not straight or any(node.op_type != "MatMul" for node in found):
        raise _MissingError("its weight does not go into a MatMul")
    return found


def _check_weight(dequantize: ir.Node, layer: Layer) -> None:
    """Its scales are the layer's, of rows or blocks, and zero is zero."""
    scale = _through(_input(dequantize, 1), "Cast")
    if layer.weight_scale_2 is not None:
        blocks = _maker(scale, "DequantizeLinear")
        _check_scale(_input(blocks, 1), layer, "weight_scale_2")
        scale = _input(blocks, 0)
    if layer.weight_scale is None:
        _check_constant(scale, 1, "its weight's scale")
    else:
        _check_scale(scale, layer, "weight_scale")
        block = BLOCKS.get(layer.format)
        found = [dequantize.attributes.get(name) for name in ("axis", "block_size")]
        axis, size = (None if a is None else a.as_int() for a in found)
        if (axis, size) != ((0, None) if block is None else (1, block)):
            raise _MissingError(f"its weight_scale is of axis {axis} and blocks of {size}")
    if _input(dequantize, 2) is not None:
        _check_constant(_input(dequantize, 2), 0, "its weight's zero point")


def _check_integers(gemm: ir.Node, layer: Layer) -> None:
    if layer.format != "int8":
        raise _MissingError(f"its product is of integers, which {layer.format} is not")
    _check_scale(_input(gemm, 4), layer, "weight_scale")
    _check_constant(_input(gemm, 5), 0, "its weight's zero point")
    if any(value is not None for value in gemm.inputs[6:]):
        raise _MissingError("its product adds something or is quantized again")


def _quantizer(product: ir.Node, layer: Layer) -> ir.Node:
    """What makes the codes of the activations; all that reads them has their scale and zero."""
    op_type = "TRT_FP4DynamicQuantize" if layer.format == "nvfp4" else "QuantizeLinear"
    wide: ir.Node | None = product
    if product.op_type == "QGemm":
        codes = _through(_input(product, 0), "Reshape")
    else:
        wide = _maker(_through(_input(product, 0), "Cast"), "DequantizeLinear")
        codes = _input(wide, 0)
    node = _maker(codes, op_type)
    if wide is None or node is None:
        raise _MissingError(f"its activations are not quantized: no {op_type} before its product")
    if layer.format == "nvfp4":
        _check_blocks(node, wide)
    else:
        _check_codes(node, wide, CODES[layer.format])
    return node


def _check_codes(quantize: ir.Node, reader: ir.Node, codes: ir.DataType) -> None:
    """`reader` multiplies the codes or makes numbers of them."""
    zero = _input(quantize, 2)
    if reader.op_type == "QGemm":
        codes, wanted = ir.DataType.UINT8, onnxruntime_graph.ZERO
    else:
        wanted = 0
    _check_constant(zero, wanted, "its activations' zero point")
    if zero is None or zero.dtype != codes:
        raise _MissingError(f"its activations' codes are {zero and zero.dtype}, wanted {codes}")
    for index, what in ((1, "scale"), (2, "zero point")):
        if _input(reader, index) is not _input(quantize, index):
            raise _MissingError(
                f"its input_scale is {_initializer(_input(quantize, 1))}, but its "
                f"{reader.op_type} has another {what}"
            )


def _check_blocks(quantize: ir.Node, reader: ir.Node) -> None:
    """Each block's scale, in units of the layer's, is the one that its codes were made with."""
    scales = _maker(_through(_input(reader, 1), "Cast"), "DequantizeLinear")
    if scales is None or _input(scales, 0) is not quantize.outputs[1]:
        raise _MissingError("its activations' scales are not those that their codes were made with")
    unit, found = (_initializer(_input(node, 1)) for node in (quantize, scales))
    if found != unit:
        raise _MissingError(f"its input_scale is {unit}, but its DequantizeLinear has {found}")


def _check_scale(value: ir.Value | None, layer: Layer, part: str) -> None:
    found = _initializer(value)
    if found != f"{layer.path}.{part}":
        raise _MissingError(f"its {part} is {found}")


def _check_constant(value: ir.Value | None, wanted: float, what: str) -> None:
    tensor = None if value is None else value.const_value
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        raise _MissingError(f"{what} is not in the graph")
    found = tensor.numpy().ravel().astype(float).tolist()
    if set(found) != {float(wanted)}:
        raise _MissingError(f"{what} is {found[:3]}, wanted {wanted}")


def _input(node: ir.Node | None, index: int) -> ir.Value | None:
    return node.inputs[index] if node is not None and index < len(node.inputs) else None


def _maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _initializer(value: ir.Value | None) -> str:
    """The name of what a scale is made from."""
    plain = _through(value, "Cast")
    return str(plain.name) if plain is not None and plain.is_initializer() else "not an initializer"


def _through(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """Where the value comes from, before nodes of this kind."""
    while (node := _maker(value, op_type)) is not None:
        value = _input(node, 0)
    return value


def _forward(value: ir.Value, op_type: str) -> Iterator[ir.Node]:
    """What reads the value, behind nodes of this kind."""
    for node in [use.node for use in value.uses()]:
        if node.op_type == op_type:
            yield from _forward(node.outputs[0], op_type)
        else:
            yield node
