"""Which graphs each provider of ONNX Runtime computes."""

from typing import Any

import pytest

from ltx_engines import providers
from ltx_engines.bundle import QuantizationEntry, StageEntry, TensorEntry


def stage(dtype: str, opset: int = 20, domain: str = "", **layers: int) -> StageEntry:
    counts = {form.replace("_", "-"): count for form, count in layers.items()}
    quantized: dict[str, Any] = {"recipe": None, "layers": counts}
    row = TensorEntry(name="x", dtype=dtype, axes=(1,))
    return StageEntry(
        file="transformer.onnx",
        inputs=(row,),
        outputs=(row,),
        opset=opset,
        domains=(domain,) if domain else (),
        quantization=QuantizationEntry.model_validate(quantized) if layers else None,
    )


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        (stage("float32"), "cpu cuda tensorrt-rtx"),
        (stage("float16"), "cpu cuda tensorrt-rtx"),
        (stage("bfloat16", 23), "tensorrt-rtx"),
        (stage("bfloat16", 20), "tensorrt-rtx"),
        (stage("float16", 23), "tensorrt-rtx"),
        (stage("float32", 23), ""),
        (stage("float32", int8=4), "cpu"),
        (stage("float16", fp8=4), "cpu"),
        (stage("bfloat16", 23, fp8=4), "tensorrt-rtx"),
        (stage("float16", 21, int8_wo=4), "cpu cuda"),
        (stage("bfloat16", 23, nvfp4=4), "tensorrt-rtx"),
        (stage("float32", domain="com.microsoft"), "cpu cuda tensorrt-rtx"),
        (stage("float16", domain="com.microsoft"), "cuda tensorrt-rtx"),
        (stage("float32", domain="com.microsoft", int8=4), "cpu"),
    ],
)
def test_a_graph_is_for_those_that_have_kernels_for_all_of_it(
    entry: StageEntry, wanted: str
) -> None:
    assert providers.possible("transformer", entry) == tuple(wanted.split())


def test_only_attention_depends_on_the_opset() -> None:
    assert "cuda" in providers.possible("vae_decoder", stage("float16", 23))


@pytest.mark.parametrize(
    ("provider", "entry", "words"),
    [
        ("cuda", stage("bfloat16", 23), "--precision float16"),
        ("cuda", stage("float16", 23), "--opset 20"),
        ("cuda", stage("float16", fp8=1), "is fp8, whose products"),
        ("cpu", stage("float16", nvfp4=1), "--recipe int8"),
        ("tensorrt-rtx", stage("float32", int8=1), "--opset 23"),
        ("tensorrt-rtx", stage("float32", 23), "--precision bfloat16"),
    ],
)
def test_a_refusal_says_what_to_do(
    provider: providers.Provider, entry: StageEntry, words: str
) -> None:
    reason = providers.refusal(provider, "transformer", entry)
    assert reason is not None
    assert reason.startswith("stage transformer is ")
    assert words in reason
