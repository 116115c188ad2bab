"""The builder's table says which products are of codes, and whether an attention is one kernel."""

import pytest

pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")

import quantized_engines
from engine_layers import Built, attentions, quantized, scores
from ltx_export.layer_table import layers

TAIL = "Strides: [1], StrideOrder: [0]"


def operand(name: str, shape: str, dtype: str) -> str:
    where = "Format: (Linear) Row major linear format"
    return f"{{ Name: {name}, Dimensions: [{shape}], {TAIL}, Datatype: {dtype}, {where} }}"


def line(name: str, kind: str, source: str, weight: str, result: str, *nodes: str) -> str:
    said = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {source}], Constants: [ {weight}], "
        f"Outputs: [ {result}], TacticName: stub, StreamId: 0, Metadata: {said}"
    )


def product(kind: str, inputs: str, weights: str) -> str:
    return line(
        "a.q/MatMul+a.k/MatMul_myl0_12",
        kind,
        operand("x", "1,64,8", inputs),
        operand("w", "1,8,16", weights),
        operand("y", "1,64,16", "BFloat16"),
        "a.q/MatMul",
        "a.k/MatMul",
        "a.q/input/QuantizeLinear",
    )


def built(*texts: str) -> Built:
    return Built(1, tuple(layers("Layers:\n" + "\n".join(texts))))


def test_a_merged_product_of_codes_is_that_of_each_of_its_layers() -> None:
    (found,) = built(product("gemm", "Int8", "Int8")).layers
    assert [(o.name, o.shape, o.dtype) for o in found.inputs] == [("x", (1, 64, 8), "Int8")]
    assert [(o.name, o.shape, o.dtype) for o in found.constants] == [("w", (1, 8, 16), "Int8")]
    assert found.nodes == {"a.q/MatMul", "a.k/MatMul", "a.q/input/QuantizeLinear"}
    table = built(product("gemm", "Int8", "Int8"))
    assert [quantized(table, path) for path in ("a.q", "a.k", "a.v")] == ["Int8", "Int8", None]


@pytest.mark.parametrize(
    "text",
    [
        product("gemm", "BFloat16", "BFloat16"),
        product("gemm", "BFloat16", "Int8"),
        product("runtime_fusion", "Int8", "Int8"),
    ],
)
def test_a_product_in_16_bits_or_inside_another_kernel_is_none(text: str) -> None:
    assert quantized(built(text), "a.q") is None


def attention(name: str, result: str) -> str:
    parts = operand("q", "1,64,8", "BFloat16"), "", operand("y", result, "BFloat16")
    return line(name, "kgen", *parts, "a/Attention")


def test_scores_in_memory_are_seen() -> None:
    fused = built(attention("_gemm_mha_v2_myl0_24", "1,64,8"))
    assert (attentions(fused), scores(fused, 64)) == (1, [])
    split = built(attention("__myl_Softmax_myl0_3", "1,4,64,64"))
    assert (attentions(split), scores(split, 64)) == (0, ["__myl_Softmax_myl0_3"])


def test_an_engine_that_is_too_large_or_not_quantized_misses_the_aim() -> None:
    def row(engine: int, products: int = 10, attentions: int = 2) -> dict[str, object]:
        kinds = {"FP8": products} if products else {}
        return {
            "engine": engine,
            "products": kinds,
            "attentions": attentions,
            "score_kernels": 0,
        }

    rows = {"bf16 SM89": row(100, 0), "fp8 SM89": row(60)}
    assert quantized_engines.judged(rows, 1) == {
        "shares": {"bf16 SM89": 1.0, "fp8 SM89": 0.6},
        "met": {"bf16 SM89": True, "fp8 SM89": True},
    }
    for spoilt in (row(66), row(60, products=9), row(60, attentions=1), {"failed": "no"}):
        found = quantized_engines.judged(rows | {"fp8 SM89": spoilt}, 1)
        assert found["met"] == {"bf16 SM89": True, "fp8 SM89": False}
