"""A graph's weights are the checkpoint's own bytes under the checkpoint's own names."""

from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

from ltx_engines.bundle import Precision
from ltx_engines.stages import FLOAT, STAGES, Stage, Tensor
from ltx_export import invariants, quantized_graph, weights
from ltx_export.element_types import ONNX_TYPES
from ltx_export.onnx_bundle import check_graph
from ltx_ref.checkpoint import TensorInfo, read_header
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX
from tests.export.by_hand import parsed
from tests.export.conftest import Exported

PREFIXES = {
    "transformer": (TRANSFORMER_PREFIX,),
    "vae_encoder": ("vae.encoder.", "vae.per_channel_statistics."),
    "vae_decoder": ("vae.decoder.", "vae.per_channel_statistics."),
    "text_encoder": ("shared.", "encoder."),
}


def load(exported: Exported, stage: str) -> onnx.ModelProto:
    path = exported.bundle.file(exported.bundle.stage(stage).file)
    return onnx.load(path, load_external_data=False)


def checkpoint_names(exported: Exported, stage: str) -> set[str]:
    folder = exported.bundle.path
    files = exported.bundle.stage(stage).weights
    names = {name for file in files for name in read_header(folder / file).tensors}
    return {name for name in names if name.startswith(PREFIXES[stage])}


@pytest.mark.parametrize("stage", STAGES)
def test_initializers_are_named_as_in_the_checkpoint(exported: Exported, stage: str) -> None:
    external = {
        tensor.name
        for tensor in load(exported, stage).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    unused = {"vae.per_channel_statistics.channel"}
    assert external == checkpoint_names(exported, stage) - unused
    assert len(external) > 10


@pytest.mark.parametrize("stage", STAGES)
def test_each_initializer_is_its_tensor_bytes_in_the_file(exported: Exported, stage: str) -> None:
    folder = exported.bundle.path
    headers = {f: read_header(folder / f) for f in exported.bundle.stage(stage).weights}
    for tensor in load(exported, stage).graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert len(tensor.SerializeToString()) < 2048, tensor.name
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        info = headers[place["location"]].tensors[tensor.name]
        assert (int(place["offset"]), int(place["length"])) == (info.begin, info.end - info.begin)
        assert tuple(tensor.dims) == info.shape


@pytest.mark.parametrize("stage", STAGES)
def test_the_graph_and_the_manifest_have_the_same_tensors(exported: Exported, stage: str) -> None:
    proto = load(exported, stage)
    check_graph(proto)
    entry = exported.bundle.stage(stage)
    for entries, values in ((entry.inputs, proto.graph.input), (entry.outputs, proto.graph.output)):
        found = [
            (
                value.name,
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
            )
            for value in values
        ]
        assert found == [(t.name, t.dtype, t.axes) for t in entries]


@pytest.mark.parametrize("stage", STAGES)
def test_the_graph_tells_nothing_about_the_machine(exported: Exported, stage: str) -> None:
    proto = load(exported, stage)
    data = proto.SerializeToString()
    for secret in (b".py", b"/work", b"/home", b"site-packages", b"stack_trace"):
        assert secret not in data
    assert proto.producer_name == "ltx-export"
    assert not proto.metadata_props
    assert not proto.graph.value_info


def convolution(dtype: int, length: int) -> onnx.ModelProto:
    kernel = onnx.TensorProto(name="kernel", dims=[2, 3, 1], data_type=dtype)
    kernel.data_location = onnx.TensorProto.EXTERNAL
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Conv", ["x", "kernel"], ["y"])
    inputs, outputs = [info("x", dtype, [1, 3, 5])], [info("y", dtype, [1, 2, length])]
    graph = onnx.helper.make_graph([node], "by_hand", inputs, outputs, [kernel])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])


@pytest.mark.parametrize("dtype", [onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16])
def test_a_graph_is_checked_in_each_precision(dtype: int) -> None:
    proto = convolution(dtype, length=5)
    check_graph(proto)
    assert proto.graph.input[0].type.tensor_type.elem_type == dtype
    with pytest.raises(onnx.shape_inference.InferenceError):
        check_graph(convolution(dtype, length=4))


def test_no_weight_was_copied(exported: Exported) -> None:
    manifest = exported.bundle.manifest
    for file in (exported.checkpoint, *exported.text_encoder.glob("*.safetensors")):
        name = next(n for n in manifest.files if Path(n).name == file.name)
        linked = exported.bundle.path / name
        assert file.is_symlink()
        assert not linked.is_symlink()
        assert linked.stat().st_ino == file.stat().st_ino


def graph_with(*names: str, size: int = 3) -> ir.Model:
    """Sums of weights without values."""
    values = [
        ir.Value(name=name, shape=ir.Shape([size]), type=ir.TensorType(ir.DataType.FLOAT))
        for name in names
    ]
    nodes = [ir.node("Neg", [value], name=f"{value.name}/Neg") for value in values]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, name="made_by_hand", opset_imports={"": 20})
    graph.initializers.update({value.name: value for value in values if value.name})
    return ir.Model(graph, ir_version=10)


def weight(file: str = "a.safetensors", size: int = 3, dtype: str = "F32") -> weights.Weight:
    return weights.Weight(file, TensorInfo(dtype, (size,), 8, 8 + 4 * size))


def test_binding_points_into_the_files_and_says_which() -> None:
    model = graph_with("a", "b")
    bound = {"a": weight("z.safetensors"), "b": weight("sub/y.safetensors"), "c": weight()}
    assert weights.bind(model, bound) == ("sub/y.safetensors", "z.safetensors")
    assert weights.names(model) == {"a", "b"}
    assert weights.missing(["a", "b", "c"], model) == ["c"]
    tensor = model.graph.initializers["b"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert (str(tensor.location), tensor.offset, tensor.length) == ("sub/y.safetensors", 8, 12)


def test_a_file_elsewhere_is_a_name_in_the_graph_and_a_path_in_the_manifest() -> None:
    model = graph_with("a")
    assert weights.bind(model, {"a": weight("/hub/x.safetensors")}) == ("/hub/x.safetensors",)
    tensor = model.graph.initializers["a"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert str(tensor.location) == "x.safetensors"


def test_a_weight_that_the_checkpoint_lacks_is_named() -> None:
    with pytest.raises(AssertionError, match=r"^b is a weight of the graph and not of the check"):
        weights.bind(graph_with("a", "b"), {"a": weight()})


@pytest.mark.parametrize("wrong", [weight(size=4), weight(dtype="F16"), weight(dtype="I64")])
def test_a_weight_of_another_shape_or_type_is_named(wrong: weights.Weight) -> None:
    with pytest.raises(AssertionError, match=r"^a was traced as"):
        weights.bind(graph_with("a"), {"a": wrong})


@pytest.mark.parametrize("place", ["../a", "b/../../a", "./a", "/b/../a", "/a/"])
def test_weights_outside_the_bundle_are_refused(place: str) -> None:
    with pytest.raises(ValueError, match="not a path inside the bundle"):
        weights.bind(graph_with("a"), {"a": weight(place)})


EIGHT = weights.Weight("a.safetensors", TensorInfo("F8_E4M3", (3,), 8, 11))


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_an_8_bit_weight_keeps_name_and_bytes_and_is_widened_where_it_is_used(
    precision: Precision,
) -> None:
    model = graph_with("x.weight", "y.weight", "z.bias")
    for value in model.graph.initializers.values():
        value.dtype = ONNX_TYPES[precision]
    plain = weight(dtype={"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[precision])
    given = {"x.weight": EIGHT, "y.weight": EIGHT, "z.bias": plain}
    assert quantized_graph.widen(model, given) == 2
    weights.bind(model, given)
    stored = model.graph.initializers["x.weight"]
    assert stored.dtype == ir.DataType.FLOAT8E4M3FN
    assert isinstance(stored.const_value, ir.ExternalTensor)
    assert (stored.const_value.offset, stored.const_value.length) == (8, 3)
    (widen,) = [use.node for use in stored.uses()]
    assert (widen.op_type, widen.name) == ("DequantizeLinear", "x/DequantizeLinear")
    assert widen.outputs[0].dtype == ONNX_TYPES[precision]
    assert [use.node.op_type for use in widen.outputs[0].uses()] == ["Neg"]
    scale = model.graph.initializers[quantized_graph.ONE]
    assert widen.inputs[1] is scale
    assert scale.dtype == ONNX_TYPES[precision]
    assert [node.op_type for node in model.graph].count("DequantizeLinear") == 2
    assert model.graph[0].op_type == "DequantizeLinear", "before whatever reads it"


def test_a_block_may_keep_its_weights_wide_while_the_block_it_was_copied_from_does_not() -> None:
    model = graph_with("x.weight", "y.weight")
    first, second = model.graph.initializers.values()
    second.type = first.type  # as `stamp` leaves it
    given = {"x.weight": EIGHT, "y.weight": weight()}
    assert quantized_graph.widen(model, given) == 1
    files = weights.bind(model, given)
    assert files == ("a.safetensors",)
    assert (first.dtype, second.dtype) == (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT)


def test_a_baked_size_is_found() -> None:
    value = ir.Value(name="shape", const_value=ir.tensor([2, -1, 3 * 10007], name="shape"))
    graph = ir.Graph([], [], nodes=[], initializers=[value], name="transformer")
    problems = list(invariants._constant_problems(ir.Model(graph, ir_version=10), {}))
    assert problems == ["shape holds 30021: the size of tokens was baked into the graph"]


def test_large_and_float64_constants_are_found() -> None:
    tensors = {
        "double": ir.tensor(torch.zeros(1, dtype=torch.float64).numpy(), name="double"),
        "long": ir.tensor([2**40], name="long"),
        "table": ir.tensor(torch.zeros(10000).numpy(), name="table"),
    }
    values = [ir.Value(name=name, const_value=tensor) for name, tensor in tensors.items()]
    graph = ir.Graph([], [], nodes=[], initializers=values, name="transformer")
    problems = list(invariants._constant_problems(ir.Model(graph, ir_version=10), {}))
    assert problems == [
        "double is float64",
        f"long holds [{2**40}], more than 32 bits",
        "table has 40000 bytes inside the graph",
    ]


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        ("y = RandomNormalLike(x)", "n draws random numbers; noise is an input"),
        ("y = my.Own(x)", "n is a my:Own, which TensorRT does not have"),
        ("y = SequenceConstruct(x)", "n is a :SequenceConstruct, which TensorRT does not have"),
        ("y = Cast<to = 11>(x)", "n computes in float64"),
    ],
)
def test_a_node_that_an_engine_should_not_have_is_named(node: str, problem: str) -> None:
    model = parsed(f'g (float[N] x) => (float[N] y) {{ ["n"] {node} }}')
    assert list(invariants._node_problems(model)) == [problem]


def test_a_nodes_metadata_are_found() -> None:
    model = parsed('g (float[N] x) => (float[N] y) { ["n"] y = Neg(x) }')
    assert not list(invariants._node_problems(model))
    model.graph[0].metadata_props["where"] = "/home/me"
    assert list(invariants._node_problems(model)) == [
        "n carries metadata, which may hold local paths"
    ]


def test_borders_that_are_not_the_tables_are_found() -> None:
    row = Tensor("x", FLOAT, ("batch", 3))
    stage = Stage("s", (row,), (replace(row, name="y"),))
    model = parsed('g (float[batch,3] x) => (float[batch,3] y) { ["n"] y = Neg(x) }')
    invariants.check(model, stage, "float32", {})
    for changed, precision in ((stage, "float16"), (replace(stage, outputs=(row,)), "float32")):
        with pytest.raises(AssertionError, match=r"^s: borders are .*, the table says"):
            invariants.check(model, changed, precision, {})
    model.graph.inputs[0].shape = ir.Shape(["batch", 4])
    with pytest.raises(AssertionError, match="borders are"):
        invariants.check(model, stage, "float32", {})


def test_a_weight_that_points_nowhere_is_found() -> None:
    assert list(invariants._constant_problems(graph_with("a"), {})) == ["a has no value"]
