"""A quantized layer computes what float64 arithmetic on its codes and scales says."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import ref

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from ltx_ref import codes, quantized
from ltx_ref.checkpoint import CheckpointError, TensorInfo, read_header
from ltx_ref.ltx_video import model as ltx_model
from ltx_ref.ltx_video.config import parse_config
from ltx_ref.ltx_video.model import LTXVideo, load
from ltx_ref.offload import offloaded
from ltx_ref.quantization import (
    CALIBRATED,
    FORMATS,
    INT4_BLOCK,
    NVFP4_BLOCK,
    Format,
    Layer,
    layers,
)
from ltx_ref.quantized import QuantizedLinear, choose, install, linears
from ltx_ref.tensor_file import TensorFile
from tests.ref.oracles import difference, normals, randomize

Parts = dict[str, Tensor]
Wide = Any
"""A numpy array of float64."""

SHAPES = [(3, 256, 48, 1), (40, 128, 64, 2), (17, 384, 16, 3)]
"""Rows of activations, inputs, outputs, seed."""


def parts(form: Format, weight: Tensor, x: Tensor, pre: Tensor | None = None) -> Parts:
    """As they lie in a file; the range of the activations is a little less than what comes."""
    rows = weight.numpy() if pre is None else (weight / pre).numpy()
    amax = np.float32(np.abs(rows).max()) if form == "nvfp4" else None
    coded = codes.encode(rows, form, None if amax is None else np.asarray(amax))
    found = {"weight": tensor(coded.weight)}
    if coded.weight_scale is not None:
        found["weight_scale"] = tensor(coded.weight_scale)
    if amax is not None:
        found["weight_scale_2"] = torch.tensor(float(codes.weight_scale_2(float(amax))))
    if form in CALIBRATED:
        seen = 0.9 * float((x if pre is None else x * pre).abs().max())
        found["input_scale"] = torch.tensor(float(codes.scale(seen, codes.INPUT_MAX[form])))
    return found if pre is None else found | {"pre_quant_scale": pre}


def tensor(array: NDArray[Any]) -> Tensor:
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def bfloat16(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def case(form: Format, shape: tuple[int, int, int, int]) -> tuple[Parts, Tensor, Tensor]:
    m, k, n, seed = shape
    weight, x = normals(n, k, seed=seed), 3 * normals(m, k, seed=seed + 100)
    x[:, k // 2] *= 20
    pre = bfloat16(normals(k, seed=seed + 200).exp()) if form == "int8" else None
    return parts(form, weight, x, pre), normals(n, seed=seed + 300), x


def oracle(found: Parts, bias: Tensor, x: Tensor, form: Format) -> Wide:
    """In float64, by numpy, with the element types of `ml_dtypes`."""
    wanted: Wide = inputs(found, x, form) @ weights(found, form).T + bias.double().numpy()
    return wanted


def weights(found: Parts, form: Format) -> Wide:
    raw: NDArray[np.uint8] = found["weight"].view(torch.uint8).numpy()
    scale = wide(found["weight_scale"]) if "weight_scale" in found else np.ones(len(raw))
    if form in {"fp8", "fp8-cast"}:
        return raw.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale[:, None]
    if form in {"int8", "int8-wo"}:
        return raw.view(np.int8).astype(np.float64) * scale[:, None]
    fours = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
    if form == "int4-wo":
        return np.where(fours > 7, fours - 16.0, fours) * scale.repeat(INT4_BLOCK, axis=1)
    values = fours.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return values * scale.repeat(NVFP4_BLOCK, axis=1) * float(found["weight_scale_2"])


def wide(scale: Tensor) -> Wide:
    numbers: Wide = scale.float().double().numpy()
    return numbers


def inputs(found: Parts, x: Tensor, form: Format) -> Wide:
    """What is left of the activations; x and the smoothing in the type of x."""
    pre = found.get("pre_quant_scale")
    shown: NDArray[np.float32] = (x if pre is None else x * pre.to(x.dtype)).float().numpy()
    if form not in CALIBRATED:
        return shown.astype(np.float64)
    unit = np.float32(found["input_scale"])
    if form == "int8":
        return np.clip(np.rint(shown / unit), -128, 127) * np.float64(unit)
    if form == "fp8":
        kept = np.clip(shown / unit, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return kept.astype(np.float64) * np.float64(unit)
    blocks = shown.reshape(len(shown), -1, NVFP4_BLOCK)
    amax = np.abs(blocks).max(axis=2, keepdims=True)
    scale = np.minimum(amax / np.float32(6) / unit, 448).astype(ml_dtypes.float8_e4m3fn)
    step = scale.astype(np.float32) * unit
    shares = np.clip(blocks / np.maximum(step, np.float32(2.0**-100)), -6, 6)
    kept = shares.astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * step.astype(np.float64)
    return kept.reshape(shown.shape)


def relative(found: Tensor, wanted: Wide) -> float:
    return float(np.abs(wide(found) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_is_the_formula(form: Format, shape: tuple[int, int, int, int]) -> None:
    found, bias, x = case(form, shape)
    layer = QuantizedLinear.of(form, found, bias)
    assert relative(layer(x), oracle(found, bias, x, form)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", sorted(CALIBRATED))
def test_a_calibrated_layer_rounds_its_output_once(form: Format, dtype: torch.dtype) -> None:
    found, bias, x = case(form, SHAPES[1])
    x, bias = x.to(dtype), bias.to(dtype)
    out = QuantizedLinear.of(form, found, bias)(x)
    wanted = torch.from_numpy(oracle(found, bias, x, form))
    assert out.dtype == dtype
    half = torch.finfo(dtype).eps / 2
    assert ((out.double() - wanted).abs() <= half * wanted.abs() + 1e-5 * wanted.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", sorted(set(FORMATS) - CALIBRATED))
def test_a_weight_only_layer_is_a_linear_one_with_rounded_weights(
    form: Format, dtype: torch.dtype
) -> None:
    found, bias, x = case(form, SHAPES[1])
    x, bias = x.to(dtype), bias.to(dtype)
    weight = torch.from_numpy(weights(found, form)).to(dtype)
    wanted = nn.functional.linear(x, weight, bias)
    assert torch.equal(QuantizedLinear.of(form, found, bias)(x), wanted)


def test_codes_of_activations_are_rounded_to_even_and_clamped() -> None:
    x = torch.tensor([[0.5, 1.5, -2.5, 200.0, -200.0, 126.6, -127.6, 0.0]])
    layer = QuantizedLinear("int8", 8, 8, bias=False)
    assert quantized.activation_codes(layer, x).tolist() == [[0, 2, -2, 127, -128, 127, -128, 0]]
    x = torch.tensor([[17.0, 19.0, -17.0, 1e6, -1e6, 2.0**-10, 3 * 2.0**-10, 448.0]])
    layer = QuantizedLinear("fp8", 8, 8, bias=False)
    kept = quantized.activation_codes(layer, x).float().tolist()
    assert kept == [[16.0, 20.0, -16.0, 448.0, -448.0, 0.0, 2.0**-8, 448.0]]


def test_four_bit_floats_are_rounded_as_ml_dtypes_does() -> None:
    x = np.linspace(-6, 6, 4801, dtype=np.float32)  # every tie is among them
    wanted = x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(quantized.to_e2m1(torch.from_numpy(x)).numpy(), wanted)


@pytest.mark.parametrize("form", FORMATS)
def test_rows_may_lie_in_any_axes(form: Format) -> None:
    found, bias, x = case(form, (24, 128, 16, 4))
    layer = QuantizedLinear.of(form, found, bias)
    assert difference(layer(x.view(2, 3, 4, 128)), layer(x).view(2, 3, 4, 16)) < 1e-6
    assert layer(x[:0]).shape == (0, 16)
    assert layer(x[0]).shape == (16,)


@pytest.mark.parametrize("form", sorted(CALIBRATED))
def test_rows_are_multiplied_some_at_a_time(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    found, bias, x = case(form, (24, 128, 16, 4))
    layer = QuantizedLinear.of(form, found, bias)
    monkeypatch.setattr(quantized, "ROWS", 7)
    assert relative(layer(x), oracle(found, bias, x, form)) <= 1e-5


@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_may_have_no_bias(form: Format) -> None:
    found, _, x = case(form, SHAPES[0])
    wanted = oracle(found, torch.zeros(SHAPES[0][2]), x, form)
    assert relative(QuantizedLinear.of(form, found)(x), wanted) <= 1e-5


@pytest.mark.parametrize(
    ("form", "dtype", "shape", "capability", "kernel"),
    [
        ("fp8", torch.bfloat16, (64, 64), None, "fake"),
        ("fp8", torch.bfloat16, (64, 64), (8, 9), "scaled_mm by row"),
        ("fp8", torch.bfloat16, (64, 64), (9, 0), "scaled_mm by row"),
        ("fp8", torch.bfloat16, (64, 64), (12, 0), "scaled_mm"),
        ("fp8", torch.float32, (64, 64), (9, 0), "scaled_mm"),
        ("fp8", torch.float16, (64, 64), (9, 0), "scaled_mm"),
        ("int8", torch.bfloat16, (64, 64), None, "fake"),
        ("int8", torch.bfloat16, (64, 64), (7, 5), "int_mm"),
        ("int8", torch.float32, (64, 64), (9, 0), "int_mm"),
        ("nvfp4", torch.bfloat16, (64, 64), None, "fake"),
        ("fp8-cast", torch.bfloat16, (64, 64), (9, 0), "weight only"),
        ("int8-wo", torch.bfloat16, (64, 64), None, "weight only"),
        ("int4-wo", torch.bfloat16, (64, 64), (9, 0), "weight only"),
    ],
)
def test_a_product_is_chosen_by_format_type_and_gpu(
    form: Format,
    dtype: torch.dtype,
    shape: tuple[int, int],
    capability: tuple[int, int] | None,
    kernel: str,
) -> None:
    assert choose(form, dtype, shape, capability) == (kernel, None)


@pytest.mark.parametrize(
    ("form", "shape", "capability", "reason"),
    [
        ("fp8", (64, 64), (8, 6), "torch._scaled_mm wants compute capability 8.9, this GPU has"),
        ("fp8", (64, 40), (9, 0), "torch._scaled_mm wants multiples of 16"),
        ("int8", (64, 64), (7, 0), "torch._int_mm wants compute capability 7.5, this GPU has 7.0"),
        ("int8", (62, 64), (9, 0), "torch._int_mm wants multiples of 8"),
        ("nvfp4", (64, 64), (12, 0), "there is no kernel for them in torch here"),
    ],
)
def test_a_gpu_that_cannot_multiply_codes_says_why(
    form: Format, shape: tuple[int, int], capability: tuple[int, int], reason: str
) -> None:
    kernel, said = choose(form, torch.bfloat16, shape, capability)
    assert kernel == "fake"
    assert said is not None
    assert said.startswith(reason)


def test_a_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    quantized._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            quantized._warn("no unit for it")
    assert caplog.messages == ["no unit for it"]


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize(
    ("form", "product"),
    [
        ("int8", quantized.int_mm),
        ("fp8", quantized.scaled_mm),
        ("fp8", quantized.scaled_mm_by_row),
    ],
)
def test_a_gpus_products_are_those_of_the_formula(form: Format, product: Any, rows: int) -> None:
    """torch has these operators for the CPU too, with the GPU's arguments."""
    found, bias, x = case(form, (rows, 128, 64, 7))
    x, bias = bfloat16(x), bfloat16(bias)
    out = product(QuantizedLinear.of(form, found, bias), x)
    limit = 2.0**-8 if out.dtype == torch.bfloat16 else 1e-5
    assert out.shape == (rows, 64)
    assert relative(out.float(), oracle(found, bias, x, form)) <= limit


def test_int_mm_never_sees_fewer_rows_than_a_gpu_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Size, torch.Size, tuple[int, ...]]] = []

    def stand_in(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.int8
        seen.append((a.shape, b.shape, b.stride()))
        return (a.int() @ b.int()).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", stand_in)
    found, bias, x = case("int8", (5, 128, 64, 7))
    out = quantized.int_mm(QuantizedLinear.of("int8", found, bias), x)
    assert seen == [((32, 128), (128, 64), (1, 128))]
    assert relative(out, oracle(found, bias, x, "int8")) <= 1e-5


def test_scaled_mm_by_row_gets_what_a_gpu_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(a: Tensor, b: Tensor, **given: Any) -> Tensor:
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert (a.stride(), b.stride()) == ((128, 1), (1, 128))  # row- and column-major
        assert given["scale_a"].shape == (5, 1)
        assert given["scale_a"].is_contiguous()
        assert given["scale_b"].shape == (1, 64)
        assert given["scale_b"].is_contiguous()
        assert given["bias"].dtype == given["out_dtype"] == torch.bfloat16
        products = (a.float() @ b.float()) * given["scale_a"] * given["scale_b"]
        out: Tensor = (products + given["bias"]).bfloat16()
        return out

    monkeypatch.setattr(torch, "_scaled_mm", stand_in)
    found, bias, x = case("fp8", (5, 128, 64, 7))
    out = quantized.scaled_mm_by_row(QuantizedLinear.of("fp8", found, bfloat16(bias)), x)
    assert relative(out.float(), oracle(found, bfloat16(bias), x, "fp8")) <= 2.0**-8


@pytest.mark.parametrize("form", FORMATS)
def test_a_state_dict_has_the_names_types_and_shapes_of_a_file(form: Format) -> None:
    found, bias, _ = case(form, SHAPES[0])
    layer = QuantizedLinear(
        form, 256, 48, bias=True, smoothed="pre_quant_scale" in found
    ).state_dict()
    wanted = found | {"bias": bias}
    assert {n: (t.dtype, t.shape) for n, t in layer.items()} == {
        n: (t.dtype, t.shape) for n, t in wanted.items()
    }


def test_another_type_is_for_the_bias_alone() -> None:
    found, bias, x = case("fp8", SHAPES[0])
    layer = QuantizedLinear.of("fp8", found, bias.bfloat16()).float().to(torch.float32)
    kept = layer.state_dict()
    assert kept.pop("bias").dtype == torch.float32
    assert all(torch.equal(kept[n].float(), found[n].float()) for n in kept)
    assert all(kept[n].dtype == found[n].dtype for n in kept)
    assert relative(layer(x), oracle(found, bfloat16(bias), x, "fp8")) <= 1e-5


def test_a_width_without_whole_blocks_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="int4-wo wants inputs in blocks of 128, not 40"):
        QuantizedLinear("int4-wo", 40, 8, bias=False)


D, LAYERS = 128, 2
TABLE: dict[str, Any] = {
    "transformer": {
        "num_attention_heads": 2,
        "attention_head_dim": D // 2,
        "num_layers": LAYERS,
        "in_channels": 8,
        "out_channels": 8,
        "caption_channels": 12,
        "cross_attention_dim": D,
    },
    "vae": {
        "latent_channels": 8,
        "encoder_base_channels": 8,
        "decoder_base_channels": 8,
        "blocks": [["compress_all", 1], ["compress_all", 1], ["compress_all", 1]],
    },
    "scheduler": {},
}


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = LTXVideo(parse_config(TABLE))
    randomize(model, seed=1)
    return {name: t.to(dtype) for name, t in model.state_dict().items()}


def saved(path: Path, found: Mapping[str, Tensor]) -> Path:
    save_file(dict(found), path, {"config": json.dumps(TABLE)})
    return path


def quantized_tensors(form: Format, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All layers in the form; whatever they read is smaller than 10 times its spread."""
    with torch.device("meta"):
        paths = [path for path, _ in linears(LTXVideo(parse_config(TABLE)))]
    out = dict(found)
    for path in paths:
        made = parts(form, found[f"{path}.weight"].float(), 10 * torch.ones(1, 1))
        out |= {f"{path}.{name}": t for name, t in made.items()}
    return out


def run(model: LTXVideo, dtype: torch.dtype = torch.float32) -> Tensor:
    velocity: Any = model.transformer(
        normals(1, 6, 8, seed=2).to(dtype),
        torch.rand(1, 3, 6, generator=torch.Generator().manual_seed(2)),
        torch.tensor([[0.7]]),
        normals(1, 4, 12, seed=2).to(dtype),
        torch.ones(1, 4, dtype=dtype),
        torch.ones(LAYERS, 1, dtype=dtype),
    )
    found: Tensor = velocity.float()
    return found


def test_the_ten_linear_layers_of_each_block_are_found() -> None:
    with torch.device("meta"):
        found = [path for path, _ in linears(LTXVideo(parse_config(TABLE)))]
    attention = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    names = [*attention, "ff.net.0.proj", "ff.net.2"]
    blocks = [f"model.diffusion_model.transformer_blocks.{i}" for i in range(LAYERS)]
    assert found == [f"{block}.{name}" for block in blocks for name in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
def test_a_quantized_file_loads_and_runs(form: Format, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = tensors(dtype)
    path = saved(tmp_path / "q.safetensors", quantized_tensors(form, plain))
    model = load(path)
    found = {n: m.form for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert found == dict.fromkeys(layers(read_header(path)), form)
    assert len(found) == 10 * LAYERS
    wanted = run(load(saved(tmp_path / "f.safetensors", plain)), dtype)
    error = (run(model, dtype) - wanted).norm() / wanted.norm()
    assert 1e-4 < error < {"int4-wo": 0.4, "nvfp4": 0.4}.get(form, 0.1)


def test_a_quantized_model_can_be_offloaded(tmp_path: Path) -> None:
    path = saved(tmp_path / "q.safetensors", quantized_tensors("int8", tensors(torch.float32)))
    model = ltx_model.skeleton(read_header(path))
    with offloaded(model, path):
        assert difference(run(model), run(load(path))) < 1e-2  # codes may flip at a boundary
    assert model.transformer.proj_out.weight.is_meta


def test_a_published_fp8_file_loads_and_runs(tmp_path: Path) -> None:
    plain = tensors(torch.bfloat16)
    cast = {n: t.to(torch.float8_e4m3fn) if is_layer(n) else t for n, t in plain.items()}
    model = load(saved(tmp_path / "fp8.safetensors", cast))
    again = {n: t.to(torch.bfloat16) if is_layer(n) else t for n, t in cast.items()}
    wanted = load(saved(tmp_path / "again.safetensors", again))
    assert torch.equal(run(model, torch.bfloat16), run(wanted, torch.bfloat16))


def is_layer(name: str) -> bool:
    return "transformer_blocks" in name and name.endswith(".weight") and "norm" not in name


def test_an_fp8_number_outside_a_linear_layer_is_refused(tmp_path: Path) -> None:
    found = tensors(torch.bfloat16)
    name = "model.diffusion_model.scale_shift_table"
    found[name] = found[name].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=rf"{name} is F8_E4M3, wanted one of F32, BF16, F16"):
        load(saved(tmp_path / "x.safetensors", found))


def test_a_quantized_layer_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    found = tensors(torch.bfloat16) | {
        "model.diffusion_model.extra.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    }
    with pytest.raises(CheckpointError, match="extra is quantized to fp8-cast, and is no linear"):
        load(saved(tmp_path / "x.safetensors", found))


def test_a_layer_of_another_shape_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    form: Format = "fp8-cast"
    found = quantized_tensors(form, tensors(torch.bfloat16))
    name = "model.diffusion_model.transformer_blocks.1.ff.net.2"
    found[f"{name}.weight"] = found[f"{name}.weight"][:, :-2].clone()
    header = read_header(saved(tmp_path / "x.safetensors", found))
    with torch.device("meta"):
        model = LTXVideo(parse_config(TABLE))
    with pytest.raises(CheckpointError, match=rf"{name} is \[128, 510\], wanted \[128, 512\]"):
        install(model, layers(header))
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_layers_are_installed_in_a_part_of_the_model(tmp_path: Path) -> None:
    found = quantized_tensors("int8-wo", tensors(torch.bfloat16))
    header = read_header(saved(tmp_path / "x.safetensors", found))
    with torch.device("meta"):
        model = LTXVideo(parse_config(TABLE))
    install(model.transformer, layers(header), "model.diffusion_model.")
    layer = model.transformer.transformer_blocks[1].get_submodule("ff.net.2")
    assert isinstance(layer, QuantizedLinear)
    assert layer.weight.is_meta


def test_a_cast_model_is_that_of_the_cast_file(tmp_path: Path) -> None:
    plain = tensors(torch.bfloat16)
    model = load(saved(tmp_path / "f.safetensors", plain), cast="fp8-cast")
    wanted = load(saved(tmp_path / "q.safetensors", quantized_tensors("fp8-cast", plain)))
    ours, theirs = model.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name].float(), theirs[name].float())
    assert difference(run(model, torch.bfloat16), run(wanted, torch.bfloat16)) < 1e-2


@pytest.mark.parametrize("value", [5000.0, -5000.0, float("nan"), float("inf")])
def test_what_a_cast_cannot_hold_is_refused_by_its_name(tmp_path: Path, value: float) -> None:
    plain = tensors(torch.bfloat16)
    name = next(name for name in plain if is_layer(name))
    plain[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=rf"{name} reaches .*, fp8-cast ends at 448; "):
        load(saved(tmp_path / "f.safetensors", plain), cast="fp8-cast")
    kept = torch.tensor([448.0, -448.0, 1.0], dtype=torch.bfloat16)
    assert quantized.cast_weight(kept, "fp8-cast", "w").tolist() == [448.0, -448.0, 1.0]


def test_the_models_layers_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    walk = torch.nn.Module.named_modules

    def counted(self: torch.nn.Module, *words: Any, **named: Any) -> Any:
        nonlocal calls
        calls += isinstance(self, torch.nn.Sequential) and not words
        return walk(self, *words, **named)

    model = torch.nn.Sequential(*(torch.nn.Linear(16, 8) for _ in range(5)))
    info = TensorInfo("I8", (8, 16), 0, 0)
    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    quantized.install(model, {str(i): Layer(str(i), "int8-wo", info) for i in range(5)})
    assert calls == 1
    assert all(isinstance(layer, QuantizedLinear) for layer in model)


def test_a_quantized_file_is_not_cast_again(tmp_path: Path) -> None:
    path = saved(tmp_path / "q.safetensors", quantized_tensors("int8-wo", tensors(torch.bfloat16)))
    with pytest.raises(CheckpointError, match=r"is quantized already \(.*attn1.to_k is int8-wo\)"):
        load(path, cast="fp8-cast")


def test_no_float_matrix_is_ever_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    most = 0
    rows = TensorFile.rows

    def counted(
        self: TensorFile, name: str, device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        nonlocal most
        assert is_layer(name)
        for piece in rows(self, name, device):
            assert piece.nbytes <= 4096
            alive.append(ref(piece))
            most = max(most, sum(known() is not None for known in alive))
            yield piece

    plain = tensors(torch.bfloat16)
    monkeypatch.setattr(TensorFile, "rows", counted)
    monkeypatch.setattr("ltx_ref.tensor_file.PIECE", 4096)
    path = saved(tmp_path / "f.safetensors", plain)
    model = load(path, cast="fp8-cast")
    assert len(alive) == sum(t.nbytes for name, t in plain.items() if is_layer(name)) / 4096
    assert most <= 2
    for name, codes_ in model.state_dict().items():
        if is_layer(name):
            wanted = quantized.cast_weight(plain[name], "fp8-cast", name)
            assert torch.equal(codes_.float(), wanted.float())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (5, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_a_tensor_is_read_as_safetensors_reads_it(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    wanted = (4 * normals(*shape, seed=1) if shape else torch.tensor(2.0)).to(dtype)
    path = tmp_path / "t.safetensors"
    save_file({"first": torch.ones(3, dtype=torch.int8), "t": wanted}, path)
    with TensorFile(read_header(path)) as file:
        found = file.read("t")
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(found.float(), wanted.float())
        if len(shape) == 2:
            assert torch.equal(torch.cat([*file.rows("t"), found[:0]]).float(), wanted.float())


CHILD = """
import sys
from pathlib import Path
from ltx_ref.ltx_video.model import load

def held(word):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(word):
            return int(line.split()[1]) * 1024

small, whole, cast = sys.argv[1:]
load(Path(small), cast=cast)  # what is imported on the way, and libraries' pages, are no weights
before = held("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
model = load(Path(whole), cast=cast)
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_casting_never_holds_the_float_model(tmp_path: Path) -> None:
    """A file of half a gigabyte of zeros, which takes no disk."""
    table = json.loads(json.dumps(TABLE))
    table["transformer"] |= {"attention_head_dim": 1024, "num_layers": 4}
    table["transformer"]["cross_attention_dim"] = 2048
    whole, cast = write_zeros(tmp_path / "zeros.safetensors", table)
    write_zeros(tmp_path / "small.safetensors", TABLE)
    most = peak(tmp_path / "small.safetensors", tmp_path / "zeros.safetensors", "fp8-cast")
    assert whole > 500e6
    assert most < cast + 40e6 < 0.75 * whole


def write_zeros(path: Path, table: dict[str, Any]) -> tuple[int, int]:
    """A sparse file in bfloat16; its tensors' bytes, and those of the same model cast."""
    with torch.device("meta"):
        model = LTXVideo(parse_config(table))
    counts = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    entries: dict[str, Any] = {"__metadata__": {"config": json.dumps(table)}}
    begin = 0
    for name, tensor in model.state_dict().items():
        offsets = [begin, begin + 2 * counts[name]]
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        begin = offsets[1]
    head = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + begin)
    return begin, begin - sum(count for name, count in counts.items() if is_layer(name))


def peak(small: Path, whole: Path, cast: str) -> int:
    """Bytes. What is freed goes back to the system at once: glibc keeps some, now and then."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(small), str(whole), cast],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return int(done.stdout)


def test_without_a_cast_the_mapped_file_is_shared(tmp_path: Path) -> None:
    path = saved(tmp_path / "f.safetensors", tensors(torch.bfloat16))
    model = load(path)
    name = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"
    address = model.state_dict()[name].data_ptr()
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [[int(end, 16) for end in row[0].split("-")] for row in ranges if str(path) in row]
    assert any(begin <= address < end for begin, end in spans)


def test_a_device_other_than_the_cpu_gets_tensor_after_tensor(tmp_path: Path) -> None:
    """The meta device stands in for a GPU: everything is read, and sent there."""
    path = saved(tmp_path / "f.safetensors", tensors(torch.bfloat16))
    model = ltx_model.load(path, device="meta", cast="fp8-cast")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 10 * LAYERS
