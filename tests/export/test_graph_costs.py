"""Costs against ONNX Runtime, against torch's own counter, and against graphs counted by hand."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ltx_trt
from ltx_export import graph_costs
from ltx_export.concrete_shapes import Array, name_of, walk
from ltx_export.graph_costs import Costs, cost
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video.config import read_config
from ltx_ref.ltx_video.model import LTXVideo

TINY = Path(ltx_trt.__file__).parent / "ltx_tiny"
STAGES = ("text_encoder", "transformer", "vae_encoder", "vae_decoder")
SIZES = (
    {"batch": 1, "tokens": 12, "timesteps": 1, "text": 5}
    | {"latent_frames": 1, "latent_height": 2, "latent_width": 3}
    | {"frames": 1, "height": 64, "width": 96},
    {"batch": 2, "tokens": 20, "timesteps": 20, "text": 9}
    | {"latent_frames": 2, "latent_height": 3, "latent_width": 2}
    | {"frames": 9, "height": 96, "width": 64},
)
NUMBERS = {ir.DataType.FLOAT: np.float32, ir.DataType.INT64: np.int64}


def infer(model: ir.Model, axes: dict[str, int]) -> dict[str, Array]:
    return {name_of(value): array for value, array in walk(model, axes).arrays.items()}


def run_everything(stage: str, axes: dict[str, int], folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a stage of the shipped bundle, as ONNX Runtime computes it."""
    model = onnx.load(TINY / f"{stage}.onnx", load_external_data=False)
    inner = [name for node in model.graph.node for name in node.output]
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in inner if name not in outputs
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    path = folder / f"{stage}.onnx"
    onnx.save(model, path)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {}
    for value in ir.load(TINY / f"{stage}.onnx").graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [axis if isinstance(axis, int) else axes[str(axis.value)] for axis in value.shape]
        feeds[str(value.name)] = random.random(shape).astype(NUMBERS[value.dtype])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.fixture(scope="module")
def writable_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copy(TINY / "ltx-tiny.safetensors", folder)
    shutil.copytree(TINY / "text_encoder", folder / "text_encoder")
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_every_shape_and_type_is_the_one_that_onnx_runtime_finds(
    stage: str, writable_tiny: Path
) -> None:
    model = ir.load(TINY / f"{stage}.onnx")
    for axes in SIZES:
        found = infer(model, axes)
        wanted = run_everything(stage, axes, writable_tiny)
        assert len(wanted) >= len(model.graph)
        for name, value in wanted.items():
            assert found[name].shape == value.shape, name
            assert found[name].dtype == ir.DataType.from_numpy(value.dtype), name


def test_flops_are_those_that_torch_counts_in_the_reference() -> None:
    header = read_header(TINY / "ltx-tiny.safetensors")
    config = read_config(header)
    for axes in SIZES:
        batch, tokens, text = axes["batch"], axes["tokens"], axes["text"]
        with torch.device("meta"):
            model = LTXVideo(config).model.diffusion_model
            latents = torch.empty(batch, tokens, config.transformer.in_channels)
            coords = torch.empty(batch, 3, tokens)
            timestep = torch.empty(batch, axes["timesteps"])
            prompt = torch.empty(batch, text, config.transformer.caption_channels)
            mask = torch.empty(batch, text)
            skipped = torch.empty(config.transformer.num_layers, batch)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(latents, coords, timestep, prompt, mask, skipped, stg_mode="attention_values")
        found = cost(ir.load(TINY / "transformer.onnx"), axes)
        assert found.flops == counter.get_total_flops()


def graph(text: str, opset: int = 23) -> ir.Model:
    """A model from the text of ONNX's parser; initializers keep their names only."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "local" : 1]>\n'
    return ir.from_proto(onnx.parser.parse_model(header + text))


def weightless(model: ir.Model, **shapes: Sequence[int]) -> ir.Model:
    """Add weights that have a shape and a type, and no bytes."""
    for name, shape in shapes.items():
        value = next(v for node in model.graph for v in node.inputs if v and v.name == name)
        weight = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        ir.convenience.replace_all_uses_with(value, weight)
        model.graph.initializers[name] = weight
    return model


def counted(text: str, axes: dict[str, int], **shapes: Sequence[int]) -> Costs:
    return cost(weightless(graph(text), **shapes), axes)


MLP = """
mlp (float[n, 8] x) => (float[n, 8] y) {
    a = MatMul(x, w1)
    b = Add(a, b1)
    c = Gelu(b)
    d = MatMul(c, w2)
    y = Add(x, d)
}
"""


def test_a_product_with_its_bias_and_activation_is_one_kernel() -> None:
    found = counted(MLP, {"n": 5}, w1=(8, 32), b1=(32,), w2=(32, 8))
    assert [(k.heavy, k.weights) for k in found.kernels] == [
        ("MatMul", ("w1", "b1")),
        ("MatMul", ("w2",)),
    ]
    assert found.flops == 2 * (2 * 5 * 8 * 32)
    assert found.activations == 5 * 32 * 4  # c: a and b are inside a kernel, x and y the caller's
    assert found.io == 2 * 5 * 8 * 4
    assert {name: array.bytes for name, array in found.weights.items()} == {
        **{"w1": 8 * 32 * 4, "b1": 32 * 4, "w2": 32 * 8 * 4}
    }
    assert [k.traffic for k in found.kernels] == [(40 + 160) * 4, (160 + 40 + 40) * 4]


def test_everything_but_the_weights_is_proportional_to_the_free_axis() -> None:
    weights = {"w1": (8, 32), "b1": (32,), "w2": (32, 8)}
    one, many = counted(MLP, {"n": 1}, **weights), counted(MLP, {"n": 1000}, **weights)
    assert many.flops == 1000 * one.flops
    assert many.activations == 1000 * one.activations
    assert many.io == 1000 * one.io
    assert many.weights == one.weights


def test_a_chain_of_elementwise_nodes_takes_no_memory() -> None:
    found = counted(
        "chain (float[n] x) => (float[n] y) { a = Exp(x) b = Sin(a) c = Mul(b, x) y = Neg(c) }",
        {"n": 100},
    )
    assert len(found.kernels) == 1
    assert found.activations == 0
    assert found.kernels[0].traffic == 2 * 100 * 4


def test_what_is_read_twice_is_kept_until_the_second_reader() -> None:
    """The residual r outlives three products; a and b are never there together."""
    text = """
    residual (float[n, 4] x) => (float[n, 4] y) {
        r = MatMul(x, w)  a = MatMul(r, w)  b = MatMul(a, w)  c = MatMul(b, w)
        d = MatMul(c, w)  y = Add(d, r)
    }
    """
    found = counted(text, {"n": 6}, w=(4, 4))
    assert found.activations == 3 * 6 * 4 * 4


def test_what_is_given_out_on_the_way_keeps_nothing_in_memory_until_the_end() -> None:
    """A piece of a and of b leaves where they are read, not when all is done."""
    text = """
    kept (float[n, 4] x) => (float[n, 4] y, float[2, 4] first, float[2, 4] second) {
        a = MatMul(x, w)  b = MatMul(a, w)  c = MatMul(b, w)  y = MatMul(c, w)
        rows = Constant<value = int64[2] {0, 1}>()
        first = Gather<axis = 0>(a, rows)  second = Gather<axis = 0>(b, rows)
    }
    """
    found = counted(text, {"n": 6}, w=(4, 4))
    assert found.activations == 2 * 6 * 4 * 4


def test_branches_run_side_by_side() -> None:
    """Both long branches are under way at once, however the file orders their nodes."""
    first = "a = MatMul(x, w)  b = MatMul(a, w)"
    second = "c = MatMul(x, w)  d = MatMul(c, w)"
    for nodes in (first + second, second + first):
        text = f"streams (float[n, 4] x) => (float[n, 4] y) {{ {nodes} y = MatMul(b, d) }}"
        found = counted(text, {"n": 4}, w=(4, 4))
        assert found.activations == 4 * 4 * 4 * 4


def test_a_reshape_is_another_name_and_not_another_tensor() -> None:
    text = """
    views (float[n, 8] x) => (float[n, 8] y) {
        shape = Constant<value = int64[3] {0, 4, 2}>()
        back = Constant<value = int64[2] {0, 8}>()
        a = MatMul(x, w)
        b = Reshape(a, shape)
        c = Transpose<perm = [0, 2, 1]>(b)
        d = Reshape(c, back)
        y = MatMul(d, w)
    }
    """
    found = counted(text, {"n": 3}, w=(8, 8))
    assert found.activations == 2 * 3 * 8 * 4  # a with b, c with d


def test_scores_are_in_memory_only_when_attention_is_not_one_node() -> None:
    axes = {"n": 64}
    shape = "float[1, 2, n, 8]"
    fused = counted(
        f"f ({shape} q, {shape} k, {shape} v) => ({shape} y) {{ y = Attention(q,k,v) }}", axes
    )
    apart = counted(
        f"""
        a ({shape} q, {shape} k, {shape} v) => ({shape} y) {{
            t = Transpose<perm = [0, 1, 3, 2]>(k)
            s = MatMul(q, t)
            p = Softmax<axis = -1>(s)
            y = MatMul(p, v)
        }}
        """,
        axes,
    )
    assert fused.flops == apart.flops == 2 * (2 * 2 * 64 * 64 * 8)
    assert fused.activations == 0
    assert apart.activations == 2 * (2 * 64 * 64 * 4)
    [attention] = fused.attentions
    assert (attention.head_dim, attention.queries, attention.keys) == (8, 64, 64)


def test_attention_of_three_axes_counts_its_heads() -> None:
    text = """
    f (float[1, n, 32] q, float[1, m, 16] k, float[1, m, 16] v) => (float[1, n, 32] y) {
        y = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)
    }
    """
    found = counted(text, {"n": 6, "m": 10})
    assert found.flops == 2 * 4 * 6 * 10 * (8 + 8)
    assert found.attentions[0].head_dim == 8


def test_a_convolution_counts_its_larger_end() -> None:
    text = """
    conv (float[1, 4, t, h, h] x) => (float[1, 8, t, h, h] y) {
        y = Conv<pads = [1, 1, 1, 1, 1, 1]>(x, w, b)
    }
    """
    found = counted(text, {"t": 3, "h": 10}, w=(8, 4, 3, 3, 3), b=(8,))
    assert [c.elements for c in found.convolutions] == [8 * 3 * 10 * 10]
    assert found.flops == 2 * (8 * 3 * 10 * 10) * (4 * 27)
    huge = counted(text, {"t": 300, "h": 1000}, w=(8, 4, 3, 3, 3), b=(8,))
    assert huge.convolutions[0].elements > graph_costs.INT32_MAX


def test_group_normalization_for_which_onnx_infers_nothing_leaves_shape_and_type() -> None:
    text = """
    norm (float16[n, 4, h] x) => (float16[n, 4, h] y) {
        y = GroupNormalization<num_groups = 2>(x, scale, bias)
    }
    """
    model = weightless(graph(text), scale=(4,), bias=(4,))
    assert infer(model, {"n": 3, "h": 5})["y"] == Array(ir.DataType.FLOAT16, (3, 4, 5))
    [kernel] = cost(model, {"n": 3, "h": 5}).kernels
    assert (kernel.flops, kernel.traffic) == (0, 2 * 3 * 4 * 5 * 2)


def test_what_depends_on_weights_alone_is_no_activation() -> None:
    text = """
    folded (float[n, 8] x) => (float[n, 4] y) {
        t = Transpose<perm = [1, 0]>(w)  h = Cast<to = 1>(t)  y = MatMul(x, h)
    }
    """
    found = counted(text, {"n": 2}, w=(4, 8))
    assert [(k.heavy, k.weights) for k in found.kernels] == [("MatMul", ("w",))]
    assert found.activations == 0


def test_an_axis_without_a_size_is_named() -> None:
    with pytest.raises(ValueError, match="x: axis n has no size among"):
        cost(graph("f (float[n] x) => (float[n] y) { y = Exp(x) }"), {"m": 3})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("f (float[n] x) => (int64[1, m] y) { [look] y = NonZero(x) }", r"look \(NonZero\).*known"),
        ("f (float[n] x) => (float[n] y) { [odd] y = Oddity(x) }", r"odd \(Oddity\).*No schema"),
        (
            'f (float[n, 2] x) => (float[n] y) { [sum] y = Einsum<equation = "ab->a">(x) }',
            r"sum \(Einsum\): no formula",
        ),
        ("f (float[n, 3] x) => (float[2] y) { [bad] y = MatMul(x, x) }", r"bad \(MatMul\)"),
        ("f (float[n] x) => (float[7] y) { y = Exp(x) }", r"output y comes out as \[4\], .*7"),
        ("f (float[n] x) => (float[n, 1] y) { y = Exp(x) }", r"output y comes out as \[4\]"),
        (
            """f (float[n] x) => (float[n] y) { y = local.g(x) }
            <domain: "local", opset_import: ["" : 23]> g (x) => (y) { y = Exp(x) }""",
            "functions were not inlined: 1",
        ),
        (
            """f (float[n] x) => (float[n] y) {
                c = Constant<value = bool {1}>()
                [branch] y = If<then_branch = g () => (float[n] a) { a = Exp(x) },
                    else_branch = h () => (float[n] b) { b = Sin(x) }>(c)
            }""",
            r"branch \(If\): what it costs depends",
        ),
    ],
)
def test_what_cannot_be_known_stops_with_the_nodes_name(text: str, wanted: str) -> None:
    with pytest.raises(AssertionError, match=wanted):
        cost(graph(text), {"n": 4})
