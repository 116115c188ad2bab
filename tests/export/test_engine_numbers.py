"""--precision, --recipe and --rest-precision: what engines compute in, and the way to it."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from ltx_engines import bundle, targets
from ltx_engines.errors import UserError
from ltx_export import calibration, engine_numbers, engine_source, onnx_bundle, quantize, recipes
from ltx_export.engine_numbers import NOTHING, Numbers, Words
from ltx_export.onnx_order import Order
from ltx_ref.checkpoint import read_header
from tests.export import quantized_files

NAME = "tiny.safetensors"
SHIPPED = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
FP8_CAST = recipes.load("fp8-cast")
FP8 = recipes.load("fp8")


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    return quantized_files.write(folder / NAME, lambda _: None, dtype=dtype, blocks=1)


def order(source: Path, out: Path) -> Order:
    return Order(source, out, stages=("transformer",))


def prepared(source: Path, numbers: Numbers) -> bundle.Manifest:
    out = source.parent / "bundle"
    for _ in engine_source.prepare(order(source, out), numbers):
        pass
    return bundle.read(out)


def ranges(file: Path) -> Path:
    out = file.with_suffix(".calibration.safetensors")
    found = {
        name.removesuffix(".weight"): np.full(shape[1], 6.0, np.float32)
        for name, shape in read_header(file).shapes().items()
        if quantized_files.is_linear(name, shape)
    }
    facts = {"format_version": calibration.FORMAT, "done": 1, "runs": 1} | {
        "checkpoint": calibration.identity(file)
    }
    calibration.write(calibration.Calibration(out, found, facts))
    return out


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (Words(), NOTHING),
        (Words("bf16"), Numbers(floats="bfloat16")),
        (Words("float16"), Numbers(floats="float16")),
        (Words("fp8-cast"), Numbers(FP8_CAST)),
        (Words("fp8-cast", rest_precision="fp16"), Numbers(FP8_CAST, floats="float16")),
        (Words(recipe="fp8-cast"), Numbers(FP8_CAST)),
        (Words("fp8", calibration=Path("c")), Numbers(FP8, Path("c"))),
    ],
)
def test_words_mean_numbers(words: Words, numbers: Numbers) -> None:
    assert engine_numbers.read(words) == numbers


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (Words("fp9"), "unknown precision 'fp9'; did you mean 'fp8'"),
        (Words(rest_precision="fp8"), "--rest-precision fp8: it is of what is not quantized"),
        (Words("fp8", rest_precision="fp32"), "--rest-precision fp32: .* fp16 or bf16"),
        (Words("fp8", rest_precision="float32"), "--rest-precision float32: .* fp16 or bf16"),
        (Words(rest_precision="bf17"), "did you mean 'bf16'"),
        (Words("bf16", rest_precision="fp16"), "--rest-precision is given too"),
        (Words("bf16", recipe="fp8"), "--recipe is given too"),
        (Words("fp8", recipe="mine.toml"), "is a recipe already; leave out --recipe"),
        (Words(recipe="missing.toml"), "cannot read the recipe missing.toml"),
        (Words("bf16", calibration=Path("c")), "--calibration is for a recipe"),
    ],
)
def test_words_that_contradict_each_other_cost_one_line(words: Words, said: str) -> None:
    with pytest.raises(UserError, match=said) as failure:
        engine_numbers.read(words)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("numbers", "gpu", "said"),
    [
        (Numbers(FP8), "sm86", "fp8 needs SM89 or newer"),
        (Numbers(floats="bfloat16"), "sm75", "bf16 needs SM80 or newer"),
    ],
)
def test_a_gpu_that_has_no_such_numbers_is_refused(numbers: Numbers, gpu: str, said: str) -> None:
    cards = targets.find("sm120"), targets.find(gpu)
    with pytest.raises(UserError, match=said):
        engine_numbers.check_cards(numbers, cards)
    engine_numbers.check_cards(numbers, cards[:1])


def test_a_checkpoint_is_quantized_on_the_way_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = checkpoint(tmp_path)
    manifest = prepared(file, Numbers(FP8_CAST))
    entry = manifest.stages["transformer"].quantization
    assert entry is not None
    assert (entry.recipe, entry.layers) == ("fp8-cast", {"fp8-cast": 10})
    assert manifest.checkpoint == "tiny-fp8-cast.safetensors"
    assert manifest.stages["transformer"].opset == 23
    assert not list(tmp_path.glob(".*"))
    before = os.stat(tmp_path / "bundle" / manifest.checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(onnx_bundle, "write", None)
        assert prepared(file, Numbers(FP8_CAST)) == manifest
    monkeypatch.setattr(quantize, "write", None)
    (tmp_path / "bundle").rename(tmp_path / "other")
    prepared(file, Numbers(FP8_CAST))
    assert os.path.samestat(before, os.stat(tmp_path / "bundle" / manifest.checkpoint))


def test_what_is_quantized_is_what_the_quantizing_command_writes(tmp_path: Path) -> None:
    file = checkpoint(tmp_path)
    made = tmp_path / "made.safetensors"
    seen = calibration.read(ranges(file), header := read_header(file))
    for _ in quantize.write(quantize.plan(header, FP8, seen), made):
        pass
    manifest = prepared(file, Numbers(FP8, ranges(file)))
    entry = manifest.stages["transformer"].quantization
    assert entry is not None
    assert entry.recipe == "fp8"
    ours = quantized_files.read(tmp_path / "bundle" / manifest.checkpoint)
    theirs = quantized_files.read(made)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_cache_that_was_touched_is_not_believed(tmp_path: Path) -> None:
    file = checkpoint(tmp_path)
    manifest = prepared(file, Numbers(FP8_CAST))
    whole = (tmp_path / "bundle" / manifest.checkpoint).read_bytes()
    (kept,) = (tmp_path / "cache/ltx-trt/derived").glob("*.safetensors")
    kept.unlink()
    kept.write_bytes(whole[:-1])
    (tmp_path / "bundle").rename(tmp_path / "other")
    prepared(file, Numbers(FP8_CAST))
    assert (tmp_path / "bundle" / manifest.checkpoint).read_bytes() == whole


@pytest.mark.parametrize(
    ("dtype", "floats", "wanted"),
    [
        (torch.float32, None, "bfloat16"),
        (torch.float16, None, "float16"),
        (torch.float32, "float16", "float16"),
    ],
)
def test_what_is_around_products_of_codes_has_sixteen_bits(
    dtype: torch.dtype, floats: bundle.Precision | None, wanted: str, tmp_path: Path
) -> None:
    manifest = prepared(checkpoint(tmp_path, dtype), Numbers(FP8_CAST, floats=floats))
    assert manifest.precision == wanted
    assert manifest.stages["transformer"].opset == 23


def test_a_recipe_that_wants_ranges_says_how_to_get_them(tmp_path: Path) -> None:
    file = checkpoint(tmp_path)
    said = rf"--calibration FILE; make them with ltx-export calibrate {file} --text-encoder"
    with pytest.raises(UserError, match=said):
        prepared(file, Numbers(FP8))
    assert {path.name for path in tmp_path.iterdir()} == {NAME}


@pytest.mark.parametrize("where", ["checkpoint", "bundle"])
def test_what_is_quantized_already_must_be_by_that_recipe(where: str, tmp_path: Path) -> None:
    file = quantized_files.write(tmp_path / NAME, "fp8-cast", dtype=torch.bfloat16, blocks=1)
    source = file
    prepared(file, NOTHING)
    if where == "bundle":
        source = (tmp_path / "bundle").rename(tmp_path / "graphs")
    assert prepared(source, Numbers(FP8_CAST)).stages["transformer"].quantization is not None
    said = r"is quantized already: without a name \(10 fp8-cast\), not fp8; leave out"
    with pytest.raises(UserError, match=said):
        prepared(source, Numbers(FP8))


def test_a_bundles_numbers_are_what_they_are(tmp_path: Path) -> None:
    prepared(checkpoint(tmp_path), NOTHING)
    graphs = (tmp_path / "bundle").rename(tmp_path / "graphs")
    prepared(graphs, Numbers(floats="bfloat16"))
    for numbers, said in (
        (Numbers(floats="float16"), "are bfloat16, not float16"),
        (Numbers(FP8_CAST), "is not quantized; give the checkpoint that it is of"),
        (Numbers(FP8, Path("c")), "--calibration is for a checkpoint"),
    ):
        with pytest.raises(UserError, match=said):
            prepared(graphs, numbers)


def test_options_of_a_checkpoint_are_not_passed_over_with_a_bundle() -> None:
    wanted = Order(SHIPPED, Path("out"), text_encoder=SHIPPED / "text_encoder")
    with pytest.raises(UserError, match="--text-encoder is for a checkpoint, leave it out"):
        list(engine_source.prepare(wanted))


@pytest.mark.parametrize(
    ("stage", "weights", "said"),
    [
        ("vae_decoder", "link", "fp8-cast is for the transformer, which is not among --stages"),
        ("transformer", "refer", "wants a quantized file that stays where it is"),
    ],
)
def test_a_wish_that_cannot_come_true_leaves_nothing_behind(
    stage: str, weights: Literal["link", "refer"], said: str, tmp_path: Path
) -> None:
    wanted = Order(checkpoint(tmp_path), tmp_path / "bundle", stages=(stage,), weights=weights)
    with pytest.raises(UserError, match=said):
        list(engine_source.prepare(wanted, Numbers(FP8_CAST)))
    assert not list(tmp_path.glob(".*"))
    assert not wanted.out.exists()


def test_one_graph_stands_for_its_bundle_and_its_stage(tmp_path: Path) -> None:
    folder, graph = SHIPPED, SHIPPED / "transformer.onnx"
    assert engine_source.resolve(graph, None) == (folder, ("transformer",))
    assert engine_source.resolve(graph, ("transformer",)) == (folder, ("transformer",))
    assert engine_source.resolve(folder, None) == (folder, None)
    (tmp_path / "alone.onnx").touch()
    for file, stages, said in (
        (tmp_path / "alone.onnx", None, "has no manifest.json beside it, which says"),
        (folder / "other.onnx", None, "is no graph of its bundle, which has"),
        (graph, ("vae_decoder",), "is the stage transformer, --stages vae_decoder are others"),
    ):
        with pytest.raises(UserError, match=said):
            engine_source.resolve(file, stages)
