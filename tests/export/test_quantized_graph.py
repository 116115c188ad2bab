"""Quantized layers compute in a graph what their codes mean, from the bytes that the file has."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from ltx_engines import cpu
from ltx_engines.bundle import (
    Bundle,
    Precision,
    QuantizationEntry,
    QuantizedFormat,
    open_bundle,
)
from ltx_engines.errors import UserError
from ltx_export import (
    cli,
    coverage,
    invariants,
    lower,
    onnxruntime_graph,
    quantized_graph,
    weights,
)
from ltx_export.graphs import Graphs, Model
from ltx_export.onnx_bundle import check_graph
from ltx_ref import quantization
from ltx_ref.checkpoint import Header, read_header
from ltx_ref.ltx_video import model as ltx_video
from ltx_ref.ltx_video.config import read_config
from ltx_ref.quantization import CALIBRATED, FORMATS, Format
from ltx_ref.quantized import QuantizedLinear
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from tests.export import quantized_files
from tests.export.by_hand import computed, evaluated, parsed
from tests.export.quantized_files import as_tensor, encoded, input_of, parts_of, weight_of
from tests.ref.oracles import difference, normals

Array = NDArray[Any]

EXACT = 1e-5
"""Of the largest value: sums of float32 products, in another order."""

ONES = ("int8", "int8 smooth", "fp8", "fp8-cast", "int8-wo", "int4-wo")
"""What ONNX Runtime computes."""

N, K = 48, 256


@dataclass(frozen=True, slots=True)
class Quantized:
    """A graph whose weights are in a quantized file, and how many products were made integers."""

    model: ir.Model
    header: Header
    integers: int = 0

    def save(self) -> Path:
        proto = ir.to_proto(self.model)
        del proto.graph.value_info[:]
        check_graph(proto)
        path = self.header.path.with_suffix(".onnx")
        path.write_bytes(proto.SerializeToString())
        return path

    def kinds(self) -> Counter[str]:
        return Counter(node.op_type for node in self.model.graph)


def quantized(model: ir.Model, path: Path, *, specialised: bool = True) -> Quantized:
    header = read_header(path)
    quantized_graph.insert(model, quantization.layers(header), quantized_graph.reader(header))
    found = weights.weights_of(header, path.name)
    quantized_graph.widen(model, found)
    integers = onnxruntime_graph.specialise(model) if specialised else 0
    weights.bind(model, found)
    model.ir_version = 10
    return Quantized(model, header, integers)


def covered(graph: Quantized, model: ir.Model | None = None) -> coverage.Coverage:
    """Of the graph, or of one that was made of it."""
    layers, read = quantization.layers(graph.header), quantized_graph.reader(graph.header)
    return coverage.count(model or graph.model, layers, read)


def run_all(path: Path, feeds: Mapping[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def run(path: Path, feeds: Mapping[str, Array]) -> Array:
    (result,) = run_all(path, feeds)
    return result


def one_layer(
    path: Path, name: str, dtype: torch.dtype = torch.float32, rows: int = N
) -> tuple[Format, dict[str, Array]]:
    """A file with a layer `one` and its bias; format and parts."""
    form, _, smooth = name.partition(" ")
    (chosen,) = [known for known in FORMATS if known == form]
    weight = normals(rows, K, seed=1).numpy() / 16
    parts = encoded(weight, chosen, 4.0, smooth=bool(smooth))
    bias = normals(rows, seed=2).to(dtype)
    tensors = {f"one.{part}": as_tensor(array) for part, array in parts.items()}
    save_file(tensors | {"one.bias": bias}, path)
    return chosen, parts | {"bias": bias.float().numpy()}


def linear(kind: str = "float", rows: int = N, opset: int = 20) -> ir.Model:
    weight = f"{kind}[{rows},{K}] weight, {kind}[{rows}] bias"
    text = f"""g ({kind}[B,T,{K}] x) => ({kind}[B,T,{rows}] y)
    <{weight}, {kind}[{K},{rows}] t, {kind}[B,T,{rows}] m> {{
        ["one/Transpose"] t = Transpose<perm = [1, 0]>(weight)
        ["one/MatMul"] m = MatMul(x, t)
        ["one/Add"] y = Add(m, bias)
    }}"""
    return named(parsed(text, opset, ["weight", "bias"]))


def named(model: ir.Model) -> ir.Model:
    """ONNX's text has no names with a dot."""
    for value in list(model.graph.initializers.values()):
        value.name = f"one.{value.name}"
    return model


@pytest.mark.parametrize("shape", [(1, 1, K), (2, 7, K)])
@pytest.mark.parametrize("name", ONES)
def test_a_layer_is_its_formula_in_float64_onnx_runtime_and_pytorch(
    tmp_path: Path, name: str, shape: tuple[int, int, int]
) -> None:
    form, parts = one_layer(tmp_path / "one.safetensors", name)
    x = 1.3 * normals(*shape, seed=3)
    x[..., :3] = torch.tensor([5.0, -5.0, 0.0])  # beyond the range, and nothing
    wanted = input_of(x.numpy(), parts, form) @ weight_of(parts, form).T + parts["bias"]
    graph = quantized(linear(), tmp_path / "one.safetensors")
    found = run(graph.save(), {"x": x.numpy()})
    assert graph.integers == (form == "int8")
    assert difference(torch.from_numpy(found), torch.from_numpy(wanted)) < EXACT
    tensors = {part: as_tensor(array) for part, array in parts.items() if part != "bias"}
    layer = QuantizedLinear.of(form, tensors, torch.from_numpy(parts["bias"]))
    assert difference(layer(x), torch.from_numpy(wanted)) < EXACT
    float_weight = normals(N, K, seed=1) / 16
    assert difference(x @ float_weight.T + torch.from_numpy(parts["bias"]), layer(x)) > 50 * EXACT


@pytest.mark.parametrize("name", ["int8", "int8 smooth"])
def test_unsigned_activations_give_the_numbers_of_signed_ones(tmp_path: Path, name: str) -> None:
    one_layer(tmp_path / "one.safetensors", name)
    x = 1.3 * normals(2, 7, K, seed=3).numpy()
    signed = quantized(linear(), tmp_path / "one.safetensors", specialised=False)
    assert signed.kinds()["QGemm"] == 0
    wanted = run(signed.save(), {"x": x})
    unsigned = quantized(linear(), tmp_path / "one.safetensors")
    assert unsigned.kinds()["QGemm"] == 1
    assert "DequantizeLinear" not in unsigned.kinds()
    found = run(unsigned.save(), {"x": x})
    assert difference(torch.from_numpy(found), torch.from_numpy(wanted)) < EXACT


@pytest.mark.parametrize("name", ONES)
def test_a_float16_stage_has_float32_scales(tmp_path: Path, name: str) -> None:
    """A scale of 1e-6 is nothing in float16."""
    form, parts = one_layer(tmp_path / "one.safetensors", name, torch.float16)
    graph = quantized(linear("float16"), tmp_path / "one.safetensors")
    x = normals(2, 5, K, seed=3).numpy().astype(np.float16)
    found = run(graph.save(), {"x": x})
    assert found.dtype == np.float16
    wanted = input_of(x, parts, form) @ weight_of(parts, form).T + parts["bias"]
    assert difference(torch.from_numpy(found), torch.from_numpy(wanted)) < 2e-3
    scales = [v for n, v in graph.model.graph.initializers.items() if n.endswith("_scale")]
    assert all(value.dtype == ir.DataType.FLOAT for value in scales)
    assert len(scales) == sum(part.endswith("_scale") for part in parts)


@pytest.mark.parametrize("form", FORMATS)
def test_a_bfloat16_stage_for_tensorrt_keeps_its_type_between_codes(
    tmp_path: Path, form: Format
) -> None:
    one_layer(tmp_path / "one.safetensors", form, torch.bfloat16)
    graph = quantized(linear("bfloat16", opset=23), tmp_path / "one.safetensors", specialised=False)
    graph.save()
    for node in graph.model.graph:
        if node.op_type == "MatMul":
            assert [value and value.dtype for value in node.inputs] == [ir.DataType.BFLOAT16] * 2
        if node.op_type in ("QuantizeLinear", "TRT_FP4DynamicQuantize"):
            assert node.inputs[0] is graph.model.graph.inputs[0], "no cast in front of the codes"
    quantizers = {"nvfp4": "TRT_FP4DynamicQuantize"}.get(form, "QuantizeLinear")
    assert graph.kinds()[quantizers] == (form in CALIBRATED)


@pytest.mark.parametrize("form", FORMATS)
def test_codes_and_scales_are_the_files_bytes_under_the_files_names(
    tmp_path: Path, form: Format
) -> None:
    _, parts = one_layer(tmp_path / "one.safetensors", form)
    graph = quantized(linear(opset=23), tmp_path / "one.safetensors", specialised=False)
    proto = onnx.load(graph.save(), load_external_data=False)
    external = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {t.name for t in external} == {f"one.{part}" for part in parts}
    for tensor in external:
        place, info = {e.key: e.value for e in tensor.external_data}, graph.header.tensors
        begin, end = info[tensor.name].begin, info[tensor.name].end
        assert (int(place["offset"]), int(place["length"])) == (begin, end - begin)
    kind = {t.name: t.data_type for t in external}["one.weight"]
    assert kind == int(quantized_graph.CODES[form])


def test_an_opset_too_low_for_a_format_is_raised_or_refused(tmp_path: Path) -> None:
    one_layer(tmp_path / "one.safetensors", "int4-wo")
    graph = quantized(linear(), tmp_path / "one.safetensors")
    assert graph.model.graph.opset_imports[""] == 21
    one_layer(tmp_path / "one.safetensors", "nvfp4")
    with pytest.raises(UserError, match=r"one is nvfp4, which only TensorRT computes, on SM120"):
        quantized(linear(), tmp_path / "one.safetensors")


def test_a_quantized_weight_of_anything_but_a_product_is_named(tmp_path: Path) -> None:
    one_layer(tmp_path / "one.safetensors", "int8")
    table = f"<float[{N},{K}] weight> {{ y = Gather(weight, x) }}"
    model = named(parsed(f"g (int64[T] x) => (float[T,{K}] y) {table}", 20, ["weight"]))
    with pytest.raises(UserError, match=r"one\.weight is int8 in the file, and not of a linear"):
        quantized(model, tmp_path / "one.safetensors")


TINY_BLOCKS = 6
LINEARS = 10 * TINY_BLOCKS


def tiny(path: Path, precision: Precision = "float32", opset: int = 20) -> ir.Model:
    return graphs_of(path).graph("transformer", precision, opset)


def graphs_of(path: Path) -> Graphs:
    return Graphs(Model(read_config(read_header(path))))


def feeds_of(batch: int = 2, tokens: int = 35, words: int = 7) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, words)
    mask[-1, 3:] = 0
    coords = normals(batch, 3, tokens, seed=2).abs() * torch.tensor([4.0, 700, 1200])[:, None]
    return {
        "latents": normals(batch, tokens, 32, seed=1),
        "coords": coords,
        "timestep": normals(batch, 1, seed=3).sigmoid(),
        "prompt_embeds": normals(batch, words, 128, seed=4),
        "prompt_mask": mask,
        "skip_layer_mask": torch.ones(TINY_BLOCKS, batch),
    }


FLIPS = 0.9
"""Of what quantization itself changes. One activation on the edge between two codes falls on either
side, and all that follows differs."""


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ONES)
def test_a_whole_transformer_is_that_of_pytorch(tmp_path: Path, name: str) -> None:
    form, _, smooth = name.partition(" ")
    (chosen,) = [known for known in FORMATS if known == form]
    path = quantized_files.write(tmp_path / "q.safetensors", chosen, smooth=bool(smooth))
    graph = quantized(tiny(path), path)
    table = graphs_of(path).model
    invariants.check(graph.model, table.table("transformer"), "float32", table.derived())
    counted = covered(graph)
    assert (counted.counts(), counted.missing) == ({chosen: LINEARS}, {})
    assert graph.integers == (LINEARS if form == "int8" else 0)
    feeds = feeds_of()
    found = torch.from_numpy(run(graph.save(), {n: f.numpy() for n, f in feeds.items()}))
    reference = ltx_video.load(path).transformer(**feeds)
    floats = ltx_video.load(quantized_files.TINY).transformer.float()(**feeds)
    apart, changed = distance(found, reference), distance(reference, floats)
    assert apart < (FLIPS * changed if chosen in CALIBRATED else 3e-5)
    assert changed > 1e-3


def with_inner(path: Path, names: Sequence[str]) -> Path:
    """The graph, whose outputs are these of its values."""
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.output[:]
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("name", ["int8", "int8 smooth", "fp8"])
def test_each_layer_of_a_transformer_gives_pytorchs_output_for_its_own_input(
    tmp_path: Path, name: str
) -> None:
    form, _, smooth = name.partition(" ")
    chosen: Format = "int8" if form == "int8" else "fp8"
    path = quantized_files.write(tmp_path / "q.safetensors", chosen, smooth=bool(smooth))
    model = tiny(path)
    products = {str(n.name): n for n in model.graph if n.op_type == "MatMul"}
    inputs = {layer: products[f"{layer}/MatMul"].inputs[0] for layer in quantization_layers()}
    sources = {layer: str(value.name) for layer, value in inputs.items() if value is not None}
    wanted = sorted({*sources.values(), *(f"{layer}/Add:0" for layer in sources)})
    saved = with_inner(quantized(model, path).save(), wanted)
    feeds = {n: f.numpy() for n, f in feeds_of().items()}
    found = dict(zip(wanted, map(torch.from_numpy, run_all(saved, feeds)), strict=True))
    modules = dict(ltx_video.load(path).named_modules())
    assert len(sources) == LINEARS
    for layer, source in sources.items():
        module = modules[layer]
        assert isinstance(module, QuantizedLinear)
        assert difference(found[f"{layer}/Add:0"], module(found[source])) < EXACT, layer


def test_layers_that_read_one_tensor_with_one_scale_share_its_codes(tmp_path: Path) -> None:
    """to_q, to_k and to_v of self-attention, and the text of all blocks: TensorRT merges them."""
    path = quantized_files.write(tmp_path / "q.safetensors", "fp8")
    graph = quantized(tiny(path, opset=23), path)
    of_each_block = {"attn1 in", "attn1 out", "attn2 q", "attn2 out", "ff in", "ff out"}
    assert graph.kinds()["QuantizeLinear"] == len(of_each_block) * TINY_BLOCKS + 1


def test_layers_of_different_ranges_do_not_share(tmp_path: Path) -> None:
    names = [layer for layer in quantization_layers() if layer.endswith("attn1.to_k")]
    limits = dict.fromkeys(quantization_layers(), 6.0) | dict.fromkeys(names, 7.0)
    path = quantized_files.write(tmp_path / "q.safetensors", "fp8", amax=limits)
    graph = quantized(tiny(path, opset=23), path)
    assert graph.kinds()["QuantizeLinear"] == 7 * TINY_BLOCKS + 1
    assert not covered(graph).missing


def quantization_layers() -> list[str]:
    header = read_header(quantized_files.TINY)
    shapes = header.shapes().items()
    linears = [n for n, shape in shapes if quantized_files.is_linear(n, shape)]
    assert len(linears) == LINEARS
    return [name.removesuffix(".weight") for name in linears]


def test_layers_may_have_different_formats(tmp_path: Path) -> None:
    def choose(layer: str) -> Format | None:
        return "int8" if ".ff." in layer else "int8-wo" if "attn1" in layer else None

    path = quantized_files.write(tmp_path / "q.safetensors", choose)
    graph = quantized(tiny(path), path)
    counted = covered(graph)
    assert counted.counts() == {"int8-wo": 4 * TINY_BLOCKS, "int8": 2 * TINY_BLOCKS}
    assert graph.integers == 2 * TINY_BLOCKS
    feeds = feeds_of()
    found = torch.from_numpy(run(graph.save(), {n: f.numpy() for n, f in feeds.items()}))
    reference = ltx_video.load(path).transformer(**feeds)
    floats = ltx_video.load(quantized_files.TINY).transformer.float()(**feeds)
    assert distance(found, reference) < FLIPS * distance(reference, floats)


def test_attention_in_one_node_is_attention(tmp_path: Path) -> None:
    """With and without a mask, for one query and many."""
    path = quantized_files.write(tmp_path / "f.safetensors", lambda _: None)
    for tokens, words in ((1, 1), (13, 5)):
        named = {n: f.numpy() for n, f in feeds_of(2, tokens, words).items()}
        wanted = run(quantized(tiny(path), path).save(), named)
        fused = tiny(path)
        assert onnxruntime_graph.fuse_attention(fused) == 2 * TINY_BLOCKS
        assert onnxruntime_graph.repeat_by_concat(fused) == 2
        graph = quantized(fused, path)
        assert graph.kinds()["MultiHeadAttention"] == 2 * TINY_BLOCKS
        found = run(graph.save(), named)
        assert difference(torch.from_numpy(found), torch.from_numpy(wanted)) < EXACT


@pytest.mark.parametrize("mask", ["", ", mask"])
def test_attention_in_one_node_keeps_a_scale_of_its_own(mask: str) -> None:
    """1 / sqrt(6) would be taken if there were none."""
    inputs = "float[B,T,24] q, float[B,S,24] k, float[B,S,24] v"
    given = "" if not mask else ", float[B,1,1,S] mask"
    attention = "Attention<q_num_heads = 4, kv_num_heads = 4, scale = 1.5>"
    text = f"""g ({inputs}{given}) => (float[B,T,24] y)
    {{ ["a.attn/Attention"] y = {attention}(q, k, v{mask}) }}"""
    shapes = {"q": (2, 5, 24), "k": (2, 7, 24), "v": (2, 7, 24), "mask": (2, 1, 1, 7)}
    names = ["q", "k", "v", *(["mask"] if mask else [])]
    feeds = {n: normals(*shapes[n], seed=i).numpy() for i, n in enumerate(names)}
    wanted, fused = evaluated(parsed(text), feeds), parsed(text)
    lower.lower(fused)
    assert onnxruntime_graph.fuse_attention(fused) == 1
    found = computed(fused, feeds)
    assert difference(torch.from_numpy(found), torch.from_numpy(wanted)) < EXACT


def test_integer_products_are_promised_to_onnx_runtime_alone(tmp_path: Path) -> None:
    path = quantized_files.write(tmp_path / "q.safetensors", "int8")
    graph = quantized(tiny(path), path)
    table = graphs_of(path).model
    graph.model.graph.opset_imports[""] = 23
    said = r"/QGemm_\d is a com\.microsoft:QGemm, which TensorRT does not have"
    with pytest.raises(AssertionError, match=said):
        invariants.check(graph.model, table.table("transformer"), "float32", table.derived())


def test_a_graph_without_int8_layers_stays_readable_for_all(tmp_path: Path) -> None:
    path = quantized_files.write(tmp_path / "q.safetensors", "int8-wo")
    graph = quantized(tiny(path), path)
    assert {node.domain for node in graph.model.graph} == {""}
    assert graph.kinds()["Softmax"] == 2 * TINY_BLOCKS
    assert set(parts_of(quantized_files.read(path), quantization_layers()[0])) == {
        "weight",
        "weight_scale",
    }


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Format], Bundle]:
    """ltx-tiny's transformer from the command line, in float32 but for its quantized layers."""
    folder = tmp_path_factory.mktemp("bundles")

    @cache
    def export(form: Format) -> Bundle:
        path, out = folder / f"{form}.safetensors", folder / form
        if form in CALIBRATED:
            quantized_files.write(path, form, dtype=torch.bfloat16)
        else:
            tiny_file = str(quantized_files.TINY)
            assert cli.main(["quantize", tiny_file, "--recipe", form, "--out", str(path)]) == 0
        options = ["--stages", "transformer", "--precision", "float32", "--out", str(out)]
        assert cli.main(["onnx", str(path), *options]) == 0
        return open_bundle(out, cache=folder / "cache")

    return export


@pytest.mark.parametrize("form", ["int8", "fp8", "fp8-cast", "int8-wo", "int4-wo"])
def test_a_bundle_of_a_quantized_file_says_so_and_runs(
    bundles: Callable[[Format], Bundle], form: Format
) -> None:
    """The floats of the file are cast, its codes and scales are not."""
    bundle = bundles(form)
    entry = bundle.stage("transformer")
    recipe = None if form in CALIBRATED else form
    assert entry.quantization == QuantizationEntry(recipe=recipe, layers={form: LINEARS})
    assert bundle.manifest.toolchain["opset"] == str(entry.opset)
    assert entry.opset == (21 if form == "int4-wo" else 20)
    feeds = {name: feed.numpy() for name, feed in feeds_of().items()}
    with OnnxRuntimeSession.open(bundle, "transformer", threads=1) as session:
        found = torch.from_numpy(session(feeds)["velocity"])
    wide = ltx_video.load(bundle.path.with_name(f"{form}.safetensors")).transformer.float()
    reference = wide(**feeds_of())
    assert distance(found, reference) < (0.05 if form in CALIBRATED else 3e-5)


def test_a_cpu_whose_sums_would_saturate_computes_the_same_numbers(
    bundles: Callable[[Format], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By weights without a sign: ONNX Runtime makes them wherever x86 has two kinds of products."""
    bundle, found = bundles("int8"), {}
    feeds = {name: feed.numpy() for name, feed in feeds_of().items()}
    for saturating in (False, True):
        monkeypatch.setattr(cpu, "saturates", lambda known=saturating: known)
        with OnnxRuntimeSession.open(bundle, "transformer", threads=1) as session:
            found[saturating] = session(feeds)["velocity"]
    assert np.array_equal(found[True], found[False])


def test_no_two_integer_products_share_zero_points(tmp_path: Path) -> None:
    """The session that makes weights unsigned could not be opened."""
    path = quantized_files.write(tmp_path / "q.safetensors", "int8")
    products = [node for node in quantized(tiny(path), path).model.graph if node.op_type == "QGemm"]
    names = [node.inputs[5] and node.inputs[5].name for node in products]
    assert set(names) == {f"{layer}.weight_zero_point" for layer in quantization_layers()}
    assert len(names) == LINEARS


def test_nvfp4_is_refused_for_onnx_runtime_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = quantized_files.write(tmp_path / "q.safetensors", "nvfp4", dtype=torch.bfloat16)
    options = ["--stages", "transformer", "--opset", "20", "--out", str(tmp_path / "out")]
    assert cli.main(["onnx", str(path), *options]) == 2
    said = capsys.readouterr().err
    assert "is nvfp4, which only TensorRT computes, on SM120: export it with --opset 23" in said
    assert not (tmp_path / "out").exists()


def test_the_manifest_knows_every_format() -> None:
    assert get_args(QuantizedFormat) == FORMATS
