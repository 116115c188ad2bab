"""LoRAs at run time: what they make of float weights and of codes, and when they are refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from ltx_engines.errors import UserError
from ltx_export import derive, lora_fit
from ltx_ref import codes, quantization
from ltx_ref.checkpoint import Header, read_header
from ltx_ref.lora import Wish
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX as PREFIX
from ltx_ref.quantization import Format
from ltx_trt.session import lora_weights
from ltx_trt.session.lora_weights import Plan
from tests.export import loras, quantized_files
from tests.export.generators import finish
from tests.export.loras import Factors

BLOCKS = 2
WEIGHT = f"{PREFIX}{loras.ATTENTION}.weight"
Numbers = NDArray[np.float64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def floats(folder: Path) -> Header:
    file = folder / "f32.safetensors"
    return read_header(quantized_files.write(file, lambda _: None, blocks=BLOCKS))


@pytest.fixture(scope="module")
def factors(floats: Header) -> Factors:
    found = loras.factors(floats.shapes())
    return {name: (a, 0.02 * b) for name, (a, b) in found.items() if "blocks" in name}


@pytest.fixture(scope="module")
def adapter(folder: Path, factors: Factors) -> Path:
    return loras.write(folder / "lora.safetensors", loras.tensors(factors, alpha=3.0))


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Mapping[Format, Header]:
    files: dict[Format, Header] = {}
    forms: tuple[Format, ...] = ("fp8", "int8", "fp8-cast", "int8-wo", "int4-wo", "nvfp4")
    for form in forms:
        file = folder / f"{form}.safetensors"
        smooth = form == "int8"
        files[form] = read_header(quantized_files.write(file, form, blocks=BLOCKS, smooth=smooth))
    return files


def made(header: Header, *wishes: Wish) -> dict[str, NDArray[Any]]:
    plan = Plan("transformer", lora_weights.changes(header, wishes))
    found = {name: values for name, _, values in plan.weights()}
    assert found.keys() == plan.names
    return found


def value(header: Header, given: Mapping[str, NDArray[Any]], path: str) -> Numbers:
    """What a layer's weight stands for, without smoothing; `given` before the file."""
    layer = quantization.layers(header)[path]
    parts = quantized_files.parts_of(quantized_files.read(header.path), path)
    parts |= quantized_files.parts_of(given, path)
    wide = quantized_files.weight_of(parts, layer.format)
    return wide * parts.get("pre_quant_scale", np.float32(1))


def delta(factors: Factors, path: str) -> Numbers:
    down, up = factors[path.removeprefix(PREFIX)]
    return (up.double() @ down.double()).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("style", ["diffusers", "PEFT", "ComfyUI, old", "kohya"])
def test_float_weights_are_those_of_a_fused_checkpoint_bit_by_bit(
    factors: Factors, tmp_path: Path, dtype: torch.dtype, style: str
) -> None:
    source = quantized_files.write(tmp_path / "x", lambda _: None, dtype=dtype, blocks=BLOCKS)
    header = read_header(source)
    lora = loras.write(tmp_path / "a", loras.tensors(factors, style, 1.5))
    adapters = lora_fit.read([Wish(lora, 0.8)], header)
    finish(derive.write(header, derive.planned(header, None, adapters), tmp_path / "y", adapters))
    wanted = load_file(tmp_path / "y")
    found = made(header, Wish(lora, 0.8))
    assert found.keys() == {f"{PREFIX}{module}.weight" for module in factors}
    for name, values in found.items():
        assert values.tobytes() == wanted[name].view(torch.uint8).numpy().tobytes()


def test_two_loras_are_added_up_and_rounded_once(
    floats: Header, adapter: Path, factors: Factors, folder: Path
) -> None:
    other = loras.write(folder / "other.safetensors", loras.tensors(factors, "kohya"))
    found = made(floats, Wish(adapter, 0.5), Wish(other, -2.0))[WEIGHT]
    wanted = load_file(floats.path)[WEIGHT].double().numpy()
    wanted = wanted - 1.5 * delta(factors, WEIGHT.removesuffix(".weight"))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["fp8", "int8", "fp8-cast", "int8-wo"])
def test_a_change_far_below_the_step_between_codes_is_not_lost(
    quantized: Mapping[Format, Header], adapter: Path, factors: Factors, form: Format
) -> None:
    """To nearest, nothing of it would be left: the codes are what they would be rounded to."""
    header, strength = quantized[form], 0.05
    found = made(header, Wish(adapter, strength))
    left, nearest, all_of_it = 0.0, 0.0, 0.0
    for module in factors:
        path = f"{PREFIX}{module}"
        wished, before = strength * delta(factors, path), value(header, {}, path)
        left += float(((value(header, found, path) - before) * wished).sum())
        nearest += float(((_to_nearest(header, path, wished) - before) * wished).sum())
        all_of_it += float((wished**2).sum())
    assert 0.9 <= left / all_of_it <= 1.1
    assert nearest / all_of_it < 0.5


def _to_nearest(header: Header, path: str, wished: Numbers) -> Numbers:
    layer = quantization.layers(header)[path]
    parts = quantized_files.parts_of(quantized_files.read(header.path), path)
    scales = parts.get("weight_scale", np.ones(len(wished), np.float32)).astype(np.float64)
    pre = parts.get("pre_quant_scale", np.float32(1))
    shares = parts["weight"].astype(np.float64) + wished / pre / scales[:, None]
    kind = codes.E4M3 if layer.format.startswith("fp8") else None
    rounded = np.rint(shares) if kind is None else shares.astype(kind).astype(np.float64)
    return rounded * scales[:, None] * pre


@pytest.mark.parametrize("form", ["fp8", "int8", "fp8-cast", "int8-wo"])
def test_codes_come_as_near_as_rounding_them_twice_allows(
    quantized: Mapping[Format, Header],
    floats: Header,
    adapter: Path,
    factors: Factors,
    form: Format,
) -> None:
    """Against fused and then quantized, which rounds once: to nearest, errors of 1/12 of a step
    squared; dithered afterwards, up to 1/4 of it more."""
    found, weights = made(quantized[form], Wish(adapter)), load_file(floats.path)
    for module in factors:
        path = f"{PREFIX}{module}"
        wanted = weights[f"{path}.weight"].double().numpy() + delta(factors, path)
        parts = quantized_files.encoded(wanted.astype(np.float32), form, 6.0, smooth=form == "int8")
        pre = parts.get("pre_quant_scale", np.float32(1))
        once = quantized_files.weight_of(parts, form) * pre - wanted
        twice = value(quantized[form], found, path) - wanted
        assert np.linalg.norm(twice) <= 2.1 * np.linalg.norm(once)


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_a_row_beyond_its_stored_scale_gets_another_and_all_others_keep_theirs(
    quantized: Mapping[Format, Header], tmp_path: Path, form: Format
) -> None:
    header = quantized[form]
    path = WEIGHT.removesuffix(".weight")
    rows, columns = quantization.layers(header)[path].shape
    down, up = torch.zeros(1, columns), torch.zeros(rows, 1)
    down[0, 3], up[5, 0] = 7.0, 9.0
    lora = loras.write(tmp_path / "a", loras.tensors({loras.ATTENTION: (down, up)}))
    found = made(header, Wish(lora))
    before = quantized_files.read(header.path)
    others = np.arange(rows) != 5
    for name in (WEIGHT, f"{WEIGHT}_scale"):
        assert found[name][others].tobytes() == before[name][others].tobytes()
    assert found[f"{WEIGHT}_scale"][5] > before[f"{WEIGHT}_scale"][5]
    assert value(header, found, path)[5, 3] == pytest.approx(63, rel=0.07)
    scale = found[f"{WEIGHT}_scale"]
    assert (scale.astype(codes.BF16).astype(np.float32) == scale).all()


def test_a_cast_has_no_scale_that_could_grow(
    quantized: Mapping[Format, Header], adapter: Path
) -> None:
    with pytest.raises(UserError, match=r"reaches .* its type ends at 448; lower the strength"):
        made(quantized["fp8-cast"], Wish(adapter, 1e6))


def test_a_float_that_overflows_is_named_with_its_file(adapter: Path, tmp_path: Path) -> None:
    file = quantized_files.write(tmp_path / "x", lambda _: None, dtype=torch.float16, blocks=BLOCKS)
    with pytest.raises(UserError, match=r"lora\.safetensors: .* its type ends at 6\.55e\+04"):
        made(read_header(file), Wish(adapter, 1e8))


def test_the_same_codes_are_made_in_each_run(
    quantized: Mapping[Format, Header], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = made(quantized["fp8"], Wish(adapter))
    monkeypatch.setattr(lora_weights, "PIECE", 1000)
    again = made(quantized["fp8"], Wish(adapter))
    assert all(once[name].tobytes() == again[name].tobytes() for name in once)


@pytest.mark.parametrize("form", ["int4-wo", "nvfp4"])
def test_four_bits_take_no_lora_and_the_way_to_fuse_one_is_said(
    quantized: Mapping[Format, Header], adapter: Path, form: Format
) -> None:
    with pytest.raises(UserError, match=rf"is {form}: .* ltx-export lora --out, and quantize that"):
        made(quantized[form], Wish(adapter))


def test_a_damaged_factor_is_found_before_any_weight_is_made(
    floats: Header, factors: Factors, tmp_path: Path
) -> None:
    tensors = loras.tensors(factors)
    tensors[f"diffusion_model.{loras.ATTENTION}.lora_B.weight"][3, 0] = torch.nan
    lora = loras.write(tmp_path / "a", tensors)
    with pytest.raises(UserError, match=r"to_q\.lora_B\.weight or its other factor is not finite"):
        lora_weights.changes(floats, [Wish(lora)])


def test_whoever_reads_tensor_by_tensor_gets_the_same_bytes(
    quantized: Mapping[Format, Header], adapter: Path
) -> None:
    header = quantized["fp8"]
    plan = Plan("transformer", lora_weights.changes(header, [Wish(adapter)]))
    patch, data = plan.patch(), np.fromfile(header.path, np.uint8)
    wanted = {name: values.tobytes() for name, _, values in plan.weights()}
    for name, info in header.tensors.items():
        given = data[info.begin : info.end]
        assert patch(name, given).tobytes() == wanted.get(name, given.tobytes())


def test_what_lies_in_the_bundle_can_be_had_again_bit_by_bit(
    quantized: Mapping[Format, Header], adapter: Path
) -> None:
    before = quantized_files.read(quantized["int8"].path)
    for changed in lora_weights.changes(quantized["int8"], [Wish(adapter)]).values():
        for name, dtype, values in changed.base():
            assert dtype == {"weight": "int8"}.get(name.rpartition(".")[2], "float32")
            assert values.tobytes() == before[name].tobytes()


def test_other_tensors_than_weights_change_too(floats: Header, tmp_path: Path) -> None:
    name = f"{PREFIX}{loras.ATTENTION}.bias"
    before = load_file(floats.path)[name]
    lora = tmp_path / "a"
    save_file({f"diffusion_model.{loras.ATTENTION}.diff_b": torch.ones_like(before)}, lora)
    assert made(floats, Wish(lora, 2.0)).keys() == {name}
    np.testing.assert_array_equal(made(floats, Wish(lora, 2.0))[name], before.numpy() + 2)
