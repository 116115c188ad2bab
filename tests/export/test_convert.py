"""What a header says about the numbers, and casts that are those of torch, bit by bit."""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ltx_engines.errors import UserError
from ltx_export import convert, sources
from ltx_ref import casts, quantization
from ltx_ref.checkpoint import CheckpointError, Header, read_header
from ltx_ref.ltx_video import model
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from tests.export.checkpoints import config, write_checkpoint
from tests.export.conftest import Files, export

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"


def header(
    folder: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Header:
    """A file with a float block weight that `tensors` replace or join."""
    save_file({BLOCK: torch.ones(2, 2), **tensors}, folder / "a.safetensors", metadata)
    return read_header(folder / "a.safetensors")


def numbers() -> torch.Tensor:
    """All 65536 bfloat16 that are not NaN, and as many float32 at and around halves of a step."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    bits = torch.randint(-(2**31), 2**31 - 1, (2**16,), generator=torch.Generator().manual_seed(0))
    ties = bits.to(torch.int32) & ~0xFFFF | 0x8000
    found = torch.cat([every, ties.view(torch.float32), (ties + 1).view(torch.float32)])
    return found[found.isfinite()]


@pytest.mark.parametrize("source", sorted(TORCH))
@pytest.mark.parametrize("target", sorted(TORCH))
def test_a_cast_is_torchs_cast_bit_by_bit(source: str, target: str) -> None:
    before = numbers().to(TORCH[source])
    wanted = before.to(TORCH[target])
    kept = before.isfinite() & wanted.isfinite()
    before, wanted = before[kept], wanted[kept]
    raw = before.view(torch.uint8).numpy().view(casts.NUMPY[source])
    assert kept.sum() > 2**16
    assert np.array_equal(
        casts.cast(raw, target, "").view(np.uint8), wanted.view(torch.uint8).numpy()
    )


@pytest.mark.parametrize("target", sorted(TORCH))
def test_every_plain_8_bit_number_is_exact_in_every_float_type(target: str) -> None:
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    cast = casts.cast(every, target, "").astype(np.float32)
    assert np.array_equal(cast, every.astype(np.float32), equal_nan=True)
    torchs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(TORCH[target])
    assert np.array_equal(cast, torchs.float().numpy(), equal_nan=True)


def test_infinity_and_not_a_number_stay_what_they_are() -> None:
    given = np.array([np.inf, -np.inf, np.nan, 1.0], np.float32)
    for target in TORCH:
        cast = casts.cast(given, target, "").astype(np.float32)
        assert np.array_equal(cast, given, equal_nan=True)


def test_numbers_that_already_have_the_type_are_not_copied() -> None:
    given = np.ones(3, np.float16)
    assert casts.cast(given, "F16", "") is given


@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_the_first_number_that_rounds_to_infinity_is_refused(target: str) -> None:
    info = torch.finfo(TORCH[target])
    half_a_step = (info.max - torch.nextafter(torch.tensor(info.max, dtype=TORCH[target]),
                   torch.tensor(0.0, dtype=TORCH[target])).item()) / 2  # fmt: skip
    over = np.array([info.max + half_a_step], np.float64).astype(np.float32)
    below = np.nextafter(over, np.float32(0))
    assert casts.cast(below, target, "").astype(np.float64) == info.max
    with pytest.raises(
        CheckpointError, match=r"x\.weight reaches .*e\+.* ends at .*--precision float32"
    ):
        casts.cast(over, target, "x.weight")


def test_tensors_are_read_from_any_place_to_any_place(tmp_path: Path) -> None:
    tensor = torch.randn(7, 5).bfloat16()
    found = header(tmp_path, {"x": tensor}).tensors["x"]
    with (tmp_path / "a.safetensors").open("rb") as file:
        part = casts.read(file, found, 10, 20).astype(np.float32)
        assert np.array_equal(part, tensor[2:4].flatten().float().numpy())
        assert casts.read(file, found).size == 35


def test_a_file_that_shrinks_while_it_is_read_is_not_half_a_tensor(tmp_path: Path) -> None:
    found = header(tmp_path, {"x": torch.ones(9)}).tensors["x"]
    short = tmp_path / "short"
    short.write_bytes((tmp_path / "a.safetensors").read_bytes()[: found.end - 1])
    with short.open("rb") as file, pytest.raises(CheckpointError, match="short became shorter"):
        casts.read(file, found)


def test_a_float_file_is_float(tmp_path: Path) -> None:
    found = convert.kind(header(tmp_path, {"n": torch.arange(3), "h": torch.ones(3).half()}))
    assert found.name == "float"
    assert found.means_itself
    assert "1 F16, 1 F32" in found.sentence


def test_a_published_fp8_file_is_recognised_as_plain(tmp_path: Path) -> None:
    eight = torch.ones(2, 2).to(torch.float8_e4m3fn)
    found = convert.kind(header(tmp_path, {BLOCK: eight, "b": torch.ones(2)}))
    assert found.name == "fp8_plain"
    assert found.means_itself
    assert "1 F32, 1 F8_E4M3" in found.sentence


@pytest.mark.parametrize(
    "scale",
    [
        *("x.weight_scale", "x.weight_scale_2", "x.scale_weight", "x.input_scale"),
        *("x.weight_scale_inv", "scaled_fp8", "x.pre_quant_scale", "x.comfy_quant"),
    ],
)
def test_a_file_with_scales_is_refused_by_name(tmp_path: Path, scale: str) -> None:
    eight = torch.ones(2, 2).to(torch.float8_e4m3fn)
    found = header(tmp_path, {"x.weight": eight, scale: torch.ones(())})
    assert convert.kind(found).name == "scaled"
    with pytest.raises(UserError, match=rf"bfloat16: .*scales \({scale}\).*start from the"):
        convert.types(found, "bfloat16")


def test_metadata_that_tell_of_quantization_count_too(tmp_path: Path) -> None:
    found = header(tmp_path, {}, {"_quantization_metadata": "{}"})
    assert convert.kind(found).name == "scaled"


FOREIGN: dict[str, dict[str, torch.Tensor]] = {
    "TurboDiffusion's int8: blocks of 128 x 128": {
        "x.int8_weight": torch.ones(256, 256).to(torch.int8),
        "x.scale": torch.ones(2, 2),
    },
    "ComfyUI's scaled fp8": {
        "x.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "x.scale_weight": torch.ones(()),
    },
    "scaled fp8 as of LTX-2": {
        "x.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "x.weight_scale": torch.ones(()),
        "x.input_scale": torch.ones(()),
    },
    "q8_kernels' int8: weights rotated": {
        "x.weight": torch.ones(2, 2).to(torch.int8),
        "x.scales": torch.ones(2),
    },
    "bitsandbytes' codes": {
        "x.weight": torch.ones(8, 1).to(torch.uint8),
        "x.weight.absmax": torch.ones(1),
        "x.weight.quant_map": torch.ones(16),
    },
    "GPTQ's or AWQ's codes": {
        "x.qweight": torch.ones(2, 2).to(torch.int32),
        "x.scales": torch.ones(2, 2),
    },
    "DeepSeek's fp8: blocks of 128": {
        "x.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "x.weight_scale_inv": torch.ones(1, 1),
    },
}


@pytest.mark.parametrize("what", sorted(FOREIGN))
def test_quantized_files_of_others_are_explained_and_refused(tmp_path: Path, what: str) -> None:
    found = header(tmp_path, FOREIGN[what])
    assert convert.kind(found).name == "scaled"
    assert what in convert.kind(found).sentence
    assert not convert.kind(found).is_read
    with pytest.raises(UserError, match=r"cannot be read: .*; start from the bfloat16"):
        convert.check_read(found, "cannot be read")


def test_a_file_of_llama_cpp_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"a\.safetensors is a GGUF file, .*take the original"):
        sources.read(tmp_path / "a.safetensors")


def quantized(folder: Path, **codes: torch.Tensor) -> Header:
    eight = torch.ones(2, 2).to(torch.float8_e4m3fn)
    scales = {"x.weight_scale": torch.ones(2), "x.input_scale": torch.ones(())}
    return header(folder, {"x.weight": eight, **scales, **codes})


def test_codes_in_our_layout_are_read_whoever_wrote_them(tmp_path: Path) -> None:
    found = convert.kind(quantized(tmp_path))
    assert (found.name, found.is_read, found.means_itself) == ("quantized", True, False)
    assert found.sentence.endswith("by another program, in the layout of ltx-export: 1 to fp8")


def test_a_precision_is_for_the_floats_and_not_for_codes_and_scales(tmp_path: Path) -> None:
    found = convert.types(quantized(tmp_path, h=torch.ones(2)), "float16")
    assert found == {
        **{BLOCK: "F16", "h": "F16", "x.weight": "F8_E4M3"},
        **{"x.weight_scale": "F32", "x.input_scale": "F32"},
    }


def test_a_file_that_lost_a_layer_of_its_recipe_is_no_kind_at_all(tmp_path: Path) -> None:
    told = json.dumps({"recipe": {"name": "fp8"}, "layers": {"x": "fp8", "y": "fp8"}})
    found = header(tmp_path, {"x.weight": torch.ones(2, 2)}, {quantization.METADATA: told})
    with pytest.raises(CheckpointError, match="x is not quantized, its recipe says fp8"):
        convert.kind(found)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8, torch.uint8])
def test_weights_in_other_types_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    found = header(tmp_path, {"x.weight": torch.ones(2, 2).to(dtype)})
    assert convert.kind(found).name == "unsupported"
    with pytest.raises(UserError, match=r"x\.weight is (F8_E5M2|I8|U8)"):
        convert.types(found, "float32")


def test_without_a_precision_no_type_changes_whatever_the_file_is(tmp_path: Path) -> None:
    weight = torch.ones(2, 2).to(torch.int8)
    found = header(tmp_path, {"x.weight": weight, "x.weight_scale": torch.ones(1)})
    assert convert.types(found, None) == {n: info.dtype for n, info in found.tensors.items()}


def test_a_bfloat16_checkpoint_runs_on_the_cpu_after_conversion(
    files: Files, tmp_path: Path
) -> None:
    """ONNX Runtime's CPU has no bfloat16 kernels; the converted weights are exact in float32."""
    source = write_checkpoint(tmp_path / "half.safetensors", config("0.9.5"), dtype=torch.bfloat16)
    options = ("--precision", "float32")
    exported = export(source, files.text_encoder, tmp_path / "bundle", "vae_encoder", *options)
    bundle = exported.bundle
    assert bundle.manifest.checkpoint == "half.float32.safetensors"
    assert bundle.manifest.name == "half"
    assert bundle.manifest.precision == "float32"
    reference = model.load(source).float()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 9, 32, 64, generator=generator)
    noise = torch.randn(1, bundle.manifest.model.latent_channels, 2, 1, 2, generator=generator)
    with torch.no_grad():
        wanted = reference.vae.encode(pixels, noise).numpy()
    with OnnxRuntimeSession.open(bundle, "vae_encoder") as session:
        found = session({"pixels": pixels.numpy(), "noise": noise.numpy()})["latents"]
    assert abs(found - wanted).max() <= 1e-4 * abs(wanted).max()
