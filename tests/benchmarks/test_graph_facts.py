"""What is said of a graph is read off the graph, and a graph that cheats is found out."""

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

import graph_facts
from ltx_ref.checkpoint import read_header

BLOCKS, WIDTH = 3, 20


def names() -> list[str]:
    return [f"model.transformer_blocks.{block}.weight" for block in range(BLOCKS)]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder with a hard link of a checkpoint and a graph of three blocks over it."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    weights = {name: np.full((WIDTH, WIDTH), index, "f4") for index, name in enumerate(names())}
    save_file(weights, tmp_path / "model.safetensors")
    os.link(tmp_path / "model.safetensors", folder / "model.safetensors")
    save(folder, blocks())
    return folder


def blocks() -> list[onnx.NodeProto]:
    nodes, x = [], "x"
    for name in names():
        nodes += [
            helper.make_node("MatMul", [x, name], [f"{name}.product"]),
            helper.make_node("Relu", [f"{name}.product"], [f"{name}.out"]),
        ]
        x = f"{name}.out"
    return [*nodes, helper.make_node("Identity", [x], ["y"])]


def external(folder: Path) -> list[onnx.TensorProto]:
    tensors = []
    for name, info in read_header(folder / "model.safetensors").tensors.items():
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=info.shape)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": "model.safetensors", "offset": info.begin}
        for key, value in (place | {"length": info.end - info.begin}).items():
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    return tensors


def save(
    folder: Path,
    nodes: list[onnx.NodeProto],
    tensors: list[onnx.TensorProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", WIDTH]) for n in "xy")
    initializers = external(folder) if tensors is None else tensors
    graph = helper.make_graph(nodes, "stage", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ours", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions or [])
    (folder / "stage.onnx").write_bytes(model.SerializeToString())


def facts(bundle: Path, *parts: str) -> dict[str, object]:
    checkpoint = bundle.parent / "model.safetensors"
    return graph_facts.facts(bundle / "stage.onnx", [checkpoint], parts)


def test_an_honest_graph_has_every_weight_in_its_place(bundle: Path) -> None:
    found = facts(bundle)
    assert {found[key] for key in ("weights", "weights_by_name", "weights_in_place")} == {BLOCKS}
    assert (found["large_weights"], found["large_weights_by_name"]) == (BLOCKS, BLOCKS)
    assert (found["nodes"], found["nodes_per_block"]) == (7, 2)
    assert (found["inline_bytes"], found["checker"], found["full_check"]) == (0, "ok", "ok")
    json.dumps(found)


def test_the_check_leaves_the_folder_as_it_was(bundle: Path) -> None:
    before = sorted(bundle.parent.rglob("*"))
    facts(bundle)
    assert sorted(bundle.parent.rglob("*")) == before


def test_a_renamed_weight_is_missed(bundle: Path) -> None:
    tensors = external(bundle)
    tensors[1].name = "val_88"
    save(bundle, blocks(), tensors)
    found = facts(bundle)
    assert found["weights_by_name"] == found["large_weights_by_name"] == BLOCKS - 1


def test_a_copied_weight_is_not_in_place(bundle: Path) -> None:
    copy = bundle / "copy"
    copy.write_bytes((bundle / "model.safetensors").read_bytes())
    (bundle / "model.safetensors").unlink()
    copy.rename(bundle / "model.safetensors")
    found = facts(bundle)
    assert (found["weights_by_name"], found["weights_in_place"]) == (BLOCKS, 0)


def test_a_weight_inside_the_graph_is_counted_in_bytes(bundle: Path) -> None:
    tensors = external(bundle)
    inside = onnx.numpy_helper.from_array(np.ones((WIDTH, WIDTH), "f4"), tensors[0].name)
    save(bundle, blocks(), [inside, *tensors[1:]])
    found = facts(bundle)
    assert found["weights_in_place"] == BLOCKS - 1
    assert found["largest_inline"] == WIDTH * WIDTH
    assert int(str(found["inline_bytes"])) >= WIDTH * WIDTH * 4


def test_only_the_stages_part_of_a_checkpoint_is_wanted(bundle: Path) -> None:
    assert facts(bundle, "model.transformer_blocks.2.")["weights"] == 1


def test_a_function_counts_as_the_nodes_in_it(bundle: Path) -> None:
    body = [
        helper.make_node("MatMul", ["a", "b"], ["product"]),
        helper.make_node("Relu", ["product"], ["c"]),
    ]
    opset = [helper.make_opsetid("", 20)]
    block = helper.make_function("ours", "Block", ["a", "b"], ["c"], body, opset)
    calls = [
        helper.make_node("Block", [source, name], [target], domain="ours")
        for source, name, target in zip("xab", names(), "aby", strict=True)
    ]
    save(bundle, calls, functions=[block])
    found = facts(bundle)
    assert (found["nodes"], found["nodes_per_block"], found["checker"]) == (6, 2, "ok")


def test_a_wrong_graph_is_told_in_the_checkers_words(bundle: Path) -> None:
    save(bundle, [helper.make_node("Relu", ["nowhere"], ["y"])])
    assert "nowhere" in str(facts(bundle)["checker"])


def test_a_weight_keeps_its_name_under_a_wrappers_prefix_and_loses_it_when_transposed(
    tmp_path: Path,
) -> None:
    kept = TensorProto(name="m.proj.weight", data_type=TensorProto.FLOAT, dims=[4, 6])
    folded = TensorProto(name="val_88", data_type=TensorProto.FLOAT, dims=[6, 4])
    turned = TensorProto(name="m.out.weight", data_type=TensorProto.FLOAT, dims=[6, 4])
    save(tmp_path, blocks(), [kept, folded, turned])
    wanted = {
        "proj.weight": (4, 6),
        "other.weight": (4, 6),
        "out.weight": (4, 6),
        "j.weight": (4, 6),
    }
    assert graph_facts.kept(tmp_path / "stage.onnx", wanted) == 1
