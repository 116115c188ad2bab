"""A checkpoint in another float type, written without ever being in memory as a whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_engines.bundle import Precision
from ltx_engines.errors import UserError
from ltx_export import convert
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video import model
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from tests.export.checkpoints import config, write_checkpoint
from tests.export.conftest import Files, export


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.weight": torch.randn(5, 7, generator=generator).bfloat16(),
        "a.weight": torch.randn(3, generator=generator),
        "scalar": torch.tensor(1000.0, dtype=torch.float16),
        "steps": torch.arange(4),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"config": "{}"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_the_planned_header_is_that_of_the_written_file(
    checkpoint: Path, precision: Precision
) -> None:
    source = read_header(checkpoint)
    target = convert.planned(source, precision)
    path = checkpoint.with_name(target.path.name)
    convert.write(source, target, path)
    assert path.name == f"model.{precision}.safetensors"
    assert read_header(path) == target


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_numbers_and_metadata_are_those_of_a_plain_cast(
    checkpoint: Path, precision: Precision
) -> None:
    source = read_header(checkpoint)
    target = convert.planned(source, precision)
    convert.write(source, target, checkpoint.with_name("out.safetensors"))
    before, after = load_file(checkpoint), load_file(checkpoint.with_name("out.safetensors"))
    for name, tensor in before.items():
        wanted = tensor.to(getattr(torch, precision)) if tensor.is_floating_point() else tensor
        assert torch.equal(after[name], wanted)
        assert after[name].dtype == wanted.dtype
    assert target.metadata == {"config": "{}"}


def test_a_file_that_has_the_type_already_is_its_own_plan(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "n": torch.arange(2)}, tmp_path / "a.safetensors")
    source = read_header(tmp_path / "a.safetensors")
    assert convert.planned(source, "float32") is source


def test_a_number_too_large_for_float16_is_named(tmp_path: Path) -> None:
    save_file({"x.weight": torch.tensor([1.0, 1e6])}, tmp_path / "a.safetensors")
    source = read_header(tmp_path / "a.safetensors")
    target = convert.planned(source, "float16")
    with pytest.raises(UserError, match=r"x\.weight reaches 1e\+06.*float32"):
        convert.write(source, target, tmp_path / "b.safetensors")


def test_a_quantized_checkpoint_is_not_converted(tmp_path: Path) -> None:
    tensors = {"x.weight": torch.ones(4).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"x\.weight is F8_E4M3"):
        convert.planned(read_header(tmp_path / "a.safetensors"), "float32")


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
