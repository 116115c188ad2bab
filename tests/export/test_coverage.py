"""A graph that lost one quantized layer, or a part of one, is told so by the layer's name."""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from ltx_export import coverage
from ltx_ref import quantization
from ltx_ref.quantization import FORMATS, Format
from tests.export import quantized_files
from tests.export.test_quantized_graph import Quantized, quantized, tiny

BLOCKS = 3
LAYERS = 10 * BLOCKS
CHOSEN = "model.diffusion_model.transformer_blocks.1.ff.net.2"
SHARED = "model.diffusion_model.transformer_blocks.1.attn1.to_k"


def made(folder: Path, form: Format, opset: int = 23, *, smooth: bool = False) -> Quantized:
    path = quantized_files.write(folder / "q.safetensors", form, smooth=smooth, blocks=BLOCKS)
    return quantized(tiny(path, opset=opset), path, specialised=opset == 20)


def count(graph: Quantized) -> coverage.Coverage:
    return coverage.count(graph.model, quantization.layers(graph.header))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_covered_in_the_graph_and_in_its_file(tmp_path: Path, form: Format) -> None:
    graph = made(tmp_path, form)
    counted = count(graph)
    assert counted.found == dict.fromkeys(counted.found, form)
    assert list(counted.sentences()) == [f"Quantized {LAYERS} of {LAYERS} linear layers to {form}"]
    proto = onnx.load(graph.save(), load_external_data=False)
    again = coverage.count(ir.from_proto(proto), quantization.layers(graph.header))
    assert again == counted


def test_integer_products_are_covered_too(tmp_path: Path) -> None:
    for smooth in (False, True):
        graph = made(tmp_path, "int8", 20, smooth=smooth)
        assert graph.integers == LAYERS
        assert count(graph).counts() == {"int8": LAYERS}


def node(graph: Quantized, name: str) -> ir.Node:
    (found,) = [node for node in graph.model.graph if node.name == name]
    return found


def lose_input_pair(graph: Quantized) -> None:
    matmul = node(graph, f"{CHOSEN}/MatMul")
    matmul.replace_input_with(0, node(graph, f"{CHOSEN}/input/QuantizeLinear").inputs[0])


def lose_weight_pair(graph: Quantized) -> None:
    node(graph, f"{CHOSEN}/Transpose").replace_input_with(
        0, graph.model.graph.initializers[f"{CHOSEN}.weight"]
    )
    graph.model.graph.remove(node(graph, f"{CHOSEN}/DequantizeLinear"), safe=True)


def take_anothers_scale(graph: Quantized) -> None:
    other = graph.model.graph.initializers[f"{SHARED}.weight_scale"]
    node(graph, f"{CHOSEN}/DequantizeLinear").replace_input_with(1, other)


def take_anothers_input_scale(graph: Quantized) -> None:
    other = graph.model.graph.initializers[f"{SHARED}.weight_scale"]
    node(graph, f"{CHOSEN}/input/QuantizeLinear").replace_input_with(1, other)


def lose_smoothing(graph: Quantized) -> None:
    quantize = node(graph, f"{CHOSEN}/input/QuantizeLinear")
    quantize.replace_input_with(0, node(graph, f"{CHOSEN}/input/Mul").inputs[0])


def lose_weight(graph: Quantized) -> None:
    graph.model.graph.initializers.pop(f"{CHOSEN}.weight")


def widen_weight(graph: Quantized) -> None:
    graph.model.graph.initializers[f"{CHOSEN}.weight"].type = ir.TensorType(ir.DataType.FLOAT)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lose_input_pair, "its activations are not quantized: no QuantizeLinear before its"),
        (lose_weight_pair, "its weight is read by a Transpose, not a DequantizeLinear"),
        (take_anothers_scale, "its weight_scale is model.diffusion_model"),
        (take_anothers_input_scale, "its input_scale is model.diffusion_model"),
        (lose_smoothing, "its activations are not smoothed: no Mul by its pre_quant_scale"),
        (lose_weight, "its weight is not in the graph"),
        (widen_weight, "its weight is FLOAT, wanted INT8"),
    ],
)
def test_a_graph_edited_to_lose_one_part_names_the_layer(
    tmp_path: Path, edit: Callable[[Quantized], None], said: str
) -> None:
    graph = made(tmp_path, "int8", smooth=True)
    edit(graph)
    counted = count(graph)
    assert list(counted.missing) == [CHOSEN]
    assert counted.missing[CHOSEN].startswith(said)
    assert counted.counts() == {"int8": LAYERS - 1}
    first, second = counted.sentences()
    assert first == f"Quantized {LAYERS - 1} of {LAYERS} linear layers to int8"
    assert second.startswith(f"{CHOSEN} is not quantized: its ")


def test_an_integer_product_of_float_codes_is_named(tmp_path: Path) -> None:
    graph = made(tmp_path, "int8", 20)
    gemm = next(n for n in graph.model.graph if n.op_type == "QGemm" and CHOSEN in str(n.name))
    gemm.replace_input_with(0, graph.model.graph.inputs[0])
    assert list(count(graph).missing) == [CHOSEN]
