"""A transformer cut into prologue, one block and epilogue, whose weights are inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnxruntime")

import onnx_ir as ir
import torch

from ltx_engines import bundle as bundle_module
from ltx_engines import hashes
from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.errors import UserError
from ltx_engines.weight_inputs import HIDDEN, HIDDEN_OUT, SKIP, weight
from ltx_export import cli, weight_inputs
from ltx_export.weight_inputs import Piece
from ltx_ref.quantization import Format
from ltx_trt.session.checkpoint_weights import CheckpointWeights
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from tests.export import quantized_files

Feeds = dict[str, NDArray[Any]]
SIZES = {"batch": 2, "tokens": 10, "timesteps": 10, "text": 6}


def exported(
    folder: Path,
    choose: quantized_files.Choose | Format,
    *options: str,
    dtype: torch.dtype = torch.float32,
    blocks: int = 4,
) -> Bundle:
    file = quantized_files.write(folder / "tiny.safetensors", choose, dtype=dtype, blocks=blocks)
    arguments = ["onnx", str(file), "--stages", "transformer", "--out", str(folder / "bundle")]
    assert cli.main([*arguments, *options]) == 0
    return open_bundle(folder / "bundle", cache=folder / "cache")


def cut(bundle: Bundle) -> tuple[Piece, ...]:
    return weight_inputs.cut(ir.load(bundle.file(bundle.stage("transformer").file)))


def made_up(bundle: Bundle) -> Feeds:
    dice, feeds = np.random.default_rng(5), {}
    for tensor in bundle.stage("transformer").inputs:
        shape = tuple(a if isinstance(a, int) else SIZES[a] for a in tensor.axes)
        feeds[tensor.name] = dice.uniform(0.1, 1, shape).astype(np.float32)
    feeds["prompt_mask"] = np.ones_like(feeds["prompt_mask"])
    feeds[SKIP] = dice.integers(0, 2, feeds[SKIP].shape).astype(np.float32)
    return feeds


class Chain:
    """The pieces on ONNX Runtime, one after the other."""

    def __init__(self, bundle: Bundle) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.intra_op_num_threads = 1
        stage = bundle.stage("transformer")
        self.source = CheckpointWeights(bundle.file(name) for name in stage.weights)
        self.pieces = cut(bundle)
        self.sessions = {
            piece.name: onnxruntime.InferenceSession(
                ir.to_proto(piece.model).SerializeToString(), options
            )
            for piece in self.pieces
        }

    def __call__(self, feeds: Feeds) -> NDArray[Any]:
        prologue, *kinds, epilogue = self.pieces
        known = feeds | self.run(prologue, feeds)
        owners = {number: piece for piece in kinds for number in piece.blocks}
        for number in range(len(owners)):
            row = {SKIP: feeds[SKIP][number : number + 1]}
            known[HIDDEN] = self.run(owners[number], known | row, number)[HIDDEN_OUT]
        return self.run(epilogue, known)["velocity"]

    def run(self, piece: Piece, feeds: Mapping[str, Any], block: int | None = None) -> Feeds:
        from onnxruntime import OrtValue

        session, binding = self.sessions[piece.name], self.sessions[piece.name].io_binding()
        for value in piece.model.graph.inputs:
            name = str(value.name)
            if (pattern := piece.weights.get(name)) is None:
                binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name]))
                continue
            assert value.shape is not None
            assert value.dtype is not None
            raw = np.array(self.source(weight(pattern, block)))
            kind = raw if value.dtype.itemsize == 1 else raw.view(value.dtype.numpy())
            typed = kind.reshape(value.shape.numpy())
            number = int(value.dtype)
            binding.bind_ortvalue_input(
                name,
                OrtValue.ortvalue_from_numpy_with_onnx_type(typed, number)
                if value.dtype == ir.DataType.FLOAT8E4M3FN
                else OrtValue.ortvalue_from_numpy(typed.view(value.dtype.numpy())),
            )
        outputs = [node.name for node in session.get_outputs()]
        for name in outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        found = zip(outputs, binding.get_outputs(), strict=True)
        return {name: value.numpy() for name, value in found}


def some(path: str) -> Format | None:
    """The first block keeps its floats, as many recipes want it."""
    return None if "_blocks.0." in path else "fp8"


@pytest.mark.parametrize(
    "choose",
    [(lambda _: None), "fp8", some, "int8-wo", "fp8-cast"],
    ids=["float32", "fp8", "some fp8", "int8-wo", "fp8-cast"],
)
def test_the_pieces_one_after_the_other_are_the_transformer(
    tmp_path: Path, choose: quantized_files.Choose | Format
) -> None:
    """Where the scales stand makes no difference: what rounds is the same."""
    bundle = exported(tmp_path, choose, blocks=3)
    feeds = made_up(bundle)
    with OnnxRuntimeSession.open(bundle, "transformer", threads=1) as session:
        wanted = session(feeds)["velocity"]
    found = Chain(bundle)(feeds)
    assert np.linalg.norm(found - wanted) <= 2e-6 * np.linalg.norm(wanted)


def test_blocks_that_differ_in_weights_alone_are_one_kind(tmp_path: Path) -> None:
    bundle = exported(tmp_path, some)
    pieces = {piece.name: piece.blocks for piece in cut(bundle)}
    assert pieces == {"prologue": (), "block_0": (0,), "block_1": (1, 2, 3), "epilogue": ()}


def test_a_block_knows_neither_its_number_nor_how_many_there_are(tmp_path: Path) -> None:
    graphs = []
    for blocks in (3, 5):
        (folder := tmp_path / str(blocks)).mkdir()
        pieces = cut(exported(folder, "fp8", blocks=blocks))
        assert pieces[1].blocks == tuple(range(blocks))
        graphs.append([ir.to_proto(piece.model).SerializeToString() for piece in pieces])
    assert graphs[0] == graphs[1]


def test_every_weight_is_an_input_with_a_name_in_the_checkpoint(tmp_path: Path) -> None:
    bundle = exported(tmp_path, "fp8", dtype=torch.bfloat16)
    prologue, block, epilogue = cut(bundle)
    assert block.weights["attn1.to_q.weight_scale"] == (
        "model.diffusion_model.transformer_blocks.{block}.attn1.to_q.weight_scale"
    )
    assert epilogue.weights == {name: name for name in epilogue.weights}
    for piece in (prologue, block, epilogue):
        inside = piece.model.graph.initializers.values()
        assert all(value.const_value is not None for value in inside)
        assert max(value.const_value.size for value in inside if value.const_value) <= 128
    inputs = {str(value.name): value for value in block.model.graph.inputs}
    assert inputs["attn1.to_q.weight"].dtype == ir.DataType.FLOAT8E4M3FN
    assert inputs[HIDDEN].shape == ir.Shape(["batch", "tokens", 128])
    assert inputs[SKIP].shape == ir.Shape([1, "batch"])
    timesteps = inputs["model.diffusion_model.adaln_single.linear/Add:0"].shape
    assert timesteps == ir.Shape(["batch", "timesteps", 768])


def test_four_bits_are_no_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"four bits.*--engine-weights embedded"):
        cut(exported(tmp_path, "int4-wo", blocks=3))


@pytest.mark.parametrize(
    ("form", "kind", "dtype", "capability"),
    [
        ("fp8", "FP8", torch.bfloat16, "SM89"),
        ("int8", "Int8", torch.float16, "SM75"),
        (None, None, torch.bfloat16, "SM120"),
    ],
)
def test_a_builder_multiplies_codes_that_are_inputs_and_copies_no_weight(
    tmp_path: Path, form: Format | None, kind: str | None, dtype: torch.dtype, capability: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")
    import engine_layers
    from ltx_export import layer_table

    options = ("--opset", "23")
    bundle = exported(tmp_path, form or (lambda _: None), *options, dtype=dtype, blocks=3)
    _, block, _ = cut(bundle)
    ir.save(block.model, tmp_path / "block.onnx")
    sizes = {"batch": 1, "tokens": 1024, "timesteps": 1, "text": 256}
    built = engine_layers.build(tmp_path / "block.onnx", sizes, capability)
    found = layer_table.products(built.layers)
    layers = {
        name.removesuffix(".weight") for name in block.weights if ".to_" in name or ".net" in name
    }
    layers = {name for name in layers if f"{name}.weight" in block.weights}
    assert len(layers) == 10
    assert found == ({} if kind is None else {layer: {kind: 1} for layer in layers})
    assert layer_table.attentions(built.layers) == 2
    assert not layer_table.scores(built.layers, [1024])
    wide = {"BFloat16", "Half", "FP8", "Int8"}
    weights = {f"{layer}.weight" for layer in layers}
    for layer in built.layers:
        read = {operand.name for operand in layer.inputs} & weights
        if read:  # a product reads it, and nothing makes another of it
            assert not [o for o in layer.outputs if o.dtype in wide and o.shape[-2:] == (128, 128)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")
    folder = tmp_path_factory.mktemp("engines")
    out = exported(folder, some, dtype=torch.bfloat16, blocks=3).path
    assert built(out) == 0
    return out


def test_a_chain_says_which_weights_each_piece_takes(bundle: Path) -> None:
    opened = open_bundle(bundle)
    chain = opened.engines("transformer", 89, "tensorrt-rtx")
    assert [engine.blocks for engine in chain] == [(), (0,), (1, 2), ()]
    assert {engine.weights for engine in chain} == {"inputs"}
    assert len({engine.key.graph for engine in chain}) == 1
    assert not any(engine.key.weights for engine in chain)
    counts = [engine.counts.get("products in FP8", 0) for engine in chain]
    assert counts == [0, 0, 10, 0]
    for engine in chain:
        assert engine.bound.keys() < {tensor.name for tensor in engine.inputs}


def test_it_is_up_to_date_for_another_checkpoint_of_these_sizes(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (weights,) = open_bundle(bundle).stage("transformer").weights
    with (bundle / weights).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    manifest = bundle_module.read(bundle)
    entry = manifest.files[weights].model_copy(update={"sha256": hashes.sha256(bundle / weights)})
    files = manifest.files | {weights: entry}
    bundle_module.update(bundle, manifest.model_copy(update={"files": files}))
    assert built(bundle) == 0
    assert capsys.readouterr().out.endswith("up to date (transformer)\n")


def test_parts_and_pieces_do_not_go_together(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built(bundle, "--split", "2") == 2
    assert "--split is for engines that hold their weights" in capsys.readouterr().err


def built(bundle: Path, *options: str) -> int:
    usual = ("--stages", "transformer", "--gpu", "sm89", "--shape", "64x64x9", "--branches", "1")
    command = ["build-engine", str(bundle), *usual, "--engine-weights", "inputs"]
    return cli.main([*command, *options])
