"""The GPU's benchmark as far as a machine without one can go: the same steps, on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_kernels
import quantized_gpu
import quantized_gpu_once as once
from ltx_engines.shapes import VideoShape
from ltx_ref.quantization import FORMATS, Format
from ltx_ref.quantized import choose

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny/ltx-tiny.safetensors"
VIDEO = VideoShape(9, 64, 96)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "DEVICE", "cpu")


@pytest.mark.parametrize("variant", ["bf16", "fp8", "int8", "fp8-cast"])
def test_every_variant_makes_a_finite_step(
    variant: str, bfloat16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        velocity = once.ours(variant, bfloat16, VIDEO)()
    assert velocity.shape == (1, VIDEO.tokens, 32)
    assert torch.isfinite(velocity).all()
    assert velocity.float().std() > 0


def test_diffusers_makes_the_same_step(bfloat16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["once", "diffusers", str(bfloat16)])
    with torch.no_grad():
        velocity = once.diffusers(VIDEO)()
    assert velocity.shape == (1, VIDEO.tokens, 32)
    assert torch.isfinite(velocity).all()


def test_without_a_gpu_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["quantized_gpu.py"])
    assert quantized_gpu.main() == 0
    assert "CUDA" in json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"]


def test_the_share_is_none_where_a_variant_failed() -> None:
    rows = {"bf16": {"peak": 100}, "fp8-cast": {"peak": 55}}
    assert quantized_gpu.share(rows) == 0.55
    assert quantized_gpu.share({**rows, "bf16": {"failed": "out of memory"}}) is None


GOOD = {"peak": 55, "kernels": ["int_mm"]}


@pytest.mark.parametrize(
    ("rows", "met"),
    [
        ({"bf16": {"peak": 100}, "fp8-cast": GOOD, "int8": GOOD}, True),
        ({"bf16": {"peak": 100}, "fp8-cast": GOOD, "int8": {"failed": "out of memory"}}, False),
        ({"bf16": {"peak": 100}, "fp8-cast": GOOD, "int8": {**GOOD, "kernels": ["fake"]}}, False),
        ({"bf16": {"peak": 80}, "fp8-cast": GOOD}, False),
        ({name: {"failed": "out of memory"} for name in ("bf16", "fp8-cast")}, False),
        ({}, False),
    ],
)
def test_a_variant_that_failed_or_was_imitated_is_not_met(rows: dict[str, Any], met: bool) -> None:
    assert quantized_gpu.met({"13b": rows}) is met


def test_the_kernels_that_a_step_used_are_noted(bfloat16: Path) -> None:
    once.KERNELS.clear()
    with torch.no_grad():
        once.ours("int8", bfloat16, VIDEO)()
    assert {"fake"} == once.KERNELS  # on a CPU


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_check_expects_what_the_layers_choose(
    form: Format, capability: tuple[int, int]
) -> None:
    chosen, _ = choose(form, torch.bfloat16, (2048, 2048), capability)
    assert gpu_kernels.expected(form, capability) == chosen


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ltx-tiny as released models are: in bfloat16."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("bf16") / "tiny.safetensors"
    with safe_open(TINY, "pt") as file:
        tensors = {name: file.get_tensor(name).bfloat16() for name in file.keys()}  # noqa: SIM118
        save_file(tensors, path, file.metadata())
    return path
