"""What the builder's own table says of an engine, and what of it is not as the recipe."""

from dataclasses import replace
from pathlib import Path

import pytest

from ltx_engines.errors import UserError
from ltx_export import layer_table
from ltx_export.layer_table import Layer, Operand, Wanted

# As TensorRT-RTX 1.7.1 prints it, shortened.
LOG = """Engine generation completed in 1.2 seconds.
Layers:
Name: fc_myl0_1, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [-1,128,64], Strides: [8192,64,\
1], StrideOrder: [2,1,0], Datatype: FP8, Format: (Arbitrary) Format with stride order = [1,2,0] }, \
{ Name: s, Dimensions: [1,1,1], Strides: [1], Datatype: Float, Format: x }], Constants: [ { Name: w\
, Dimensions: [1,64,64], Strides: [64], Datatype: FP8, Format: x }], Outputs: [ { Name: b, Dimensio\
ns: [-1,128,64], Strides: [1], Datatype: BFloat16, Format: x }], TacticName: t, StreamId: 0, Metada\
ta: [ONNX Layer: blocks.0.to_q/MatMul][ONNX Layer: blocks.0.to_k/MatMul]
Name: _gemm_mha_v2_myl0_2, LayerType: kgen, Inputs: [ { Name: b, Dimensions: [4,128,16], Strides: [\
1], Datatype: BFloat16, Format: x }], Constants: [], Outputs: [ { Name: c, Dimensions: [4,128,16],\
 Strides: [1], Datatype: BFloat16, Format: x }], TacticName: m, StreamId: 0, Metadata: [ONNX Layer:\
 blocks.0/Attention]
Name: wait_3, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0
"""
TABLE = tuple(layer_table.layers(LOG))
GEMM, ATTENTION, WAIT = TABLE
WANTED = Wanted(1, {"blocks.0.to_q": "fp8", "blocks.0.to_k": "fp8"}, 1, frozenset({128}))
SCORES = Layer("s", "kgen", (), (), (Operand("p", (4, 128, 128), "BFloat16"),), frozenset())


def test_the_log_is_read_to_the_letter() -> None:
    assert (GEMM.name, GEMM.kind) == ("fc_myl0_1", "gemm")
    assert GEMM.inputs == (Operand("a", (-1, 128, 64), "FP8"), Operand("s", (1, 1, 1), "Float"))
    assert GEMM.constants == (Operand("w", (1, 64, 64), "FP8"),)
    assert GEMM.outputs == (Operand("b", (-1, 128, 64), "BFloat16"),)
    assert GEMM.nodes == {"blocks.0.to_q/MatMul", "blocks.0.to_k/MatMul"}
    assert Layer("wait_3", "wait", (), (), (), frozenset()) == WAIT


def test_a_line_of_the_log_is_known_as_a_table_by_its_layers() -> None:
    assert layer_table.is_table(LOG)
    assert not layer_table.is_table("Layer: {ForeignNode[...]} Host Persistent: 80 bytes")


def test_a_kernel_that_multiplies_for_two_layers_counts_for_both() -> None:
    """And a row by which streams wait is none."""
    counts = layer_table.counts(TABLE, WANTED)
    assert counts == {
        **{"kernels": 2, "products in FP8": 2},
        **{"fused attentions": 1, "score kernels": 0},
    }


@pytest.mark.parametrize("targets", [(89, 120), (120, 89)])
def test_of_an_engine_for_several_gpus_it_is_said_whose_kernels_are_counted(
    targets: tuple[int, int],
) -> None:
    assert layer_table.listed(targets) == 120
    assert layer_table.of_one(targets) == " (listed for SM120 only)"
    assert layer_table.of_one(targets[:1]) == ""


def test_an_engine_as_the_recipe_says_has_no_problems() -> None:
    assert layer_table.problems(TABLE, WANTED) == []


@pytest.mark.parametrize("dtypes", [("BFloat16", "FP8"), ("FP8", "BFloat16"), ("Half", "Half")])
def test_a_product_of_other_numbers_is_not_one_of_codes(dtypes: tuple[str, str]) -> None:
    left, right = dtypes
    other = replace(
        GEMM,
        inputs=(replace(GEMM.inputs[0], dtype=left),),
        constants=(replace(GEMM.constants[0], dtype=right),),
    )
    (problem,) = layer_table.problems((other, ATTENTION), WANTED)
    assert problem.startswith("2 of 2 layers are not products of fp8 in each profile (blocks.0.to_")


def test_every_profile_has_kernels_of_its_own_that_are_asked_for() -> None:
    twice = replace(WANTED, profiles=2)
    assert len(layer_table.problems(TABLE, twice)) == 2
    assert layer_table.problems(TABLE + TABLE, twice) == []


def test_codes_of_another_format_are_not_those_of_the_recipe() -> None:
    wanted = replace(WANTED, products={"blocks.0.to_q": "int8", "blocks.0.to_k": "fp8"})
    (problem,) = layer_table.problems(TABLE, wanted)
    assert "1 of 1 layers are not products of int8" in problem


def test_an_attention_in_pieces_is_found_by_what_is_missing_and_by_its_scores() -> None:
    problems = layer_table.problems((GEMM, SCORES), WANTED)
    assert problems[0] == "0 of 1 attentions are one kernel"
    assert problems[1].startswith("1 kernels write the score of each query and key to memory (s)")


def test_a_table_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "x.layers.json"
    file.write_text(layer_table.to_json(TABLE), encoding="utf-8")
    assert layer_table.read(file) == TABLE


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format_version": 1, "layers": [{}]}', '{"format_version": 2}']
)
def test_another_file_costs_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.layers.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="build the engine again"):
        layer_table.read(file)
