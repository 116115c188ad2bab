"""The shipped graphs are those that the reference gives today, and are enough without torch."""

import gzip
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ltx_export import templates
from ltx_export.graphs import Graphs, Model, traced
from make_templates import TINY, released, tiny
from tests.export.conftest import Files


def first(stage: str, models: str) -> Model:
    found = {"released": released, "tiny": tiny}[models]()
    return next(model for name, model in found if name == stage)


@pytest.mark.parametrize(
    ("stage", "models"),
    [
        ("transformer", "tiny"),
        ("text_encoder", "tiny"),
        ("vae_decoder", "tiny"),
        ("vae_decoder_stream", "tiny"),
        ("transformer", "released"),
        ("latent_upsampler", "released"),
    ],
)
def test_a_fresh_trace_gives_the_shipped_bytes(stage: str, models: str, tmp_path: Path) -> None:
    graphs = Graphs(first(stage, models))
    found = templates.save(
        traced(stage, graphs.smallest(stage)), stage, graphs.facts(stage), tmp_path
    )
    shipped = templates.FOLDER / found.name
    assert shipped.is_file(), "no template has this name; make templates"
    assert found.read_bytes() == shipped.read_bytes(), "make templates"


def test_every_released_stage_has_a_template_and_no_template_is_nobodys() -> None:
    wanted = {
        templates.name(stage, Graphs(model).facts(stage)) for stage, model in (*released(), *tiny())
    }
    assert len(wanted) > 15
    assert {path.name for path in templates.FOLDER.iterdir()} == wanted
    for stage, model in (*released(), *tiny()):
        assert Graphs(model).has_template(stage)


def test_a_templates_name_is_made_of_what_it_says_of_itself() -> None:
    names = {templates.name(stage, facts) for stage, facts in templates.shipped()}
    assert names == {path.name for path in templates.FOLDER.iterdir()}


def test_templates_are_small_and_have_no_weight_and_no_trace_of_their_maker() -> None:
    paths = sorted(templates.FOLDER.iterdir())
    assert sum(path.stat().st_size for path in paths) < 400_000
    for path in paths:
        data = gzip.decompress(path.read_bytes())
        for secret in (b".py", b"/work", b"/home", b"site-packages", b"stack_trace"):
            assert secret not in data, path.name


FACTS: Mapping[str, float] = {"width": 4, "eps": 1e-6}


def model(bias: float = 1.0) -> ir.Model:
    """x + w + bias; w is a weight."""
    x, w = (
        ir.Value(name=name, shape=ir.Shape([4]), type=ir.TensorType(ir.DataType.DOUBLE))
        for name in "xw"
    )
    b = ir.Value(name="b", const_value=ir.tensor(np.full(4, bias), name="b"))
    b.type, b.shape = ir.TensorType(ir.DataType.DOUBLE), ir.Shape([4])
    inner = ir.node("Add", [x, w], name="one")
    outer = ir.node("Add", [inner.outputs[0], b], name="two")
    outer.outputs[0].name = "y"
    graph = ir.Graph([x], outer.outputs, nodes=[inner, outer], opset_imports={"": 23}, name="s")
    graph.initializers.update({"w": w, "b": b})
    return ir.Model(graph, ir_version=10)


def test_what_was_saved_is_what_is_found(tmp_path: Path) -> None:
    templates.save(model(), "s", FACTS, tmp_path)
    proto = templates.find("s", FACTS, tmp_path)
    assert proto is not None
    found = templates.from_proto(proto)
    assert found.graph.initializers["w"].const_value is None
    assert found.graph.initializers["w"].dtype == ir.DataType.DOUBLE
    bias = found.graph.initializers["b"].const_value
    assert bias is not None
    assert bias.numpy().tolist() == [1.0] * 4
    assert not found.metadata_props
    assert list(templates.shipped(tmp_path)) == [("s", dict(FACTS))]


def test_saving_leaves_the_graph_as_it_was_and_says_the_same_twice(tmp_path: Path) -> None:
    made = model()
    first_bytes = templates.save(made, "s", FACTS, tmp_path).read_bytes()
    assert first_bytes[4:8] == b"\0" * 4, "gzip's time of making"
    assert made.graph.initializers["w"].const_value is None
    assert templates.save(made, "s", FACTS, tmp_path).read_bytes() == first_bytes
    assert templates.save(model(2.0), "s", FACTS, tmp_path).read_bytes() != first_bytes


@pytest.mark.parametrize("wrong", [{"width": 5, "eps": 1e-6}, {"width": 4}, {"eps": 1e-6}])
def test_no_template_is_found_for_other_facts(tmp_path: Path, wrong: Mapping[str, float]) -> None:
    templates.save(model(), "s", FACTS, tmp_path)
    assert templates.find("s", wrong, tmp_path) is None
    assert templates.find("t", FACTS, tmp_path) is None
    reordered = dict(reversed(list(FACTS.items())))
    assert templates.find("s", reordered, tmp_path) is not None


def test_a_template_under_anothers_name_is_not_believed(tmp_path: Path) -> None:
    path = templates.save(model(), "s", FACTS, tmp_path)
    other = {"width": 5}
    path.rename(tmp_path / templates.name("s", other))
    assert templates.find("s", other, tmp_path) is None


def test_a_weight_without_a_shape_is_a_mistake() -> None:
    made = model()
    made.graph.initializers["w"].shape = None
    with pytest.raises(AssertionError, match="has no shape or type"):
        templates.to_proto(made)


WITHOUT_TORCH = """
import json, sys
for name in ("torch", "transformers", "onnxscript", "safetensors", "onnxruntime", "diffusers"):
    sys.modules[name] = None
from ltx_export import cli
codes = [cli.main(arguments) for arguments in json.loads(sys.argv[1])]
roots = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
print(json.dumps([codes, sorted(roots - sys.stdlib_module_names)]))
"""

ALLOWED = {
    *("ltx_engines", "ltx_export", "ltx_ref"),
    *("numpy", "ml_dtypes", "onnx", "onnx_ir", "google", "sympy", "mpmath", "typing_extensions"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "yaml", "platformdirs"),
    *("tokenizers", "typer", "click", "rich", "shellingham", "annotated_doc"),
    *("cython_runtime", "pygments", "markdown_it", "mdurl", "packaging", "huggingface_hub"),
}
"""What the base install and the extra [export] bring, directly or not."""


def test_an_export_of_a_known_model_needs_no_torch_and_another_says_what_it_needs(
    files: Files, tmp_path: Path
) -> None:
    known = [
        "onnx",
        str(TINY / "ltx-tiny.safetensors"),
        "--text-encoder",
        str(TINY / "text_encoder"),
    ]
    unknown = ["onnx", str(files.checkpoint), "--stages", "transformer"]
    runs = [[*known, "--out", str(tmp_path / "a"), "--weights", "copy"]]
    runs += [[*unknown, "--out", str(tmp_path / "b")]]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(runs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    graphs = sorted(path.name for path in (tmp_path / "a").glob("*.onnx"))
    assert len(graphs) == 5
    for name in graphs:
        onnx.load(tmp_path / "a" / name, load_external_data=False)
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("ltx-export: ")]
    assert "this transformer is none of the released ones" in said
    assert "onnxscript, torch, transformers must be installed: pip install" in said
    foreign = {name for name in modules if not name.startswith("_")} - ALLOWED
    assert not foreign


def test_the_unused_part_of_a_configuration_does_not_cost_the_template() -> None:
    base = first("transformer", "released")
    other = replace(base.config, vae=replace(base.config.vae, latent_channels=16))
    assert Graphs(replace(base, config=other)).has_template("transformer")
    assert Graphs(base.with_layers(5)).has_template("transformer")
    assert not Graphs(base.with_layers(2)).has_template("transformer")
