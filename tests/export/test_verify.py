"""The ladder on ltx-tiny: it holds, and what is damaged is named."""

import json
import math
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ltx_engines import bundle
from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_export import cli, denoising, ladder, quantize, recipes, verify
from ltx_export.calibration import Calibration
from ltx_export.denoising import OnDevice, Walk, Weights
from ltx_export.ladder import Report, Row
from ltx_export.onnx_transformer import FOLDER, Graph, OnnxTransformer
from ltx_ref.checkpoint import read_header
from ltx_ref.quantization import layers
from ltx_ref.quantized import linears
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from tests.export.conftest import export

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
CONFIG = Path(__file__).parents[2] / "tools/tiny/ltx-tiny.yaml"
PREFIX = "model.diffusion_model."
SHAPE = VideoShape(9, 64, 64)
PROMPT = "a red circle moves right over a blue ground"

encode = denoising.prompts


@pytest.fixture(autouse=True, scope="session")
def prompts_are_encoded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising, "prompts", cache(encode))
        yield


@dataclass(frozen=True, slots=True)
class Quantized:
    """ltx-tiny beside what was made of it."""

    original: Path
    fp8: Path
    int8: Path


def order(checkpoint: Path, **wishes: object) -> verify.Order:
    plain = verify.Order(
        checkpoint, TINY / "text_encoder", PROMPT, SHAPE, steps=2, pipeline_config=CONFIG
    )
    return replace(plain, **wishes)  # type: ignore[arg-type]


def climbed(wanted: verify.Order) -> Report:
    work = verify.run(wanted)
    while True:
        try:
            next(work)
        except StopIteration as end:
            report: Report = end.value
            return report


@pytest.fixture(scope="session")
def walk() -> Walk:
    return verify._walk(verify.check(order(TINY / "ltx-tiny.safetensors")))


def ranges(walk: Walk, checkpoint: Path) -> Calibration:
    """The largest input of each layer in one clip."""
    found: dict[str, np.ndarray] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            amax = inputs[0].abs().flatten(0, -2).amax(dim=0).numpy()
            found[path] = np.maximum(amax, found.get(path, amax))

        return hook

    with Weights(checkpoint, torch.float32).opened() as transformer, torch.no_grad():
        for path, layer in linears(transformer):
            layer.register_forward_pre_hook(watch(f"{PREFIX}{path}"))
        walk.outputs(transformer, torch.float32)
    return Calibration(Path("ranges"), found, {"done": 1, "runs": 1})


@pytest.fixture(scope="session")
def made(walk: Walk, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    folder = tmp_path_factory.mktemp("quantized")
    original = folder / "ltx-tiny.safetensors"
    shutil.copyfile(TINY / original.name, original)
    header, calibration = read_header(original), ranges(walk, original)
    for name in ("fp8", "int8"):
        plan = quantize.plan(header, recipes.load(name), calibration)
        for _ in quantize.write(plan, folder / f"{name}.safetensors"):
            pass
    return Quantized(original, folder / "fp8.safetensors", folder / "int8.safetensors")


@pytest.fixture(scope="session")
def bundled(made: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer of the fp8 file."""
    out = tmp_path_factory.mktemp("bundled") / "bundle"
    export(made.fp8, TINY / "text_encoder", out, "transformer", "--weights", "copy")
    return out


@pytest.fixture(scope="session")
def bundled_int8(made: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "bundle"
    export(made.int8, TINY / "text_encoder", out, "transformer", "--weights", "copy")
    return out


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The file with other numbers; its metadata are the same."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, target, metadata)
    return target


def doubled(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            tensors[name] = tensors[name] * 2

    return change


def rows(report: Report, rung: str) -> dict[str, Row]:
    return {f"{row.output} {row.against}": row for row in report.rows if row.rung == rung}


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_quantized_file_climbs_the_whole_ladder(made: Quantized, name: str) -> None:
    report = climbed(order(getattr(made, name)))
    assert report.broken is None
    assert report.culprit is None
    assert report.coverage == f"Q/DQ coverage 60 of 60 layers ({name})"
    assert report.facts["formats"] == {name: 60}
    assert [skipped.rung for skipped in report.skipped] == ["engine"]
    assert list(rows(report, "bfloat16")) == ["velocity float32", "latents float32"]
    assert list(rows(report, "quantized")) == [
        *("weights float32", "velocity float32", "latents float32"),
    ]
    onnx_rows = rows(report, "onnx")
    assert list(onnx_rows) == [
        *("layers quantized", "blocks quantized", "velocity quantized", "latents quantized"),
        *("velocity float32", "latents float32"),
    ]
    assert onnx_rows["layers quantized"].distance < 1e-5
    assert onnx_rows["blocks quantized"].distance < 1e-2
    assert rows(report, "quantized")["velocity float32"].distance > 1e-3, "nothing is quantized"


def test_weights_that_are_quantized_alone_give_the_very_numbers(
    made: Quantized, tmp_path: Path
) -> None:
    """No codes of activations, so none that could flip: the file is a plain cast without its
    provenance, as it is published, and the original is told."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".weight") and "transformer_blocks" in n]:
            if tensors[name].dim() == 2:
                tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    plain = changed(made.original, tmp_path / "plain.safetensors", change)
    with pytest.raises(UserError, match="does not say what it was made from; give --original"):
        verify.check(order(plain))
    report = climbed(order(plain, original=made.original))
    assert report.broken is None
    assert rows(report, "onnx")["velocity quantized"].distance < 1e-4
    assert report.coverage == "Q/DQ coverage 60 of 60 layers (fp8-cast)"


def test_a_float_checkpoint_has_no_quantized_rung(made: Quantized) -> None:
    """With the model's own guidance: three branches, one of them perturbed."""
    report = climbed(order(made.original, pipeline_config=None))
    assert report.broken is None
    assert report.coverage is None
    assert {row.rung for row in report.rows} == {"bfloat16", "onnx"}
    assert list(rows(report, "onnx")) == [
        *("layers float32", "blocks float32", "velocity float32", "latents float32"),
    ]
    assert rows(report, "onnx")["latents float32"].distance < 1e-4


@pytest.fixture
def without_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rungs in torch alone."""

    def none(*_: object) -> Generator[str, None, verify.Graphed]:
        yield "exporting"
        return None, (), None

    monkeypatch.setattr(verify, "_graph", none)


LAYERS = ["0.ff.net.2", "3.ff.net.0.proj", "5.attn1.to_v"]


@pytest.mark.parametrize("layer", [*LAYERS, "2.attn1.to_q", "4.attn2.to_k"])
def test_a_doubled_scale_is_found_in_the_weights(
    made: Quantized, without_graph: None, layer: str
) -> None:
    """Also in queries and keys, which are normalised, so that their scale shows nowhere else."""
    path = f"{PREFIX}transformer_blocks.{layer}"
    wrong = made.fp8.with_name("wrong.safetensors")
    report = climbed(order(changed(made.fp8, wrong, doubled(f"{path}.weight_scale"))))
    assert report.broken is not None
    assert (report.broken.rung, report.broken.output) == ("quantized", "weights")
    assert report.broken.distance == pytest.approx(1, abs=0.1)
    assert report.culprit is not None
    assert report.culprit.place == path


@pytest.mark.parametrize("offload_blocks", [False, True])
@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_doubled_scale_is_found_by_bisection(
    made: Quantized, without_graph: None, layer: str, name: str, offload_blocks: bool
) -> None:
    path = f"transformer_blocks.{layer}"
    wrong, right = made.fp8.with_name("wrong.safetensors"), getattr(made, name)
    changed(right, wrong, doubled(f"{PREFIX}{path}.weight_scale"))
    blind = ("quantized.weights=inf", "quantized.velocity=0.05")
    report = climbed(order(wrong, bounds=blind, offload_blocks=offload_blocks))
    assert report.broken is not None
    assert (report.broken.rung, report.broken.output) == ("quantized", "velocity")
    assert report.culprit is not None
    assert report.culprit.place == path
    assert report.culprit.before is not None
    assert report.culprit.alone is not None
    assert report.culprit.before < 0.05 < report.culprit.after
    assert report.culprit.alone > 0.05


def test_what_shows_only_in_the_end_is_found_too(made: Quantized, without_graph: None) -> None:
    """By whole walks; half of the range of some activations is cut off, no weight is wrong."""
    path = "transformer_blocks.3.ff.net.2"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}{path}.input_scale"] /= 16

    wrong = changed(made.fp8, made.fp8.with_name("wrong.safetensors"), change)
    bounds = ("quantized.velocity=inf", "quantized.latents=0.05")
    report = climbed(order(wrong, bounds=bounds))
    assert report.broken is not None
    assert report.broken.output == "latents"
    assert report.culprit is not None
    assert report.culprit.place == path


def test_nan_in_a_scale_breaks_the_rung_and_is_named(made: Quantized, without_graph: None) -> None:
    path = f"{PREFIX}transformer_blocks.4.attn1.to_v"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{path}.weight_scale"][3] = math.nan

    wrong = changed(made.fp8, made.fp8.with_name("wrong.safetensors"), change)
    report = climbed(order(wrong))
    assert report.broken is not None
    assert report.broken.rung == "quantized"
    assert not report.broken.passed
    assert report.culprit is not None
    assert report.culprit.place == path
    assert all(math.isnan(row.distance) for row in report.rows if row.rung == "quantized")


def test_nan_in_the_original_leaves_nothing_to_compare_with(
    made: Quantized, tmp_path: Path, without_graph: None
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}proj_out.bias"][0] = math.nan

    wrong = changed(made.original, tmp_path / "nan.safetensors", change)
    with pytest.raises(UserError, match="gives NaN or infinity in float32"):
        climbed(order(wrong))


def test_a_bound_that_bfloat16_breaks_names_the_layer_that_rounds_most(
    made: Quantized, without_graph: None
) -> None:
    report = climbed(order(made.original, bounds=("bfloat16.velocity=0.0001",)))
    assert report.broken is not None
    assert report.broken.rung == "bfloat16"
    assert report.culprit is not None
    assert report.culprit.after > 1e-4


def test_one_block_at_a_time_gives_the_same_numbers(made: Quantized, walk: Walk) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        plain = Weights(made.fp8, dtype)
        found = []
        for weights in (plain, replace(plain, one_block=True)):
            with weights.opened() as transformer:
                found.append(walk.outputs(OnDevice(transformer, "cpu"), dtype)[0])
        for name in ("velocity", "latents"):
            assert np.array_equal(found[0][name], found[1][name])


def edited(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    path = folder / "transformer.onnx"
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())
    resealed(folder)


def resealed(folder: Path) -> None:
    """With a manifest that agrees with whatever was changed."""
    text = (folder / bundle.MANIFEST).read_text(encoding="utf-8")
    bundle.seal(folder, bundle.Manifest.model_validate_json(text))


def doubled_in_place(path: Path, name: str) -> None:
    """The graph points to bytes, which stay where they are."""
    info = read_header(path).tensors[name]
    numbers = np.memmap(path, np.float32, "r+", info.begin, ((info.end - info.begin) // 4,))
    numbers *= 2
    numbers.flush()


@pytest.fixture
def copy(bundled: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundled, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_given_bundle_is_climbed_and_stays_as_it_is(made: Quantized, bundled: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in bundled.iterdir()}
    report = climbed(order(made.fp8, bundle=bundled))
    assert report.broken is None
    assert rows(report, "onnx")["blocks quantized"].distance < 1e-2
    assert {path.name: path.stat().st_mtime_ns for path in bundled.iterdir()} == before


def test_a_graph_that_lost_a_pair_costs_one_line(
    made: Quantized, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The activations of one layer go around their codes."""
    lost = f"{PREFIX}transformer_blocks.2.ff.net.2"

    def change(proto: onnx.ModelProto) -> None:
        makers = {name: node for node in proto.graph.node for name in node.output}
        (matmul,) = (node for node in proto.graph.node if node.name == f"{lost}/MatMul")
        dequantize = makers[matmul.input[0]]
        matmul.input[0] = makers[dequantize.input[0]].input[0]

    edited(copy, change)
    code = cli.main(command(made.fp8, "--bundle", str(copy)))
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert "Q/DQ coverage 59 of 60 layers (fp8)" in said[-1]
    assert f"{lost}: its activations are not quantized" in said[-1]
    assert "Traceback" not in "".join(said)


@pytest.mark.parametrize("layer", ["0.attn1.to_q", "3.ff.net.0.proj", "5.attn2.to_v"])
def test_a_bundle_of_other_numbers_is_named_down_to_the_layer(
    made: Quantized, copy: Path, layer: str
) -> None:
    """The bundle's file of weights has a doubled scale, the checkpoint has not."""
    path = f"transformer_blocks.{layer}"
    doubled_in_place(copy / made.fp8.name, f"{PREFIX}{path}.weight_scale")
    resealed(copy)
    report = climbed(order(made.fp8, bundle=copy))
    assert report.broken is not None
    assert (report.broken.rung, report.broken.output) == ("onnx", "layers")
    assert report.culprit is not None
    assert report.culprit.place == path


@pytest.mark.parametrize("layer", ["2.attn1.to_out.0", "4.attn2.to_k", "1.ff.net.2"])
def test_integer_products_are_followed_too(
    made: Quantized, bundled_int8: Path, tmp_path: Path, layer: str
) -> None:
    path = f"transformer_blocks.{layer}"
    out = shutil.copytree(bundled_int8, tmp_path / "int8")
    doubled_in_place(out / made.int8.name, f"{PREFIX}{path}.weight_scale")
    resealed(out)
    culprit = climbed(order(made.int8, bundle=out)).culprit
    assert culprit is not None
    assert culprit.place == path


def test_a_block_that_differs_outside_its_layers_is_named(made: Quantized, copy: Path) -> None:
    table = f"{PREFIX}transformer_blocks.1.scale_shift_table"
    doubled_in_place(copy / made.fp8.name, table)
    resealed(copy)
    report = climbed(order(made.fp8, bundle=copy))
    assert report.culprit is not None
    assert report.culprit.place == "transformer_blocks.1"


def test_what_is_in_front_of_the_blocks_is_named_too(made: Quantized, copy: Path) -> None:
    doubled_in_place(copy / made.fp8.name, f"{PREFIX}patchify_proj.bias")
    resealed(copy)
    report = climbed(order(made.fp8, bundle=copy))
    assert report.broken is not None
    assert report.culprit is not None
    assert report.culprit.place == "patchify_proj"


def test_a_bundle_that_the_cpu_cannot_compute_is_counted_and_another_is_climbed(
    made: Quantized, tmp_path: Path
) -> None:
    out = tmp_path / "bfloat16"
    options = ("--precision", "bfloat16")
    export(made.fp8, TINY / "text_encoder", out, "transformer", *options)
    report = climbed(order(made.fp8, bundle=out))
    assert report.broken is None
    assert report.coverage == "Q/DQ coverage 60 of 60 layers (fp8)"
    assert [skipped.rung for skipped in report.skipped] == ["onnx", "engine"]
    assert "a float32 export was climbed instead" in report.skipped[0].why
    assert rows(report, "onnx")


@pytest.mark.parametrize("name", ["original", "fp8", "int8"])
def test_a_bundle_in_float16_is_the_same_model(made: Quantized, tmp_path: Path, name: str) -> None:
    checkpoint, out = getattr(made, name), tmp_path / "float16"
    options = ("--precision", "float16", "--opset", "20")
    export(checkpoint, TINY / "text_encoder", out, "transformer", *options)
    report = climbed(order(checkpoint, bundle=out))
    assert report.broken is None
    layers_row = rows(report, "onnx")[
        "layers float32" if name == "original" else "layers quantized"
    ]
    assert layers_row.distance > 1e-4, "it is not in float16"
    assert ("code" in layers_row.bound.why) == (name != "original")


def test_a_scale_that_is_a_tenth_off_breaks_float16_too(made: Quantized, tmp_path: Path) -> None:
    path, out = "transformer_blocks.2.attn1.to_v", tmp_path / "float16"
    wrong = made.fp8.with_name("wrong.safetensors")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}{path}.weight_scale"] *= 1.1

    changed(made.fp8, wrong, change)
    options = ("--precision", "float16", "--opset", "20")
    export(wrong, TINY / "text_encoder", out, "transformer", *options)
    report = climbed(order(made.fp8, bundle=out))
    assert report.broken is not None
    assert (report.broken.rung, report.broken.output) == ("onnx", "layers")
    assert report.culprit is not None
    assert report.culprit.place == path


Damage = Callable[[bytes], bytes]


def of_graph(change: Callable[[onnx.GraphProto], None]) -> Damage:
    def damage(data: bytes) -> bytes:
        proto = onnx.load_from_string(data)
        change(proto.graph)
        found: bytes = proto.SerializeToString()
        return found

    return damage


BIAS = f"{PREFIX}transformer_blocks.2.ff.net.2.bias"


def without_bias(graph: onnx.GraphProto) -> None:
    (add,) = (node for node in graph.node if BIAS in node.input)
    (product,) = set(add.input) - {BIAS}
    for node in graph.node:
        node.input[:] = [product if name == add.output[0] else name for name in node.input]
    graph.node.remove(add)


def without_bias_and_initializer(graph: onnx.GraphProto) -> None:
    without_bias(graph)
    (bias,) = (tensor for tensor in graph.initializer if tensor.name == BIAS)
    graph.initializer.remove(bias)


def with_a_bias_that_is_taken_away(graph: onnx.GraphProto) -> None:
    (add,) = (node for node in graph.node if BIAS in node.input)
    add.op_type = "Sub"


def without_names(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.name = ""


def with_another_output(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.output[:] = ["speed" if name == "velocity" else name for name in node.output]
    graph.output[0].name = "speed"


def with_an_unknown_operator(graph: onnx.GraphProto) -> None:
    next(node for node in graph.node if node.op_type == "Softmax").op_type = "Softmux"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda _: b"hello world" * 20, "it cannot be read"),
        (lambda _: b"", ""),
        (lambda data: data[:-5000], ""),
        (of_graph(without_bias), f"{BIAS} is not added once"),
        (of_graph(without_bias_and_initializer), f"it has no {BIAS}"),
        (of_graph(with_a_bias_that_is_taken_away), f"{BIAS} is not added once"),
        (of_graph(without_names), "no node has a name in"),
        (of_graph(with_another_output), "'speed' of the graph alone"),
    ],
)
def test_a_damaged_graph_costs_one_line_and_no_climb(
    made: Quantized, copy: Path, damage: Damage, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "transformer.onnx"
    path.write_bytes(damage(path.read_bytes()))
    resealed(copy)
    code = cli.main(command(made.fp8, "--bundle", str(copy)))
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert f"{path} is not one of our graphs: {complaint}" in said[-1]
    assert said[-1].endswith("export the bundle again (ltx-export onnx)")
    assert not [line for line in said if "Traceback" in line or "encoding the prompt" in line]


def test_a_graph_that_onnxruntime_refuses_is_not_climbed_either(
    made: Quantized, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "transformer.onnx"
    path.write_bytes(of_graph(with_an_unknown_operator)(path.read_bytes()))
    resealed(copy)
    assert cli.main(command(made.fp8, "--bundle", str(copy))) == 2
    said = capsys.readouterr().err
    assert f"{path}: ONNX Runtime: " in said
    assert "Softmux" in said
    assert "encoding the prompt" not in said


@pytest.mark.parametrize(
    ("name", "found", "wanted"),
    [
        ("original", "60 int8 layers", "no quantized layers"),
        ("fp8", "60 int8 layers", "60 fp8 layers"),
    ],
)
def test_a_bundle_of_another_checkpoint_is_refused(
    made: Quantized, bundled_int8: Path, name: str, found: str, wanted: str
) -> None:
    complaint = f"holds a model with {found}, the checkpoint has {wanted}; give the bundle"
    with pytest.raises(UserError, match=complaint):
        climbed(order(getattr(made, name), bundle=bundled_int8))


def test_a_float_bundle_is_not_of_a_quantized_file(made: Quantized, tmp_path: Path) -> None:
    out = tmp_path / "float"
    export(made.original, TINY / "text_encoder", out, "transformer", "--precision", "float32")
    with pytest.raises(UserError, match="with no quantized layers, the checkpoint has 60 fp8"):
        climbed(order(made.fp8, bundle=out))


@pytest.mark.parametrize("name", ["bundled", "bundled_int8"])
def test_onnxruntime_is_told_the_same_as_in_the_runtime(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it is the runtime's way to compute that is verified."""
    told: list[dict[str, str]] = []

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            told.append({})

        def add_session_config_entry(self, key: str, value: str) -> None:
            super().add_session_config_entry(key, value)
            told[-1][key] = value

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    opened = open_bundle(request.getfixturevalue(name))
    OnnxTransformer(Graph(opened))
    OnnxRuntimeSession.open(opened, "transformer", provider="cpu")
    own, theirs = told
    assert own.pop(FOLDER)
    assert own == theirs
    assert ("session.disable_prepacking" in own) == (name == "bundled")


def test_a_bundle_that_perturbs_otherwise_is_refused(made: Quantized, copy: Path) -> None:
    path = copy / bundle.MANIFEST
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("attention_values", "attention_skip"), encoding="utf-8")
    with pytest.raises(UserError, match="was exported with --stg-mode attention_skip"):
        climbed(order(made.fp8, bundle=copy))


def test_the_graph_is_read_in_the_middle_without_being_changed(
    made: Quantized, bundled: Path, walk: Walk
) -> None:
    graph = Graph(open_bundle(bundled))
    names = [graph.block_output(5), graph.layer_output("proj_out")]
    with Weights(made.fp8, torch.float32).opened() as transformer:
        outputs, inputs = walk.outputs(transformer, torch.float32)
    seen = OnnxTransformer(graph, names).run(inputs.tensors())
    again = OnnxTransformer(graph).run(inputs.tensors())["velocity"]
    assert torch.equal(seen[names[1]], again)
    assert seen[names[0]].shape == (*again.shape[:2], 128)
    assert ladder.distance(again.numpy(), outputs["velocity"]) < 0.1


def test_the_original_is_found_beside_the_file_and_must_be_that_one(
    made: Quantized, tmp_path: Path
) -> None:
    assert verify.check(order(made.fp8)).original.path == made.original
    alone = shutil.copyfile(made.fp8, tmp_path / "fp8.safetensors")
    with pytest.raises(UserError, match=r"is not there, from which .* give --original FILE"):
        verify.check(order(alone))
    other = changed(
        made.original, tmp_path / "other.safetensors", doubled(f"{PREFIX}proj_out.bias")
    )
    with pytest.raises(UserError, match=r"was quantized from a ltx-tiny\.safetensors of other sha"):
        verify.check(order(alone, original=other))
    assert verify.check(order(alone, original=made.original)).layers == layers(read_header(alone))


@pytest.mark.parametrize(
    ("wishes", "complaint"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"device": "cuda"}, "no CUDA GPU here; try cpu"),
        ({"device": "tpu"}, "'tpu' is none of cpu, cuda and cuda:N"),
        ({"bounds": ("velocity=1",)}, "unknown bound 'velocity'"),
    ],
)
def test_an_order_that_cannot_be_climbed_costs_one_line(
    made: Quantized, wishes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        verify.check(order(made.fp8, **wishes))


def test_originals_are_of_quantized_files_and_are_none_themselves(made: Quantized) -> None:
    with pytest.raises(UserError, match="is not quantized, it has no original"):
        verify.check(order(made.original, original=made.fp8))
    with pytest.raises(UserError, match="is quantized too"):
        verify.check(order(made.fp8, original=made.int8))


def command(checkpoint: Path, *options: str) -> list[str]:
    return [
        *("verify", str(checkpoint), "--text-encoder", str(TINY / "text_encoder")),
        *("--prompt", PROMPT, "--shape", "64x64x9", "--steps", "2"),
        *("--pipeline-config", str(CONFIG), *options),
    ]


def test_the_command_prints_a_table_and_writes_all_figures(
    made: Quantized, bundled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "ladder.json"
    code = cli.main(command(made.fp8, "--bundle", str(bundled), "--json", str(figures)))
    text = capsys.readouterr().out
    assert code == 0
    assert "Q/DQ coverage 60 of 60 layers (fp8)" in text
    assert "every rung is within its bounds" in text
    assert "engine skipped: there is no TensorRT engine" in text
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["passed"] is True
    assert found["bundle"] == str(bundled)
    assert {row["rung"] for row in found["rungs"]} == {"bfloat16", "quantized", "onnx"}


def test_figures_do_not_replace_anything_unasked_and_no_input_ever(
    made: Quantized, bundled: Path, tmp_path: Path, without_graph: None
) -> None:
    for path, what in (
        (made.fp8, "is the checkpoint itself"),
        (made.original, "is the original itself"),
        (CONFIG, "is the pipeline's configuration itself"),
        (TINY / "text_encoder" / "config.json", "is in the text encoder"),
        (bundled / bundle.MANIFEST, "is in the bundle"),
    ):
        with pytest.raises(UserError, match=f"--json .* {what}"):
            verify.check(order(made.fp8, bundle=bundled, figures=path, overwrite=True))
    there = tmp_path / "ladder.json"
    there.write_text("old", encoding="utf-8")
    with pytest.raises(UserError, match="is already there; give --overwrite"):
        verify.check(order(made.fp8, figures=there))
    assert cli.main(command(made.fp8, "--json", str(there), "--overwrite")) == 0
    assert json.loads(there.read_text(encoding="utf-8"))["passed"] is True


def test_figures_without_a_folder_cost_one_line_before_any_work(
    made: Quantized, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none" / "ladder.json"
    assert cli.main(command(made.fp8, "--json", str(path))) == 2
    said = capsys.readouterr().err
    assert f"there is no folder {path.parent}; create it first" in said
    assert "encoding the prompt" not in said
    assert "partial" not in said


def test_weights_that_a_bundle_has_elsewhere_are_inputs_too(
    made: Quantized, tmp_path: Path
) -> None:
    weights = tmp_path / "elsewhere.safetensors"
    shutil.copyfile(made.fp8, weights)
    out = tmp_path / "referring"
    export(weights, TINY / "text_encoder", out, "transformer", "--weights", "refer")
    with pytest.raises(UserError, match=r"is the bundle's .*elsewhere.* itself"):
        climbed(order(made.fp8, bundle=out, figures=weights, overwrite=True))


def test_a_rung_that_breaks_ends_the_command_with_1(
    made: Quantized, bundled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bound = ("--bounds", "quantized.velocity=0.0001")
    assert cli.main(command(made.fp8, "--bundle", str(bundled), *bound)) == 1
    text = capsys.readouterr().out
    assert "the first rung that breaks is quantized: velocity" in text
    assert "the worst part is transformer_blocks." in text


def test_a_mistake_ends_it_with_2(made: Quantized, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(made.fp8, "--bounds", "onnx.velocty=1")) == 2
    assert "did you mean 'onnx.velocity'?" in capsys.readouterr().err
