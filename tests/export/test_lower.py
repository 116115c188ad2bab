"""What is written out for opset 20 computes what ONNX defines the newer operator to compute."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from ltx_export import lower
from ltx_export.element_types import settle
from tests.export.by_hand import Array, computed, evaluated, parsed

TOLERANCE = 3e-6
"""Of the largest value."""

MIXED = "Attention<q_num_heads = 4, kv_num_heads = 4, scale = 0.375>"
PLAIN = f"""g (float[B,T,24] q, float[B,S,24] k, float[B,S,24] v) => (float[B,T,24] y)
{{ ["a.attn/Attention"] y = {MIXED}(q, k, v) }}"""
MASKED = f"""g (float[B,T,24] q, float[B,S,24] k, float[B,S,24] v, float[B,1,1,S] mask)
=> (float[B,T,24] y) {{ ["a.attn/Attention"] y = {MIXED}(q, k, v, mask) }}"""
RMS_NORM = """g (float[B,T,8] x, float[8] w) => (float[B,T,8] y)
{ ["norm"] y = RMSNormalization<axis = -1, epsilon = 0.01, stash_type = 1>(x, w) }"""
GROUP_NORM = """g (float[N,C,D1,D2,D3] x, float[12] w, float[12] b) => (float[N,C,D1,D2,D3] y)
{ ["norm"] y = GroupNormalization<num_groups = 3, epsilon = 0.01>(x, w, b) }"""


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def agree(text: str, feeds: dict[str, Array]) -> ir.Model:
    """The lowered graph, after a look that it computes the same, by definition and in practice."""
    wanted = evaluated(parsed(text), feeds)
    graph = parsed(text)
    assert lower.lower(graph) == 1
    assert graph.graph.opset_imports[""] == 20
    for found in (evaluated(graph, feeds), computed(graph, feeds)):
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    return graph


@pytest.mark.parametrize(("batch", "tokens", "words"), [(1, 1, 1), (2, 5, 5), (3, 4, 7)])
def test_attention_without_a_mask(batch: int, tokens: int, words: int) -> None:
    feeds = {"q": numbers(1, batch, tokens, 24), "k": numbers(2, batch, words, 24)}
    agree(PLAIN, feeds | {"v": numbers(3, batch, words, 24)})


@pytest.mark.parametrize(("batch", "tokens", "words"), [(1, 3, 2), (2, 5, 5), (3, 1, 7)])
def test_attention_with_a_mask(batch: int, tokens: int, words: int) -> None:
    mask = np.zeros((batch, 1, 1, words), np.float32)
    mask[-1, ..., 1:] = np.finfo(np.float32).min
    feeds = {"q": numbers(1, batch, tokens, 24), "k": numbers(2, batch, words, 24)}
    feeds |= {"v": numbers(3, batch, words, 24), "mask": mask}
    agree(MASKED, feeds)
    without = evaluated(parsed(PLAIN), {name: feeds[name] for name in "qkv"})
    assert np.abs(without - evaluated(parsed(MASKED), feeds)).max() > 0.01, "nothing was masked"


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 7)])
def test_rms_normalization(shape: tuple[int, int]) -> None:
    agree(RMS_NORM, {"x": 5 * numbers(4, *shape, 8), "w": numbers(5, 8)})


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 3, 1, 2), (3, 2, 4, 1)])
def test_group_normalization(shape: tuple[int, ...]) -> None:
    x = 3 + numbers(6, shape[0], 12, *shape[1:])
    agree(GROUP_NORM, {"x": x, "w": numbers(7, 12), "b": numbers(8, 12)})


def test_a_norm_of_half_precision_is_computed_in_float32_and_rounded_before_the_scale() -> None:
    graph = parsed(RMS_NORM.replace("float[", "double["))
    settle(graph, "float16")
    lower.lower(graph)
    x, w = (20 * numbers(9, 3, 5, 8)).astype(np.float16), numbers(10, 8).astype(np.float16)
    wide = x.astype(np.float32)
    normed = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(0.01))
    wanted = normed.astype(np.float16) * w
    assert np.array_equal(evaluated(graph, {"x": x, "w": w}), wanted)
    fused = computed(graph, {"x": x, "w": w})  # ONNX Runtime rounds once, behind the scale
    assert fused.dtype == np.float16
    assert np.abs(fused - wanted).max() <= np.abs(wanted).max() * 2**-10


def test_a_norm_of_float32_has_no_casts() -> None:
    graph = parsed(RMS_NORM)
    lower.lower(graph)
    assert "Cast" not in {node.op_type for node in graph.graph}


def test_what_is_written_out_is_named_after_the_node_and_its_output_keeps_its_name() -> None:
    graph = parsed(PLAIN)
    lower.lower(graph)
    assert all(str(node.name).startswith("a.attn/Attention/") for node in graph.graph)
    assert graph.graph.outputs[0].name == "y"
    assert Counter(node.op_type for node in graph.graph) == Counter(
        {"Reshape": 4, "Transpose": 4, "MatMul": 2, "Mul": 1, "Softmax": 1}
    )


def test_constants_are_made_once_for_all_nodes() -> None:
    text = f"""g (float[B,T,24] x) => (float[B,T,24] z) <float[B,T,24] y>
    {{ ["a"] y = {MIXED}(x, x, x)  ["b"] z = {MIXED}(y, y, y) }}"""
    graph = parsed(text)
    assert lower.lower(graph) == 2
    values = [v.const_value for v in graph.graph.initializers.values()]
    texts = [(v.dtype, tuple(v.shape), v.tobytes()) for v in values if v is not None]
    assert len(texts) == len(set(texts)) == 3
    assert lower.lower(graph) == 0


@pytest.mark.parametrize(
    ("text", "old", "new", "said"),
    [
        (PLAIN, "q_num_heads = 4, kv_num_heads = 4, ", "", "does not split its heads by itself"),
        (RMS_NORM, "axis = -1", "axis = 1", "does not normalise its last axis"),
    ],
)
def test_another_form_is_our_mistake(text: str, old: str, new: str, said: str) -> None:
    assert old in text
    with pytest.raises(AssertionError, match=said):
        lower.lower(parsed(text.replace(old, new)))
