"""Whether a graph quantizes what its file does: each layer's own codes and scales, each node there.

Between codes and product there is nothing but scales, casts and a transpose:

    QuantizeLinear -> DequantizeLinear -> MatMul <- Transpose <- DequantizeLinear <- X.weight
    QuantizeLinear -> Reshape -> QGemm <- X.weight           as ONNX Runtime multiplies integers
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from ltx_export.quantized_graph import CODES
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


def count(model: ir.Model, layers: Mapping[str, Layer]) -> Coverage:
    """Look for each of the layers in the graph."""
    found: dict[str, Format] = {}
    missing: dict[str, str] = {}
    for path, layer in layers.items():
        try:
            _check(model, layer, layers)
        except _MissingError as problem:
            missing[path] = str(problem)
        else:
            found[path] = layer.format
    return Coverage(found, missing, dict(Counter(layer.format for layer in layers.values())))


class _MissingError(Exception):
    """What a layer lacks."""


def _check(model: ir.Model, layer: Layer, layers: Mapping[str, Layer]) -> None:
    name = f"{layer.path}.weight"
    weight = model.graph.initializers.get(name)
    if weight is None or not weight.uses():
        raise _MissingError("its weight is not in the graph")
    if weight.dtype != CODES[layer.format]:
        raise _MissingError(f"its weight is {weight.dtype}, wanted {CODES[layer.format]}")
    for use in weight.uses():
        if use.node.op_type == "QGemm":
            _check_integers(use.node, layer, layers)
        else:
            _check_numbers(use.node, layer, layers)


def _check_integers(gemm: ir.Node, layer: Layer, layers: Mapping[str, Layer]) -> None:
    codes, scale, _, _, weight_scale = gemm.inputs[:5]
    if layer.format != "int8":
        raise _MissingError(f"its product is of integers, which {layer.format} is not")
    _check_scale(weight_scale, layer, "weight_scale")
    _check_codes(_through(codes, "Reshape"), layer, layers)
    _check_input_scale(scale, layer, layers)


def _check_numbers(dequantize: ir.Node, layer: Layer, layers: Mapping[str, Layer]) -> None:
    if dequantize.op_type != "DequantizeLinear":
        raise _MissingError(f"its weight is read by a {dequantize.op_type}, not a DequantizeLinear")
    if layer.weight_scale is not None:
        _check_scale(dequantize.inputs[1], layer, "weight_scale")
    products = [
        use.node
        for value in _forward(dequantize.outputs[0], "Cast")
        for turned in value.uses()
        if turned.node.op_type == "Transpose"
        for use in turned.node.outputs[0].uses()
    ]
    if not products or any(node.op_type != "MatMul" for node in products):
        raise _MissingError("its weight does not go into a MatMul")
    if layer.format in CALIBRATED:
        for product in products:
            _check_codes(_through(product.inputs[0], "Cast"), layer, layers)


def _check_codes(value: ir.Value | None, layer: Layer, layers: Mapping[str, Layer]) -> None:
    """The activations that are multiplied were rounded to codes, by a scale that is theirs."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "DequantizeLinear":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    maker = "TRT_FP4DynamicQuantize" if layer.format == "nvfp4" else "QuantizeLinear"
    if node is None or node.op_type != maker:
        raise _MissingError(f"its activations are not quantized: no {maker} before its product")
    _check_input_scale(node.inputs[1], layer, layers)
    if layer.pre_quant_scale is not None:
        factors = _through(node.inputs[0], "Cast")
        mul = None if factors is None else factors.producer()
        if mul is None or mul.op_type != "Mul":
            raise _MissingError("its activations are not smoothed: no Mul by its pre_quant_scale")
        _check_shared(mul.inputs[1], layer, layers, "pre_quant_scale")


def _check_input_scale(value: ir.Value | None, layer: Layer, layers: Mapping[str, Layer]) -> None:
    _check_shared(value, layer, layers, "input_scale")


def _check_scale(value: ir.Value | None, layer: Layer, part: str) -> None:
    found = _initializer(value)
    if found != f"{layer.path}.{part}":
        raise _MissingError(f"its {part} is {found}")


def _check_shared(
    value: ir.Value | None, layer: Layer, layers: Mapping[str, Layer], part: str
) -> None:
    """Its own, or that of a layer which reads the same numbers with the same scale."""
    found = _initializer(value)
    path, _, last = found.rpartition(".")
    other = layers.get(path)
    if last != part or other is None or other.format != layer.format:
        raise _MissingError(f"its {part} is {found}")


def _initializer(value: ir.Value | None) -> str:
    """The name of what a scale is made from."""
    plain = _through(value, "Cast", "DequantizeLinear")
    return str(plain.name) if plain is not None and plain.is_initializer() else "not an initializer"


def _through(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """Where the value comes from, before nodes of these kinds."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in op_types:
            break
        value = node.inputs[0]
    return value


def _forward(value: ir.Value, op_type: str) -> Iterator[ir.Value]:
    """The value, and what nodes of this kind make of it."""
    yield value
    for use in value.uses():
        if use.node.op_type == op_type:
            yield use.node.outputs[0]
