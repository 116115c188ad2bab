"""TensorRT-RTX's parser, which needs no GPU, reads every stage of a released model as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.stages import OPTIONAL, STAGES, STREAM
from ltx_export import cli
from tests.export.rtx import parse, parse_with

ROOT = Path(__file__).parents[2]
FP8 = ("--dtype", "fp8")


def made(model: str, path: Path, *options: str) -> Path:
    """A released model's true names and shapes, and a hole for its weights."""
    command = (sys.executable, ROOT / "tools/make_checkpoint.py", "--sparse", "--model", model)
    subprocess.run([*command, "--out", path, *options], check=True, capture_output=True)
    return path


def export(checkpoint: Path, out: Path, *options: str) -> Bundle:
    assert cli.main(["onnx", str(checkpoint), "--out", str(out), *options]) == 0
    return open_bundle(out, cache=out.parent)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("released")
    text, upscaler = made("t5-xxl", folder / "t5"), made("spatial-upscaler", folder / "up")
    files = ("--text-encoder", str(text), "--upsampler", str(upscaler))
    return export(made("13b", folder / "13b.safetensors"), folder / "bundle", *files)


@pytest.mark.parametrize("stage", [*STAGES, STREAM, *OPTIONAL])
def test_every_stage_of_a_released_model_is_parsed_from_its_file(
    released: Bundle, stage: str
) -> None:
    entry = released.stage(stage)
    borders = parse(released.file(entry.file))
    assert borders == {t.name: t.dtype for t in (*entry.inputs, *entry.outputs)}
    assert "bfloat16" in borders.values()
    assert entry.opset == 23


def test_weights_that_stay_elsewhere_are_handed_over_by_name(tmp_path: Path) -> None:
    checkpoint = made("2b", tmp_path / "2b.safetensors", *FP8)
    (tmp_path / "hub").symlink_to(checkpoint)
    options = ("--stages", "transformer", "--weights", "refer")
    bundle = export(tmp_path / "hub", tmp_path / "bundle", *options)
    entry = bundle.stage("transformer")
    (weights,) = entry.weights
    assert bundle.file(weights) == checkpoint
    borders = parse_with(bundle.file(entry.file), checkpoint)
    assert borders["velocity"] == "bfloat16", "8-bit weights are widened to the stage's type"
