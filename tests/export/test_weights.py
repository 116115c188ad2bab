"""A graph's weights are the checkpoint's own bytes under the checkpoint's own names."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from ltx_engines.stages import STAGES
from ltx_export import invariants, weights
from ltx_export.onnx_bundle import check_graph
from ltx_ref.checkpoint import TensorInfo, read_header
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX
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
    values = []
    for name in names:
        value = ir.Value(name=name, shape=ir.Shape([size]), type=ir.TensorType(ir.DataType.FLOAT))
        value.const_value = ir.tensor([0.0] * size, name=name)
        values.append(value)
    graph = ir.Graph([], [], nodes=[], initializers=values, name="made_by_hand")
    for value in values:
        value.const_value = None
    return ir.Model(graph, ir_version=10)


def weight(file: str = "a.safetensors", size: int = 3, dtype: str = "F32") -> weights.Weight:
    return weights.Weight(file, TensorInfo(dtype, (size,), 8, 8 + 4 * size))


def test_binding_finds_tied_weights_under_either_name() -> None:
    model = graph_with("embed")
    weights.bind(model, {"shared": weight()}, ["embed", "shared"], {"embed": "shared"})
    assert weights.names(model) == {"shared"}
    assert weights.files(model) == ("a.safetensors",)


def test_a_weight_that_the_checkpoint_lacks_is_named() -> None:
    with pytest.raises(AssertionError, match=r"^b is a weight of the graph and not of the check"):
        weights.bind(graph_with("a", "b"), {"a": weight()}, [], {})


def test_a_weight_that_tracing_lost_is_named() -> None:
    with pytest.raises(AssertionError, match=r"^b is not a weight of the made_by_hand graph"):
        weights.bind(graph_with("a"), {"a": weight(), "b": weight()}, ["a", "b"], {})


@pytest.mark.parametrize("wrong", [weight(size=4), weight(dtype="F16")])
def test_a_weight_of_another_shape_or_type_is_named(wrong: weights.Weight) -> None:
    with pytest.raises(AssertionError, match=r"^a was traced as"):
        weights.bind(graph_with("a"), {"a": wrong}, ["a"], {})


@pytest.mark.parametrize("place", ["../a", "/a", "b/../../a", "./a"])
def test_weights_outside_the_bundle_are_refused(place: str) -> None:
    with pytest.raises(ValueError, match="not a path inside the bundle"):
        weights.bind(graph_with("a"), {"a": weight(place)}, ["a"], {})


def test_twins_are_the_two_names_of_one_parameter() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    pair = nn.ModuleDict({"a": first, "b": second})
    assert weights.twins(pair) == {"a.weight": "b.weight", "b.weight": "a.weight"}


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
