"""The search for what a builder refuses, with builders that are a rule, and with a real one."""

import json
import shutil
import sys
from collections.abc import Generator
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from ltx_engines import bundle
from ltx_engines.errors import UserError
from ltx_export import build_process, card, cli, debug_layers, refused_nodes
from ltx_export.refused_nodes import Cuts, Refused

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
AXES = {"batch": 1, "tokens": 4, "text": 8, "timesteps": 1}


def chain(*operators: str, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Each reads what the one before writes; the first reads `x`, the last writes `y`."""
    names = ["x", *(f"v{index}" for index in range(1, len(operators))), "y"]
    nodes = [
        helper.make_node(operator, [names[index]], [names[index + 1]], name=f"n{index}")
        for index, operator in enumerate(operators)
    ]
    ends = [
        helper.make_tensor_value_info(name, dtype, ["batch", "tokens", 4]) for name in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def cuts(proto: onnx.ModelProto) -> Cuts:
    return Cuts.of(ir.from_proto(proto), AXES)


def found(proto: onnx.ModelProto, *refused: str) -> tuple[Refused | None, list[int]]:
    """By a builder that refuses graphs which have all these operators; and the graphs' sizes."""
    sizes: list[int] = []

    def judge(model: ir.Model, _: str) -> Generator[str, None, str | None]:
        yield "building"
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        sizes.append(len(model.graph))
        return "no" if {*refused} <= {node.op_type for node in model.graph} else None

    work = refused_nodes.find(cuts(proto), judge)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value, sizes


@pytest.mark.parametrize("place", range(9))
def test_the_one_node_is_found_wherever_it_is(place: int) -> None:
    operators = ["Relu"] * 9
    operators[place] = "Softplus"
    refused, _ = found(chain(*operators), "Softplus")
    assert refused is not None
    assert [node.name for node in refused.nodes] == [f"n{place}"]
    assert refused.nodes[0].op == "Softplus"
    assert refused.nodes[0].inputs[0].shape == (1, 4, 4)
    assert refused.nodes[0].inputs[0].dtype == "float"
    assert (refused.words, refused.of) == ("no", 9)


@pytest.mark.parametrize(("first", "last"), [(0, 8), (2, 3), (1, 6), (7, 8)])
def test_nodes_that_are_refused_together_are_found_together(first: int, last: int) -> None:
    operators = ["Relu"] * 9
    operators[first], operators[last] = "Softplus", "Tanh"
    refused, _ = found(chain(*operators), "Softplus", "Tanh")
    assert refused is not None
    assert [node.name for node in refused.nodes] == [f"n{i}" for i in range(first, last + 1)]


def test_a_graph_that_is_taken_costs_one_build() -> None:
    assert found(chain(*["Relu"] * 9), "Softplus") == (None, [9])


def test_an_early_node_is_found_by_small_graphs() -> None:
    operators = ["Relu"] * 64
    operators[2] = "Softplus"
    refused, sizes = found(chain(*operators), "Softplus")
    assert refused is not None
    assert refused.attempts == len(sizes)
    assert max(sizes[1:]) <= 8


def test_shapes_that_follow_from_the_inputs_become_numbers() -> None:
    """So that a cut behind them needs no input for them."""
    shape = helper.make_node("Shape", ["x"], ["s"], name="shape")
    reshape = helper.make_node("Reshape", ["v", "s"], ["y"], name="reshape")
    relu = helper.make_node("Relu", ["x"], ["v"], name="relu")
    proto = chain("Relu", "Relu")
    del proto.graph.node[:]
    proto.graph.node.extend([shape, relu, reshape])
    made = cuts(proto)
    assert [node.name for node in made.nodes] == ["relu", "reshape"]
    cut = made.cut(1, 2)
    assert [value.name for value in cut.graph.inputs] == ["v"]
    onnx.checker.check_model(ir.to_proto(cut), full_check=True)


def hand_made(folder: Path, proto: onnx.ModelProto) -> Path:
    """The shipped bundle with this graph in place of its transformer."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.onnx", "text_encoder"))
    onnx.save(proto, folder / "transformer.onnx")
    manifest = bundle.read(TINY)
    entry = manifest.stages["transformer"].model_copy(update={"weights": ()})
    bundle.seal(
        folder,
        manifest.model_copy(update={"stages": {"transformer": entry}, "tokenizer": None}),
    )
    return folder


def transposed() -> onnx.ModelProto:
    """A transposed convolution in bfloat16, between nodes that every builder takes."""
    proto = chain("Relu", "Tanh", "Relu", "Relu", dtype=TensorProto.BFLOAT16)
    kernel = helper.make_tensor("w", TensorProto.BFLOAT16, [8, 8, 3], [0.5] * 192)
    proto.graph.initializer.append(kernel)
    node = helper.make_node("ConvTranspose", ["v1", "w"], ["v2"], name="n1", pads=[1, 1])
    proto.graph.node[1].CopyFrom(node)
    return proto


def test_what_the_real_builder_refuses_is_named_with_its_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")
    folder = hand_made(tmp_path / "bundle", transposed())
    words = ["debug-layers", str(folder), "--gpu", "sm89", "--shape", "64x64x9"]
    assert cli.main([*words, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (node,) = report["refused"]["nodes"]
    assert (node["name"], node["op"]) == ("n1", "ConvTranspose")
    assert node["inputs"][0] == {"name": "v1", "dtype": "bfloat16", "shape": [1, 8, 4]}
    assert "Could not infer output types" in report["refused"]["words"]
    assert report["refused"]["of"] == 4


def test_what_is_built_says_why_numbers_are_not_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")
    monkeypatch.setattr(card, "at_hand", lambda: None)
    folder = hand_made(tmp_path / "bundle", chain("Relu", "Tanh"))
    words = ["debug-layers", str(folder), "--shape", "64x64x9"]
    assert cli.main(words) == 2
    assert "say for which one, as in --gpu sm89" in capsys.readouterr().err
    assert cli.main([*words, "--gpu", "sm89"]) == 0
    _, built, numbers = capsys.readouterr().out.splitlines()
    assert built == "every node is built"
    assert numbers == (
        "numbers: not looked at, no NVIDIA GPU is here; give the same command on SM89"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "most likely for want of host"),
        ("import not_installed", "No module named 'not_installed'"),
    ],
)
def test_what_is_not_the_builders_verdict_blames_no_node(
    code: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")
    monkeypatch.setattr(build_process, "COMMAND", (sys.executable, "-c", code))
    folder = hand_made(tmp_path / "bundle", chain("Relu", "Tanh"))
    words = ["debug-layers", str(folder / "transformer.onnx"), "--gpu", "sm89"]
    assert cli.main([*words, "--shape", "64x64x9"]) == 2
    assert said in capsys.readouterr().err


def test_a_graph_of_a_bundle_is_its_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hand_made(tmp_path / "bundle", chain("Relu", "Tanh"))
    words = ["debug-layers", str(folder / "transformer.onnx"), "--stage", "vae_decoder"]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "is the stage transformer, not vae_decoder; leave out --stage" in said


def test_a_graph_that_breaks_its_own_rules_costs_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")
    proto = chain("Relu", "Relu")
    proto.graph.node[1].input.append("v1")
    folder = hand_made(tmp_path / "bundle", proto)
    order = debug_layers.Order(folder, gpus=("sm89",), shape="64x64x9")
    with pytest.raises(UserError, match=r"transformer\.onnx cannot be cut: node n1"):
        list(debug_layers.run(order))


@pytest.mark.parametrize(("count", "ends"), [(1, 1), (6, 6), (40, 6)])
def test_a_long_run_is_shown_by_its_ends(count: int, ends: int) -> None:
    nodes = [refused_nodes.Node(f"n{index}", "Relu", (), ()) for index in range(count)]
    listed = refused_nodes.shown(nodes)
    assert len(listed) == ends
    assert (listed[0], listed[-1]) == (nodes[0], nodes[-1])
