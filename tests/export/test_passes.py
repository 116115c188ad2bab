"""Each pass on a graph made by hand, and the runner on a pass that cheats."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from ltx_export import passes
from ltx_export.element_types import settle
from tests.export.by_hand import computed, evaluated, fill, parsed

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=FLOAT)


def constant(name: str, *numbers: int) -> ir.Value:
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    return ir.Value(
        name=name,
        shape=ir.Shape([len(numbers)]),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )


def model(nodes: list[ir.Node], inputs: list[ir.Value], constants: list[ir.Value]) -> ir.Model:
    output = nodes[-1].outputs[0]
    graph = ir.Graph(
        inputs,
        [output],
        nodes=nodes,
        initializers=constants,
        name="by_hand",
        opset_imports={"": 20},
    )
    return ir.Model(graph, ir_version=10)


def sliced() -> ir.Model:
    """Everything after the first of x, with an end of 64 bits."""
    x = value("x", "n")
    bounds = [constant("start", 1), constant("end", 2**63 - 1), constant("axis", 0)]
    node = ir.Node("", "Slice", [x, *bounds], name="cut")
    node.outputs[0].name, node.outputs[0].type = "y", FLOAT
    return model([node], [x], bounds)


def test_slices_end_within_32_bits() -> None:
    graph = sliced()
    assert passes.shorten_slices(graph) == 1
    tensor = graph.graph.initializers["end"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [2**31 - 1]
    assert passes.shorten_slices(graph) == 0


def test_a_large_number_that_is_no_bound_stays() -> None:
    x, large = value("x", "n"), constant("large", 2**40)
    node = ir.Node("", "Add", [x, large], name="add")
    node.outputs[0].name, node.outputs[0].type = "y", FLOAT
    assert passes.shorten_slices(model([node], [x], [large])) == 0


def test_equal_constants_become_one() -> None:
    x = value("x", "n")
    a, b, c = constant("a", 1), constant("b", 1), constant("c", 2)
    first = ir.Node("", "Slice", [x, a, c])
    second = ir.Node("", "Slice", [first.outputs[0], b, c])
    second.outputs[0].name, second.outputs[0].type = "y", FLOAT
    graph = model([first, second], [x], [a, b, c])
    passes.run(graph, [passes.lift_constants])
    assert set(graph.graph.initializers) == {"a", "c"}
    assert second.inputs[1] is a


def test_names_and_metadata_come_from_the_model_and_not_from_the_machine() -> None:
    graph = sliced()
    node = graph.graph[0]
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'vae', 'vae.decoder', 'slice_1']"
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/me/secret.py"
    node.doc_string = "mine"
    passes.run(graph, [passes.name_nodes, passes.name_constants, passes.strip_metadata])
    assert node.name == "vae.decoder/Slice"
    assert set(graph.graph.initializers) == {"constant_0", "constant_1", "constant_2"}
    assert not node.metadata_props
    assert not node.doc_string
    assert passes.strip_metadata(graph) == 0


def test_a_pass_that_renames_an_input_is_caught() -> None:
    def cheat(graph: ir.Model) -> int:
        graph.graph.inputs[0].name = "mine"
        return 1

    with pytest.raises(AssertionError, match="cheat changed the graph's inputs or outputs"):
        passes.run(sliced(), [cheat])


def test_an_epsilon_of_1e_8_is_no_zero() -> None:
    graph = parsed(
        """g (float[N] x) => (float[N] y)
        <float small = {0.00000001}> { sum = Add(x, small)  y = Sqrt(sum) }"""
    )
    passes.simplify(graph)
    assert [node.op_type for node in graph.graph] == ["Add", "Sqrt"]


def test_what_no_input_decides_is_computed_and_large_tables_are_not_written_down() -> None:
    graph = parsed(
        """g (float[N] x) => (float[N] y)
        <float[2] pair = {1, 2}, int64[1] many = {5000}>
        {
            sum = ReduceSum<keepdims = 0>(pair)
            ones = ConstantOfShape(many)
            all = ReduceSum<keepdims = 0>(ones)
            both = Add(sum, all)
            y = Mul(x, both)
        }"""
    )
    assert passes.fold_constants(graph) > 0
    assert max(n.op_type == "ConstantOfShape" for n in graph.graph), "5000 numbers were folded"
    assert np.array_equal(evaluated(graph, {"x": np.ones(2, np.float32)}), np.full(2, 3.0))


RMS_NORM = """g (double[B,T,8] x) => (double[B,T,8] y)
<double[8] w, float two = {2}, int64[1] last = {-1}, float small = {0.001}>
{
    wide = Cast<to = 1>(x)
    square = Pow(wide, two)
    mean = ReduceMean(square, last)
    total = Add(mean, small)
    root = Sqrt(total)
    inverse = Reciprocal(root)
    CENTRE
}"""
WIDE = "long = Mul(wide, inverse)  normed = Cast<to = 11>(long)"
NARROW = "own = Cast<to = 11>(inverse)  normed = Mul(x, own)"


def norm(centre: str) -> ir.Model:
    """In float64, with the shapes and types that a trace has."""
    graph = parsed(RMS_NORM.replace("CENTRE", centre), weights=["w"])
    for node in graph.graph:
        own = node.outputs[0].name in {"normed", "own", "y"}
        node.outputs[0].dtype = ir.DataType.DOUBLE if own else ir.DataType.FLOAT
    return graph


@pytest.mark.parametrize("centre", [WIDE, NARROW], ids=["the model's", "T5's"])
def test_a_norm_spelled_out_becomes_one_node_that_computes_the_same(centre: str) -> None:
    graph = norm(f"{centre}  y = Mul(normed, w)")
    assert passes.fuse_rms_norms(graph) == 1
    passes.remove_unused(graph)
    (node,) = graph.graph
    assert node.op_type == "RMSNormalization"
    assert node.inputs[1] is graph.graph.initializers["w"]
    assert node.attributes["epsilon"].as_float() == pytest.approx(0.001)
    x, w = np.random.default_rng(0).normal(size=(2, 3, 8)), np.arange(8.0)
    wanted = x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.001) * w
    settle(graph, "float32")
    found = evaluated(fill(graph, {"w": w}), {"x": x.astype(np.float32)})
    assert np.allclose(found, wanted, rtol=1e-5)


def test_a_norm_without_a_scale_gets_ones() -> None:
    graph = norm(f"{WIDE}  y = Relu(normed)")
    assert passes.fuse_rms_norms(graph) == 1
    passes.remove_unused(graph)
    assert [node.op_type for node in graph.graph] == ["RMSNormalization", "Relu"]
    ones = graph.graph.initializers["ones_8"]
    assert ones.dtype == ir.DataType.DOUBLE
    assert ones.const_value is not None
    assert ones.const_value.numpy().tolist() == [1.0] * 8


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("last = {-1}", "last = {1}"),
        ("two = {2}", "two = {3}"),
        ("Reciprocal", "Neg"),
        ("Mul(wide, inverse)", "Mul(root, inverse)"),
        ("wide = Cast<to = 1>", "wide = Abs"),
    ],
)
def test_what_is_not_that_norm_stays(old: str, new: str) -> None:
    text = RMS_NORM.replace("CENTRE", f"{WIDE}  y = Mul(normed, w)")
    assert old in text
    graph = parsed(text.replace(old, new), weights=["w"])
    for node in graph.graph:
        node.outputs[0].dtype = ir.DataType.FLOAT
    assert passes.fuse_rms_norms(graph) == 0


HEADS = """g (float[B,T,24] q, float[B,S,24] k, float[B,S,24] v) => (float[B,T,24] y)
<int64[4] split = {0, 0, 4, 6}, int64[3] flat = {0, 0, 24}>
{
    q4 = Reshape(q, split)  qt = Transpose<perm = [0, 2, 1, 3]>(q4)
    k4 = Reshape(k, split)  kt = Transpose<perm = [0, 2, 1, 3]>(k4)
    v4 = Reshape(v, split)  vt = Transpose<perm = [0, 2, 1, 3]>(v4)
    mixed = Attention(qt, kt, vt)
    merged = Transpose<perm = [0, 2, 1, 3]>(mixed)
    y0 = Reshape(merged, flat)
    y = Relu(y0)
}"""


def attention(text: str = HEADS) -> ir.Model:
    graph = parsed(text)
    shapes: dict[str, list[int | str]] = {
        "qt": ["B", 4, "T", 6],
        "kt": ["B", 4, "S", 6],
        "vt": ["B", 4, "S", 6],
    }
    for node in graph.graph:
        value = node.outputs[0]
        if (name := str(value.name)) in shapes:
            value.shape = ir.Shape(shapes[name])
        elif value.name == "y0":
            value.shape = ir.Shape(["B", "T", 24])
    return graph


def test_attention_splits_and_joins_the_heads_itself() -> None:
    numbers = np.random.default_rng(1).normal(size=(3, 2, 5, 24)).astype(np.float32)
    feeds = dict(zip("qkv", (numbers[0, :, :3], numbers[1], numbers[2]), strict=True))
    before = evaluated(attention(), feeds)
    graph = attention()
    assert passes.join_heads(graph) == 1
    passes.remove_unused(graph)
    assert [node.op_type for node in graph.graph] == ["Attention", "Relu"]
    table = {name: a.value for name, a in graph.graph[0].attributes.items()}
    assert (table["q_num_heads"], table["kv_num_heads"]) == (4, 4)
    assert table["scale"] == pytest.approx(6**-0.5)
    assert np.allclose(evaluated(graph, feeds), before, atol=1e-6)
    assert passes.join_heads(graph) == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("qt = Transpose<perm = [0, 2, 1, 3]>", "qt = Transpose<perm = [0, 2, 3, 1]>"),
        ("y0 = Reshape(merged, flat)", "y0 = Reshape(merged, flat)  other = Relu(merged)"),
        ("k4 = Reshape(k, split)", "k4 = Identity(k)"),
    ],
)
def test_attention_over_other_layouts_stays(old: str, new: str) -> None:
    assert old in HEADS
    assert passes.join_heads(attention(HEADS.replace(old, new))) == 0


def test_attention_whose_values_have_other_heads_stays() -> None:
    graph = attention()
    (value,) = [v for n in graph.graph for v in n.outputs if v.name == "vt"]
    value.shape = ir.Shape(["B", 2, "S", 12])
    assert passes.join_heads(graph) == 0


def reshaped(before: list[int | str], after: list[int | str]) -> ir.Model:
    graph = parsed("g (float[N] x, int64[M] s) => (float[K] y) { z = Reshape(x, s)  y = Relu(z) }")
    graph.graph.inputs[0].shape = ir.Shape(before)
    graph.graph[0].outputs[0].shape = ir.Shape(after)
    return graph


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [
        (["B", "T", 24], ["B", "T", 4, 6], [0, 0, 4, 6]),
        (["B", "T", 4, 6], ["B", "T", 24], [0, 0, 24]),
        (["B", 4, "T", 6], ["4*B", "T*6"], None),
        (["B", 12, "F", "H", "W"], ["B", 12, "F*H*W"], [0, 12, -1]),
        (["B", "T"], ["T", "B"], None),
    ],
)
def test_a_reshape_is_by_a_constant_where_one_axis_at_most_is_open(
    before: list[int | str], after: list[int | str], sizes: list[int] | None
) -> None:
    graph = reshaped(before, after)
    assert passes.settle_reshapes(graph) == (sizes is not None)
    if sizes is not None:
        constant = graph.graph[1].inputs[1]
        assert constant is not None
        tensor = ir.convenience.get_const_tensor(constant)
        assert tensor is not None
        assert tensor.numpy().tolist() == sizes


def test_values_are_named_after_their_nodes_and_borders_keep_their_names() -> None:
    graph = parsed(
        'g (float[4] x) => (float[2] y) { ["a.b/Split"] p, q = Split<num_outputs = 2>(x) '
        '["c/Add"] y = Add(p, q) }'
    )
    passes.name_values(graph)
    assert [v.name for node in graph.graph for v in node.outputs] == [
        *("a.b/Split:0", "a.b/Split:1"),
        "y",
    ]


def test_a_node_that_folding_made_is_named_after_the_module_of_its_input() -> None:
    graph = parsed("g (float[N] x) => (float[N] y) { a = Relu(x)  b = Neg(a)  y = Neg(b) }")
    scopes = "['', 'encoder', 'encoder.block', 'relu']"
    graph.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    passes.name_nodes(graph)
    assert Counter(node.name for node in graph.graph) == Counter(
        ["encoder.block/Relu", "encoder.block/Neg", "encoder.block/Neg_1"]
    )


def test_shapes_inside_are_forgotten_and_those_of_the_borders_are_not() -> None:
    graph = parsed("g (float[N] x) => (float[N] y) <float[N] a> { a = Relu(x)  y = Neg(a) }")
    assert passes.forget_inner_shapes(graph) == 1
    assert graph.graph[0].outputs[0].shape is None
    assert graph.graph.inputs[0].shape is not None
    assert graph.graph.outputs[0].shape is not None


def test_equal_nodes_become_one() -> None:
    graph = parsed("g (float[N] x) => (float[N] y) { a = Exp(x)  b = Exp(x)  y = Add(a, b) }")
    assert passes.merge_equal_nodes(graph) == 1
    assert np.allclose(computed(graph, {"x": np.zeros(2, np.float32)}), 2.0)
