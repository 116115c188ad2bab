"""`build-engine --refittable`: which weights are marked, and who hears that it needs a GPU."""

from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")

import tensorrt_rtx as trt
import torch

from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_export import card, cli, engine_jobs, engine_order, engine_work, refittable
from ltx_export.card import Card
from ltx_export.engine_order import Order
from ltx_ref.checkpoint import Header, read_header
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX as PREFIX
from ltx_ref.quantization import Format
from tests.export import quantized_files

FORMATS: tuple[Format | None, ...] = (None, "fp8", "int8")
USUAL = Order(("sm89",), ("64x64x9",), ("transformer",), refittable=True)


def exported(folder: Path, form: Format | None) -> Path:
    file = folder / "tiny.safetensors"
    quantized_files.write(file, form or (lambda _: None), dtype=torch.bfloat16)
    arguments = ["onnx", str(file), "--stages", "transformer", "--opset", "23"]
    assert cli.main([*arguments, "--out", str(folder / "bundle")]) == 0
    return folder / "bundle"


@pytest.fixture(scope="module", params=FORMATS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("refittable"), request.param)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "at_hand", lambda: Card("RTX 4090", 89, 2**34))


def linear(header: Header) -> set[str]:
    """The transformer's, with their scales."""
    ours = {n: i for n, i in header.tensors.items() if n.startswith(PREFIX)}
    weights = {n for n, i in ours.items() if n.endswith(".weight") and len(i.shape) == 2}
    return weights | {f"{n}_scale" for n in weights if f"{n}_scale" in ours}


def test_every_linear_weight_is_one_of_the_network_under_its_own_name(bundle: Path) -> None:
    opened = open_bundle(bundle)
    graph = opened.file(opened.stage("transformer").file)
    names = refittable.names(graph)
    assert len(set(names)) == len(names)
    assert set(names) == linear(read_header(opened.file(opened.manifest.checkpoint)))
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    assert trt.OnnxParser(network, logger).parse_from_file(str(graph))
    for name in names:
        assert network.mark_weights_refittable(name)
        assert network.are_weights_marked_refittable(name)


def test_each_part_has_its_own_weights_marked(bundle: Path, tmp_path: Path, with_gpu: None) -> None:
    opened = open_bundle(bundle)
    order = Order(("sm89",), ("64x64x9",), ("transformer",), refittable=True, split=2)
    works = engine_work.works(opened, engine_work.keys(opened, "transformer", order))
    pieces = engine_jobs.pieces(opened, works, tmp_path)
    jobs = [engine_jobs.job(work, pieces[work.name], order, tmp_path) for work in works]
    first, second = (set(job.refittable) for job in jobs)
    assert not first & second
    assert first | second == linear(read_header(opened.file(opened.manifest.checkpoint)))
    assert any(".0.attn1" in name for name in first)
    assert any(".5.attn1" in name for name in second)


def test_it_is_part_of_the_transformers_key_and_of_no_others(bundle: Path, with_gpu: None) -> None:
    opened = open_bundle(bundle)
    (key,) = engine_work.keys(opened, "transformer", USUAL)
    assert key.options["refittable"] == 1
    plain = Order(("sm89",), ("64x64x9",), ("transformer",))
    assert "refittable" not in engine_work.keys(opened, "transformer", plain)[0].options


def test_without_a_gpu_it_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "at_hand", lambda: None)
    source, out = tmp_path / "none.safetensors", tmp_path / "out"
    source.touch()
    command = ["build-engine", str(source), "--gpu", "sm89", "--refittable", "--out", str(out)]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "--refittable wants a GPU while it builds" in said
    assert "ltx-export lora FILE:STRENGTH" in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_engines_that_hold_no_weights_take_loras_anyway(with_gpu: None) -> None:
    order = Order(("sm89",), ("64x64x9",), refittable=True, engine_weights="inputs")
    with pytest.raises(UserError, match="--engine-weights inputs take LoRAs anyway"):
        engine_order.check_early(order)


def test_the_builder_still_refuses_a_marked_weight_without_a_gpu() -> None:
    """When a version of it does not, `refittable.check` is to be asked less of."""
    if card.at_hand() is not None:
        pytest.skip("there is a GPU")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    source = network.add_input("x", trt.float16, (8, 64))
    weights = trt.Weights(torch.ones(64, 64, dtype=torch.float16).numpy())
    constant = network.add_constant((64, 64), weights)
    network.set_weights_name(weights, "w")
    none, turned = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
    product = network.add_matrix_multiply(source, none, constant.get_output(0), turned)
    network.mark_output(product.get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    assert builder.build_serialized_network(network, config) is not None
    assert network.mark_weights_refittable("w")
    assert builder.build_serialized_network(network, config) is None
