"""A graph that lost one quantized layer, or a part of one, is told so by the layer's name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from ltx_engines import bundle
from ltx_export import cli, coverage, quantized_graph
from ltx_ref import quantization
from ltx_ref.quantization import FORMATS, Format
from tests.export import quantized_files
from tests.export.test_quantized_graph import (
    Quantized,
    covered,
    quantization_layers,
    quantized,
    tiny,
)

BLOCKS = 3
LAYERS = 10 * BLOCKS
CHOSEN = "model.diffusion_model.transformer_blocks.1.ff.net.2"
SHARED = "model.diffusion_model.transformer_blocks.1.attn1.to_k"
OTHER = "model.diffusion_model.transformer_blocks.1.attn1.to_q"


def made(folder: Path, form: Format, opset: int = 23, *, smooth: bool = False) -> Quantized:
    path = quantized_files.write(folder / "q.safetensors", form, smooth=smooth, blocks=BLOCKS)
    return quantized(tiny(path, opset=opset), path, specialised=opset == 20)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_covered_in_the_graph_and_in_its_file(tmp_path: Path, form: Format) -> None:
    graph = made(tmp_path, form)
    counted = covered(graph)
    assert counted.found == dict.fromkeys(counted.found, form)
    assert list(counted.sentences()) == [f"Quantized {LAYERS} of {LAYERS} linear layers to {form}"]
    proto = onnx.load(graph.save(), load_external_data=False)
    again = covered(graph, ir.from_proto(proto))
    assert again == counted


def test_integer_products_are_covered_too(tmp_path: Path) -> None:
    for smooth in (False, True):
        graph = made(tmp_path, "int8", 20, smooth=smooth)
        assert graph.integers == LAYERS
        assert covered(graph).counts() == {"int8": LAYERS}


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


def initializer(graph: Quantized, name: str) -> ir.Value:
    return graph.model.graph.initializers[name]


def take_anothers_input_scale(graph: Quantized) -> None:
    other = initializer(graph, f"{OTHER}.input_scale")
    for end in ("QuantizeLinear", "DequantizeLinear"):
        node(graph, f"{CHOSEN}/input/{end}").replace_input_with(1, other)


def take_no_input_scale(graph: Quantized) -> None:
    for end in ("QuantizeLinear", "DequantizeLinear"):
        other = initializer(graph, f"{CHOSEN}.bias")
        node(graph, f"{CHOSEN}/input/{end}").replace_input_with(1, other)


def widen_by_anothers_scale(graph: Quantized) -> None:
    other = initializer(graph, f"{OTHER}.input_scale")
    node(graph, f"{CHOSEN}/input/DequantizeLinear").replace_input_with(1, other)


def take_anothers_smoothing(graph: Quantized) -> None:
    other = initializer(graph, f"{OTHER}.pre_quant_scale")
    node(graph, f"{CHOSEN}/input/Mul").replace_input_with(1, other)


def constant(graph: Quantized, number: int, dtype: ir.DataType) -> ir.Value:
    value = ir.Value(name="spoilt", type=ir.TensorType(dtype), shape=ir.Shape([]))
    value.const_value = ir.Tensor(np.full((), number, dtype.numpy()), name="spoilt")
    graph.model.graph.initializers["spoilt"] = value
    return value


def move_zero(graph: Quantized) -> None:
    moved = constant(graph, 3, ir.DataType.INT8)
    for end in ("QuantizeLinear", "DequantizeLinear"):
        node(graph, f"{CHOSEN}/input/{end}").replace_input_with(2, moved)


def lose_sign(graph: Quantized) -> None:
    unsigned = constant(graph, 0, ir.DataType.UINT8)
    for end in ("QuantizeLinear", "DequantizeLinear"):
        node(graph, f"{CHOSEN}/input/{end}").replace_input_with(2, unsigned)


def widen_from_another_zero(graph: Quantized) -> None:
    moved = constant(graph, 3, ir.DataType.INT8)
    node(graph, f"{CHOSEN}/input/DequantizeLinear").replace_input_with(2, moved)


def move_weights_zero(graph: Quantized) -> None:
    dequantize = node(graph, f"{CHOSEN}/DequantizeLinear")
    dequantize.resize_inputs(3)
    dequantize.replace_input_with(2, constant(graph, 1, ir.DataType.INT8))


def scale_columns(graph: Quantized) -> None:
    node(graph, f"{CHOSEN}/DequantizeLinear").attributes["axis"] = ir.AttrInt64("axis", 1)


def read_weight_twice(graph: Quantized) -> None:
    wide = node(graph, f"{CHOSEN}/DequantizeLinear").outputs[0]
    graph.model.graph.append(ir.node("Relu", [wide]))


def read_turned_weight_twice(graph: Quantized) -> None:
    turned = node(graph, f"{CHOSEN}/Transpose").outputs[0]
    graph.model.graph.append(ir.node("Relu", [turned]))


def use_no_product(graph: Quantized) -> None:
    """A copy of the weight in floats is multiplied; the product of codes is read by nothing."""
    add, source = node(graph, f"{CHOSEN}/Add"), node(graph, f"{CHOSEN}/input/Mul").outputs[0]
    copy = ir.Value(name="copy", type=ir.TensorType(ir.DataType.FLOAT))
    graph.model.graph.initializers["copy"] = copy
    product = ir.node("MatMul", [source, copy])
    graph.model.graph.insert_before(add, product)
    add.replace_input_with(0, product.outputs[0])


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
        (take_anothers_input_scale, f"its input_scale is {OTHER}.input_scale, of a layer that"),
        (take_no_input_scale, f"its input_scale is {CHOSEN}.bias"),
        (
            widen_by_anothers_scale,
            f"its input_scale is {CHOSEN}.input_scale, but its DequantizeLinear has another scale",
        ),
        (take_anothers_smoothing, f"its pre_quant_scale is {OTHER}.pre_quant_scale"),
        (move_zero, "its activations' zero point is [3.0], wanted 0"),
        (lose_sign, "its activations' codes are UINT8, wanted INT8"),
        (
            widen_from_another_zero,
            f"its input_scale is {CHOSEN}.input_scale, but its DequantizeLinear has another zero",
        ),
        (move_weights_zero, "its weight's zero point is [1.0], wanted 0"),
        (scale_columns, "its weight_scale is of axis 1 and blocks of None"),
        (read_weight_twice, "its weight does not go into a MatMul"),
        (read_turned_weight_twice, "its weight does not go into a MatMul"),
        (use_no_product, "its MatMul goes into no output"),
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
    counted = covered(graph)
    assert list(counted.missing) == [CHOSEN]
    assert counted.missing[CHOSEN].startswith(said)
    assert counted.counts() == {"int8": LAYERS - 1}
    first, second = counted.sentences()
    assert first == f"Quantized {LAYERS - 1} of {LAYERS} linear layers to int8"
    assert second.startswith(f"{CHOSEN} is not quantized: its ")


def gemm(graph: Quantized) -> ir.Node:
    return node(
        graph,
        next(
            str(n.name)
            for n in graph.model.graph
            if f"{CHOSEN}/" in str(n.name) and n.op_type == "QGemm"
        ),
    )


def multiply_floats(graph: Quantized) -> None:
    gemm(graph).replace_input_with(0, graph.model.graph.inputs[0])


def multiply_anothers_scale(graph: Quantized) -> None:
    gemm(graph).replace_input_with(1, initializer(graph, f"{OTHER}.input_scale"))


def multiply_from_another_zero(graph: Quantized) -> None:
    gemm(graph).replace_input_with(2, constant(graph, 0, ir.DataType.UINT8))


def move_unsigned_zero(graph: Quantized) -> None:
    moved = constant(graph, 0, ir.DataType.UINT8)
    gemm(graph).replace_input_with(2, moved)
    node(graph, f"{CHOSEN}/input/QuantizeLinear").replace_input_with(2, moved)


def multiply_anothers_weight_scale(graph: Quantized) -> None:
    gemm(graph).replace_input_with(4, initializer(graph, f"{SHARED}.weight_scale"))


def multiply_from_weights_zero(graph: Quantized) -> None:
    gemm(graph).replace_input_with(5, constant(graph, 1, ir.DataType.INT8))


def quantize_result(graph: Quantized) -> None:
    product = gemm(graph)
    product.resize_inputs(8)
    product.replace_input_with(7, initializer(graph, f"{CHOSEN}.input_scale"))


SCALE = f"its input_scale is {CHOSEN}.input_scale, but its QGemm has another"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (multiply_floats, "its activations are not quantized: no QuantizeLinear before its"),
        (multiply_anothers_scale, f"{SCALE} scale"),
        (multiply_from_another_zero, f"{SCALE} zero point"),
        (move_unsigned_zero, "its activations' zero point is [0.0], wanted 128"),
        (multiply_anothers_weight_scale, f"its weight_scale is {SHARED}.weight_scale"),
        (multiply_from_weights_zero, "its weight's zero point is [1.0], wanted 0"),
        (quantize_result, "its product adds something or is quantized again"),
        (use_no_product, "its QGemm goes into no output"),
    ],
)
def test_an_edited_integer_product_is_named(
    tmp_path: Path, edit: Callable[[Quantized], None], said: str
) -> None:
    graph = made(tmp_path, "int8", 20, smooth=True)
    edit(graph)
    missing = covered(graph).missing
    assert list(missing) == [CHOSEN]
    assert missing[CHOSEN].startswith(said)


def test_an_integer_product_of_a_layer_with_float_activations_is_named(tmp_path: Path) -> None:
    graph = made(tmp_path, "int8", 20)
    layers = quantization.layers(graph.header)
    layers[CHOSEN] = replace(layers[CHOSEN], format="int8-wo", input_scale=None)
    counted = coverage.count(graph.model, layers, quantized_graph.reader(graph.header))
    assert counted.missing == {CHOSEN: "its product is of integers, which int8-wo is not"}


def test_a_layer_that_reads_codes_made_for_another_range_is_named(tmp_path: Path) -> None:
    limits = dict.fromkeys(quantization_layers(), 6.0) | {SHARED: 7.0}
    path = quantized_files.write(tmp_path / "q.safetensors", "fp8", amax=limits)
    graph = quantized(tiny(path, opset=23), path)
    product = node(graph, f"{SHARED}/MatMul")
    product.replace_input_with(0, node(graph, f"{OTHER}/MatMul").inputs[0])
    assert covered(graph).missing == {
        SHARED: f"its input_scale is {OTHER}.input_scale, which is another number"
    }


def test_a_layer_that_shares_the_codes_of_one_without_smoothing_is_named(tmp_path: Path) -> None:
    """Its scale is the other's, its pre_quant_scale is nowhere."""
    path = quantized_files.write(tmp_path / "q.safetensors", "int8", blocks=BLOCKS)
    graph = quantized(tiny(path, opset=23), path)
    quantize = node(graph, f"{CHOSEN}/input/QuantizeLinear")
    factors = ir.Value(name=f"{CHOSEN}.pre_quant_scale", type=ir.TensorType(ir.DataType.FLOAT))
    graph.model.graph.initializers[str(factors.name)] = factors
    smoothed = ir.node("Mul", [quantize.inputs[0], factors])
    graph.model.graph.insert_before(quantize, smoothed)
    quantize.replace_input_with(0, smoothed.outputs[0])
    assert covered(graph).missing == {
        CHOSEN: f"its activations are smoothed by {CHOSEN}.pre_quant_scale, its weight is not"
    }


def edit_blocks(graph: Quantized, part: str) -> None:
    """Of nvfp4: scales that are another layer's."""
    quantizer = f"{CHOSEN}/input/TRT_FP4DynamicQuantize"
    if part == "codes":
        other = node(graph, f"{OTHER}/input/TRT_FP4DynamicQuantize").outputs[1]
        node(graph, f"{CHOSEN}/input/DequantizeLinear").replace_input_with(0, other)
    elif part == "unit":
        other = initializer(graph, f"{OTHER}.input_scale")
        node(graph, quantizer).replace_input_with(1, other)
    else:
        other = initializer(graph, f"{OTHER}.weight_scale_2")
        node(graph, f"{CHOSEN}/weight_scale/DequantizeLinear").replace_input_with(1, other)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("codes", "its activations' scales are not those that their codes were made with"),
        ("unit", f"its input_scale is {OTHER}.input_scale, but its DequantizeLinear has {CHOSEN}"),
        ("weight", f"its weight_scale_2 is {OTHER}.weight_scale_2"),
    ],
)
def test_edited_scales_of_four_bit_blocks_are_named(tmp_path: Path, part: str, said: str) -> None:
    graph = made(tmp_path, "nvfp4")
    edit_blocks(graph, part)
    missing = covered(graph).missing
    assert list(missing) == [CHOSEN]
    assert missing[CHOSEN].startswith(said)


def test_a_plain_cast_has_no_scale(tmp_path: Path) -> None:
    graph = made(tmp_path, "fp8-cast")
    two = constant(graph, 2, ir.DataType.FLOAT)
    node(graph, f"{CHOSEN}/DequantizeLinear").replace_input_with(1, two)
    assert covered(graph).missing == {CHOSEN: "its weight's scale is [2.0], wanted 1"}


def take_real_scale_of_another(folder: Path) -> None:
    """In a stage of bfloat16 each scale is cast first."""
    graph = onnx.load(folder / "transformer.onnx", load_external_data=False)
    (cast,) = (n for n in graph.graph.node if list(n.input) == [f"{CHOSEN}.input_scale"])
    assert cast.op_type == "Cast"
    cast.input[0] = f"{OTHER}.input_scale"
    (folder / "transformer.onnx").write_bytes(graph.SerializeToString())
    text = (folder / bundle.MANIFEST).read_text(encoding="utf-8")
    bundle.seal(folder, bundle.Manifest.model_validate_json(text))


def test_a_bundle_with_the_real_scale_of_another_layer_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = dict.fromkeys(quantization_layers(), 6.0) | {CHOSEN: 7.0}
    path = quantized_files.write(
        tmp_path / "q.safetensors", "fp8", amax=limits, dtype=torch.bfloat16
    )
    out = tmp_path / "bundle"
    assert cli.main(["onnx", str(path), "--stages", "transformer", "--out", str(out)]) == 0
    take_real_scale_of_another(out)
    capsys.readouterr()
    options = ["--original", str(quantized_files.TINY), "--bundle", str(out)]
    words = ["--text-encoder", str(quantized_files.TINY.parent / "text_encoder"), "--prompt", "a"]
    config = Path(__file__).parents[2] / "tools/tiny/ltx-tiny.yaml"
    size = ["--shape", "64x64x9", "--steps", "2", "--pipeline-config", str(config)]
    assert cli.main(["verify", str(path), *options, *words, *size]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "Q/DQ coverage 59 of 60 layers (fp8)" in said
    assert f"{CHOSEN}: its input_scale is {OTHER}.input_scale, of a layer that reads others" in said
