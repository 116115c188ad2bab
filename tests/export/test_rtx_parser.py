"""TensorRT-RTX's parser, which needs no GPU, reads every stage of a released model as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

from ltx_engines.bundle import open_bundle
from ltx_engines.stages import OPTIONAL, STAGES
from ltx_export import cli
from tests.export.rtx import parse

ROOT = Path(__file__).parents[2]
MAKE = (sys.executable, ROOT / "tools/make_checkpoint.py", "--sparse", "--model")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13B, T5-XXL and the spatial upscaler: their true names and shapes, and holes for weights."""
    folder = tmp_path_factory.mktemp("released")
    for model, name in (("13b", "13b.safetensors"), ("t5-xxl", "t5"), ("spatial-upscaler", "up")):
        subprocess.run([*MAKE, model, "--out", folder / name], check=True, capture_output=True)
    files = ("--text-encoder", str(folder / "t5"), "--upsampler", str(folder / "up"))
    out = folder / "bundle"
    assert cli.main(["onnx", str(folder / "13b.safetensors"), *files, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("stage", [*STAGES, *OPTIONAL])
def test_every_stage_of_a_released_model_is_parsed_from_its_file(
    released: Path, stage: str
) -> None:
    bundle = open_bundle(released, cache=released.parent)
    entry = bundle.stage(stage)
    borders = parse(bundle.file(entry.file))
    assert borders == {t.name: t.dtype for t in (*entry.inputs, *entry.outputs)}
    assert "bfloat16" in borders.values()
