"""The quantized checkpoint: its bytes, what it says of itself, and what is never written."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ltx_trt
from ltx_engines.errors import UserError
from ltx_export import (
    calibration,
    cli,
    convert,
    derive,
    quantization_plan,
    quantize,
    recipes,
    sources,
)
from ltx_export.calibration import Calibration
from ltx_export.graphs import Graphs
from ltx_export.recipes import KEEP, SHIPPED, Recipe, Rule
from ltx_ref import casts, codes, quantization
from ltx_ref.checkpoint import CheckpointError, Header, read_header

TINY = Path(ltx_trt.__file__).parent / "ltx_tiny" / "ltx-tiny.safetensors"
PREFIX = "model.diffusion_model."
OTHERS = ("patchify_proj", "proj_out", "adaln_single.linear", "caption_projection.linear_1")
BLOCK = (
    *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2"),
)
K = 128


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Two blocks, and what a checkpoint has beside them."""
    source = torch.Generator().manual_seed(0)
    names = [*OTHERS, *(f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in BLOCK)]
    made: dict[str, torch.Tensor] = {}
    for name in names:
        made[f"{PREFIX}{name}.weight"] = torch.randn(24, K, generator=source).to(dtype)
        made[f"{PREFIX}{name}.bias"] = torch.randn(24, generator=source).to(dtype)
    made[f"{PREFIX}transformer_blocks.0.scale_shift_table"] = torch.ones(6, K).to(dtype)
    made["vae.decoder.conv.weight"] = torch.randn(3, 5, 3, 3, 3, generator=source)
    made["vae.per_channel_statistics.channel"] = torch.arange(7)
    return made


def write(path: Path, changes: dict[str, torch.Tensor] | None = None) -> Header:
    save_file({**tensors(), **(changes or {})}, path, {"config": "{}", "a": "b"})
    return read_header(path)


@pytest.fixture
def header(tmp_path: Path) -> Header:
    return write(tmp_path / "a.safetensors")


def ranges(header: Header, **changes: Any) -> Calibration:
    source = np.random.default_rng(0)
    found = {
        path: np.abs(source.standard_normal(K)).astype(np.float32) + np.float32(0.1)
        for path in quantize.linear_layers(header)
    }
    found |= {f"{PREFIX}{path.replace('__', '.')}": value for path, value in changes.items()}
    facts = {"prompts": 3}
    return Calibration(Path("c.safetensors"), found, facts)


def plan(header: Header, name: str | Recipe) -> quantize.QuantizationPlan:
    recipe = recipes.load(name) if isinstance(name, str) else name
    return quantize.plan(header, recipe, ranges(header) if recipe.calibrated else None)


def quantized(header: Header, name: str | Recipe) -> Header:
    out = header.path.with_name("out.safetensors")
    for _ in quantize.write(plan(header, name), out, overwrite=True):
        pass
    return read_header(out)


def parts(header: Header, path: str) -> dict[str, Any]:
    found = {}
    with header.path.open("rb") as file:
        for part in ("weight", *quantization.PARTS):
            if (info := header.tensors.get(f"{path}.{part}")) is not None:
                dtype = {"I8": np.int8, "U8": np.uint8}.get(info.dtype, info.dtype)
                numbers = casts.read(file, info)
                numbers = numbers if dtype == info.dtype else numbers.view(dtype)
                found[part] = numbers.reshape(info.shape)
    return found


def original(header: Header, path: str) -> codes.Rows:
    found: codes.Rows = load_file(header.path)[f"{path}.weight"].float().numpy()
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_the_file_has_the_codes_that_the_layer_has_by_itself(header: Header, name: str) -> None:
    out, known = quantized(header, name), ranges(header).ranges
    found = quantization.layers(out)
    assert len(found) == 20
    assert {layer.format for layer in found.values()} == {name}
    for path, layer in found.items():
        group = quantization_plan.shared(path, found)
        amax = np.max([known[other] for other in group], axis=0)
        pre = None
        if name == "int8":
            wmax = np.max([np.abs(original(header, p)).max(axis=0) for p in group], axis=0)
            pre = codes.smoothing(amax, wmax, 0.5)
        wanted = codes.layer(original(header, path), layer.format, input_amax=amax, pre=pre)
        written = parts(out, path)
        assert written.keys() == wanted.keys()
        for part, numbers in wanted.items():
            assert written[part].dtype == numbers.dtype
            assert written[part].tobytes() == numbers.tobytes(), part


@pytest.mark.parametrize("name", SHIPPED)
def test_every_other_tensor_is_untouched_and_every_number_is_aligned(
    header: Header, name: str
) -> None:
    out = quantized(header, name)
    before, after = header.path.read_bytes(), out.path.read_bytes()
    found = {f"{path}.weight" for path in quantization.layers(out)}
    assert header.tensors.keys() <= out.tensors.keys()
    for tensor in header.tensors.keys() - found:
        old, new = header.tensors[tensor], out.tensors[tensor]
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        assert before[old.begin : old.end] == after[new.begin : new.end]
    for info in out.tensors.values():
        assert info.begin % casts.element(info.dtype).itemsize == 0
    assert quantization.shapes(out) == header.shapes()
    assert dict(out.metadata) | dict(header.metadata) == dict(out.metadata)


def test_layers_that_read_one_tensor_share_its_range_and_its_smoothing(header: Header) -> None:
    out = quantized(header, "int8")
    for block in (0, 1):
        for group in quantization.SHARED_INPUTS:
            paths = [f"{PREFIX}transformer_blocks.{block}.{member}" for member in group]
            first, *others = [parts(out, path) for path in paths]
            for other in others:
                assert np.array_equal(first["pre_quant_scale"], other["pre_quant_scale"])
                assert first["input_scale"] == other["input_scale"]


def test_a_cast_file_is_laid_out_as_the_published_ones(header: Header) -> None:
    out = quantized(header, "fp8-cast")
    eights = {name for name, info in out.tensors.items() if info.dtype == "F8_E4M3"}
    assert out.tensors.keys() == header.tensors.keys()
    assert eights == {n for n in out.tensors if "blocks" in n and n.endswith(".weight")}


def test_the_file_tells_its_recipe_its_layers_and_where_all_comes_from(header: Header) -> None:
    out = quantized(header, "int8")
    told = quantization.provenance(out)
    assert told is not None
    assert recipes.parse(told["recipe"], "") == recipes.load("int8")
    assert told["algorithm"] == "smoothquant"
    assert set(told["layers"].values()) == {"int8"}
    assert told["source"] == calibration.identity(header.path)
    assert told["calibration"] == {"prompts": 3}
    assert {"ltx-export", "numpy", "ml_dtypes"} == told["versions"].keys()


def test_each_layer_is_said_by_its_path_and_counted_from_the_file(header: Header) -> None:
    rules = (
        Rule(f"{PREFIX}transformer_blocks.0.ff.net.2", KEEP, "it is sensitive"),
        Rule("transformer_blocks.1.ff.*", "int8-wo", "w"),
        *recipes.load("fp8-cast").rules,
    )
    made = plan(header, Recipe("mixed", "", "none", None, rules))
    lines = list(quantize.write(made, header.path.with_name("out.safetensors")))
    said = [line for line in lines if line.startswith(PREFIX)]
    assert said == [f"{path} to {form}" for path, form in made.formats.items()]
    assert said[0] == f"{PREFIX}transformer_blocks.0.attn1.to_k to fp8-cast"
    summary = list(quantize.summary(made, read_header(header.path.with_name("out.safetensors"))))
    assert summary[0] == "Quantized 19 of 19 linear layers: 17 to fp8-cast, 2 to int8-wo"
    assert f"Kept 1 of {rules[0].layers}: it is sensitive" in summary
    alone = quantize.summary(plan(header, "fp8-cast"), quantized(header, "fp8-cast"))
    assert next(alone) == "Quantized 20 of 20 linear layers to fp8-cast"


def test_what_a_file_lacks_is_seen_in_its_summary(header: Header) -> None:
    """Whatever the file says of itself: the recipe's layers are counted in the checkpoint."""
    fewer = recipes.without(
        recipes.load("int8-wo"), [f"{PREFIX}transformer_blocks.0.ff.net.2"], "w"
    )
    out = quantized(header, fewer)
    assert next(quantize.summary(plan(header, fewer), out)).startswith("Quantized 19 of 19 ")
    assert next(quantize.summary(plan(header, "int8-wo"), out)).startswith("Quantized 19 of 20 ")


def test_only_int8_layers_are_smoothed_and_only_by_those_that_are_too(header: Header) -> None:
    """to_v is left out of its group: what it has reached does not count."""
    other = f"{PREFIX}transformer_blocks.0.attn1.to_v"
    rules = (Rule(other, "int8-wo", "w"), *recipes.load("int8").rules)
    made = plan(header, Recipe("mixed", "", "smoothquant", 0.25, rules))
    out = header.path.with_name("out.safetensors")
    list(quantize.write(made, out))
    path, twin = other.replace("to_v", "to_q"), other.replace("to_v", "to_k")
    known = ranges(header).ranges
    wmax = np.max([np.abs(original(header, p)).max(axis=0) for p in (path, twin)], axis=0)
    pre = codes.smoothing(np.maximum(known[path], known[twin]), wmax, 0.25)
    found = parts(read_header(out), path)
    assert np.array_equal(found["pre_quant_scale"], pre)
    assert np.array_equal(parts(read_header(out), twin)["pre_quant_scale"], pre)
    wanted = codes.layer(original(header, other), "int8-wo")
    plain = parts(read_header(out), other)
    assert plain.keys() == wanted.keys() == {"weight", "weight_scale"}
    assert np.array_equal(plain["weight"], wanted["weight"])


@pytest.mark.parametrize("part", ["weight", "weight_scale"])
def test_a_file_that_was_damaged_in_writing_never_appears(
    header: Header, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Its header is read again before it has its name."""
    before, head = sorted(os.listdir(header.path.parent)), derive.head

    def damaged(target: Header) -> bytes:
        name = f"transformer_blocks.1.ff.net.2.{part}".encode()
        made = head(target)
        assert name in made
        return made.replace(name, name[:-1] + b"_")

    made = plan(header, "int8-wo")
    monkeypatch.setattr(derive, "head", damaged)
    with pytest.raises((AssertionError, CheckpointError)):
        list(quantize.write(made, header.path.with_name("out.safetensors")))
    assert sorted(os.listdir(header.path.parent)) == before


def test_a_file_that_is_not_what_was_planned_is_a_bug(header: Header) -> None:
    out = quantized(header, "int8-wo")
    quantize._check_written(out.path, plan(header, "int8-wo"))
    for other in ("fp8-cast", "int4-wo"):
        with pytest.raises(AssertionError, match="is not what was planned"):
            quantize._check_written(out.path, plan(header, other))


def test_the_clip_of_a_row_is_the_one_that_modelopt_finds(header: Header) -> None:
    from ltx_export import clipping

    rules = (Rule("transformer_blocks.*", "fp8", "w"), Rule("*", KEEP, "w"))
    out = quantized(header, Recipe("mse", "", "mse", None, rules))
    path = f"{PREFIX}transformer_blocks.0.attn1.to_q"
    rows = original(header, path)
    wanted = codes.scale(clipping.best(rows, "fp8"), 448)
    assert np.array_equal(parts(out, path)["weight_scale"], wanted)
    assert not np.array_equal(wanted, codes.scale(np.abs(rows).max(axis=1), 448))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_float_types_are_quantized_too(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file(tensors(dtype), tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    path = f"{PREFIX}transformer_blocks.1.ff.net.2"
    wanted = codes.layer(original(header, path), "int8-wo")
    assert np.array_equal(parts(quantized(header, "int8-wo"), path)["weight"], wanted["weight"])


def test_pieces_smaller_than_a_weight_give_the_same_file(
    header: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("int8", "nvfp4"):
        whole = quantized(header, name).path.read_bytes()
        monkeypatch.setattr(quantize, "PIECE", 5 * K)
        assert quantized(header, name).path.read_bytes() == whole
        monkeypatch.undo()


def refused(header: Header, recipe: str, known: Calibration | None, match: str) -> None:
    before = sorted(os.listdir(header.path.parent))
    with pytest.raises(UserError, match=match) as caught:
        made = quantize.plan(header, recipes.load(recipe), known)
        list(quantize.write(made, header.path.with_name("out.safetensors")))
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(header.path.parent)) == before


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_quantized_is_not_quantized_again(header: Header, name: str) -> None:
    out = quantized(header, name)
    moved = header.path.with_name("other.safetensors")
    out.path.rename(moved)
    said = rf"quantized already: .*recipe {name}: 20 to {name}; start from the bfloat16"
    refused(read_header(moved), "fp8-cast", None, said)


def test_a_published_cast_is_not_quantized_again(tmp_path: Path) -> None:
    name = f"{PREFIX}transformer_blocks.0.attn1.to_q.weight"
    header = write(tmp_path / "a.safetensors", {name: tensors()[name].to(torch.float8_e4m3fn)})
    refused(header, "fp8-cast", None, "quantized already: plain 8-bit casts")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named_and_nothing_is_left(
    tmp_path: Path, value: float
) -> None:
    name = f"{PREFIX}transformer_blocks.1.ff.net.2.weight"
    bad = tensors()[name]
    bad[5, 7] = value
    header = write(tmp_path / "a.safetensors", {name: bad})
    refused(header, "int8-wo", None, r"1\.ff\.net\.2\.weight has NaN or infinity in row 5")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_kept_number_that_is_none_is_named_and_nothing_is_left(
    tmp_path: Path, value: float
) -> None:
    name = f"{PREFIX}proj_out.weight"
    bad = tensors()[name]
    bad[5, 7] = value
    header = write(tmp_path / "a.safetensors", {name: bad})
    refused(header, "int8-wo", None, r"proj_out\.weight has NaN or infinity; download it again")


def test_a_weight_that_a_cast_would_clamp_is_refused(tmp_path: Path) -> None:
    path = f"{PREFIX}transformer_blocks.1.ff.net.2"
    wide = tensors()[f"{path}.weight"]
    wide[5, 7] = -4992
    header = write(tmp_path / "a.safetensors", {f"{path}.weight": wide})
    said = rf"{path}\.weight reaches 4992, fp8-cast ends at 448; choose fp8, or keep the layer"
    refused(header, "fp8-cast", None, said)
    wide[5, 7] = -448
    out = quantized(write(tmp_path / "b.safetensors", {f"{path}.weight": wide}), "fp8-cast")
    assert float(parts(out, path)["weight"][5, 7]) == -448


def test_a_layer_that_no_run_reached_stops_with_its_name(header: Header) -> None:
    known = ranges(header)
    path = f"{PREFIX}transformer_blocks.1.attn2.to_v"
    fewer = {layer: amax for layer, amax in known.ranges.items() if layer != path}
    said = rf"c\.safetensors: {path} was never reached; calibrate again"
    refused(header, "fp8", Calibration(known.path, fewer, {}), said)


@pytest.mark.parametrize("name", OTHERS)
def test_only_layers_of_the_blocks_are_quantized(header: Header, name: str) -> None:
    rules = (Rule("transformer_blocks.*", "int8-wo", "w"), Rule(name, "int8-wo", "w"))
    recipe = Recipe("mine", "", "none", None, (*rules, Rule("*", KEEP, "w")))
    said = rf"mine: {PREFIX}{name} would become int8-wo, and only layers of transformer_blocks"
    with pytest.raises(UserError, match=said):
        quantize.fit(header, recipe)


def test_a_recipe_and_a_calibration_must_want_each_other(header: Header) -> None:
    refused(header, "fp8", None, r"wants their ranges; run ltx-export calibrate")
    refused(header, "int8-wo", ranges(header), "quantizes no activations; leave out the calibrat")


def test_a_layer_that_does_not_divide_into_blocks_is_named(tmp_path: Path) -> None:
    odd = f"{PREFIX}transformer_blocks.0.ff.net.2"
    header = write(tmp_path / "a.safetensors", {f"{odd}.weight": torch.ones(24, 192)})
    refused(header, "int4-wo", None, rf"{odd} has 192 inputs, int4-wo wants a multiple of 128")


def test_a_file_without_a_transformer_is_none_to_quantize(tmp_path: Path) -> None:
    save_file({"vae.a.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    refused(read_header(tmp_path / "a.safetensors"), "int8-wo", None, "has no linear layer whose")


def test_neither_the_checkpoint_nor_a_file_that_is_there_is_replaced(header: Header) -> None:
    made, before = plan(header, "int8-wo"), header.path.read_bytes()
    other = header.path.with_name("other.safetensors")
    other.write_bytes(b"mine")
    for out, said in ((header.path, "is the checkpoint itself"), (other, "is already there")):
        with pytest.raises(UserError, match=said):
            list(quantize.write(made, out))
    with pytest.raises(UserError, match="is the checkpoint itself"):
        list(quantize.write(made, header.path, overwrite=True))
    with pytest.raises(UserError, match="is a folder"):
        list(quantize.write(made, header.path.parent, overwrite=True))
    assert header.path.read_bytes() == before
    assert other.read_bytes() == b"mine"


def test_a_folder_that_is_not_there_is_not_made(header: Header, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"there is no folder {tmp_path}/a/b; create it first"):
        list(quantize.write(plan(header, "int8-wo"), tmp_path / "a" / "b" / "out.safetensors"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("a.safetensors", "is the checkpoint itself"),
        ("link", "is the checkpoint itself"),
        ("hard", "is the checkpoint itself"),
        ("dir/../c", "is the file of --calibration itself"),
        ("s.json", "is the file of --sensitivity itself"),
        ("p.txt", "is the file of --prompts itself"),
        ("t5/model.safetensors", "is in the folder of --text-encoder .*t5"),
        ("v.yaml", "is the file of --pipeline-config itself"),
        ("mine.toml", "is the recipe itself"),
    ],
)
def test_nothing_that_is_read_is_replaced(
    header: Header, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, said: str
) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "t5").mkdir()
    (tmp_path / "link").symlink_to(header.path)
    os.link(header.path, tmp_path / "hard")
    rule = '[[rule]]\nlayers = "*blocks*"\nformat = "fp8"\nwhy = "w"\n'
    rest = '[[rule]]\nlayers = "*"\nformat = "keep"\nwhy = "w"\n'
    (tmp_path / "mine.toml").write_text(f'description = ""\nalgorithm = "max"\n{rule}{rest}')
    for name in ("c", "s.json", "p.txt", "t5/model.safetensors", "v.yaml"):
        (tmp_path / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = {"--recipe": "mine.toml", "--calibration": "c", "--sensitivity": "s.json"}
    options |= {"--prompts": "p.txt", "--text-encoder": "t5", "--pipeline-config": "v.yaml"}
    words = ["quantize", str(header.path), "--max-error", "0.1", "--overwrite"]
    for option, name in {**options, "--out": out}.items():
        words += [option, str(tmp_path / name)]
    assert cli.main(words) == 2
    assert re.search(rf"--out .* {said}; choose another name", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_full_disk_is_said_before_anything_is_written(
    header: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(header.path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(header, "int8-wo", None, "needs .* bytes, .* has 1,000 left")


def test_a_checkpoint_that_changes_meanwhile_is_noticed(header: Header) -> None:
    made = plan(header, "int8-wo")
    work = quantize.write(made, header.path.with_name("out.safetensors"))
    next(work)
    name = f"{PREFIX}proj_out.weight"
    write(header.path, {name: torch.ones(2, 2)})
    with pytest.raises(UserError, match=r"changed since it was looked at|became shorter"):
        list(work)
    assert not header.path.with_name("out.safetensors").exists()


def test_whoever_stops_half_way_leaves_nothing_behind(header: Header) -> None:
    before = sorted(os.listdir(header.path.parent))
    work: Iterator[str] = quantize.write(
        plan(header, "int8"), header.path.with_name("out.safetensors")
    )
    for line in work:
        if "blocks.1" in line:
            break
    assert len(os.listdir(header.path.parent)) == len(before) + 1
    work.close()  # type: ignore[attr-defined]
    assert sorted(os.listdir(header.path.parent)) == before


def test_a_quantized_file_in_another_precision_keeps_its_codes_and_its_scales(
    header: Header,
) -> None:
    for name in SHIPPED:
        out = quantized(header, name)
        target = derive.planned(out, "float32")
        made = out.path.with_name("wide.safetensors")
        list(derive.write(out, target, made))
        wide = read_header(made)
        assert convert.kind(wide).sentence == convert.kind(out).sentence
        layers = quantization.layers(out)
        for path in layers:
            old, new = parts(out, path), parts(wide, path)
            assert old.keys() == new.keys()
            assert all(old[part].tobytes() == new[part].tobytes() for part in old)
        fixed = {f"{path}.weight" for path in layers}
        fixed |= {scale for layer in layers.values() for scale, _ in layer.parts()}
        floats = {i.dtype for n, i in wide.tensors.items() if n not in fixed}
        assert floats == {"F32", "I64"}


def test_of_a_part_only_the_layers_of_that_part_are_listed(header: Header) -> None:
    out = quantized(header, "int8")
    one = f"{PREFIX}transformer_blocks.0.attn1.to_q"
    some = derive.planned(out, "float32", keep={f"{one}.weight", f"{one}.bias"})
    assert quantization.layers(some).keys() == {one}
    assert len(some.tensors) == 5
    none = derive.planned(out, "float16", keep={"vae.decoder.conv.weight"})
    assert convert.kind(none).name == "float"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_quantized_model_fits_its_configuration_and_runs_in_its_float_type(
    tmp_path: Path, name: str
) -> None:
    tiny = read_header(TINY)
    known = {
        path: np.ones(tiny.tensors[f"{path}.weight"].shape[1], np.float32)
        for path in quantize.linear_layers(tiny)
    }
    recipe = recipes.load(name)
    found = Calibration(tmp_path / "c", known, {}) if recipe.calibrated else None
    out = tmp_path / "out.safetensors"
    for _ in quantize.write(quantize.plan(tiny, recipe, found), out):
        pass
    files = sources.read(out)
    graphs = Graphs(files.model())
    stages = ("transformer", "vae_decoder")
    sources.check_fit(files, stages, graphs)
    for stage in stages:
        assert sources.precision(files, stage, graphs.weights(stage)) == "float32"


def test_quantizing_needs_no_torch_unless_it_searches_clips(header: Header) -> None:
    code = (
        "import sys; from pathlib import Path; from ltx_export import quantize, recipes; "
        "from ltx_ref.checkpoint import read_header; "
        f"header = read_header(Path({str(header.path)!r})); "
        "plan = quantize.plan(header, recipes.load('int8-wo')); "
        "list(quantize.write(plan, header.path.with_name('out.safetensors'))); "
        "print({'torch', 'onnx', 'transformers', 'modelopt'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_prompts_are_for_recipes_that_want_ranges(
    header: Header, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    words = ["quantize", str(header.path), "--out", str(out), "--prompts", str(tmp_path / "p")]
    for more in (["--recipe", "int8-wo", "--text-encoder", "t"], ["--recipe", "fp8"]):
        assert cli.main([*words, *more]) == 2
        assert "--prompts is for a recipe that quantizes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        *(["--text-encoder", "t"], ["--shape", "64x32x9"], ["--steps", "3"], ["--seed", "0"]),
        *(["--first", "1"], ["--pipeline-config", "c"], ["--negative-prompt", ""]),
        *(["--device", "cpu"], ["--offload-blocks"], ["--ignore-config-key", "a"]),
    ],
)
def test_an_option_of_runs_without_any_is_refused(
    header: Header, capsys: pytest.CaptureFixture[str], tmp_path: Path, option: list[str]
) -> None:
    words = ["quantize", str(header.path), "--recipe", "int8-wo", "--out", str(tmp_path / "out")]
    assert cli.main([*words, *option]) == 2
    said = f"ltx-export: {option[0]} is of runs of the model; add --prompts FILE, or leave it out\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        *(("--device", word, "give cpu, cuda or cuda:N") for word in ("meta", "mps", "cuda:", "")),
        ("--seed", str(2**63), "less than or equal to 9223372036854775807"),
        ("--seed", "-1", "greater than or equal to 0"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "--prompts", "p", "--recipe", "fp8", "--out", "o"),
        ("calibrate", "--prompts", "p", "--out", "o"),
        ("sensitivity", "--prompts", "p"),
        ("verify", "--prompt", "a", "--shape", "64x32x9"),
    ],
)
def test_a_device_or_a_seed_that_there_is_not_costs_one_line(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...], option: str, value: str, said: str
) -> None:
    assert cli.main([*command, "c", "--text-encoder", "t", option, value]) == 2
    found = capsys.readouterr().err
    assert said in found
    assert option in found
    assert len(found.splitlines()) == 1


def test_the_command_says_what_it_did(
    header: Header, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    words = ["quantize", str(header.path), "--recipe", "int8-wo", "--out", str(out)]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert f"{PREFIX}transformer_blocks.1.ff.net.2 to int8-wo: " in said.err
    assert said.out.startswith(
        "Quantized 20 of 20 linear layers to int8-wo\nKept 1 of adaln_single.*: "
    )
    assert cli.main(words) == 2
    assert "already there" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0


def test_the_command_reads_a_calibration_of_this_checkpoint_only(
    header: Header, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    facts: dict[str, Any] = {"format_version": calibration.FORMAT, "done": 1, "runs": 1}
    facts["checkpoint"] = calibration.identity(header.path)
    path = tmp_path / "c.safetensors"
    calibration.write(Calibration(path, ranges(header).ranges, facts))
    out = tmp_path / "out.safetensors"
    options = ["--recipe", "fp8", "--calibration", str(path), "--out", str(out)]
    assert cli.main(["quantize", str(header.path), *options]) == 0
    told = quantization.provenance(read_header(out))
    assert told is not None
    assert told["calibration"] == json.loads(json.dumps(facts))
    other = write(tmp_path / "b.safetensors", {f"{PREFIX}proj_out.bias": torch.ones(24)})
    capsys.readouterr()
    assert cli.main(["quantize", str(other.path), *options, "--overwrite"]) == 2
    assert "calibrate this checkpoint" in capsys.readouterr().err
