"""TensorRT-RTX multiplies what a recipe quantizes as codes, and leaves attention in one kernel."""

from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")

import torch

import engine_layers
from ltx_engines.bundle import Bundle, open_bundle
from ltx_export import cli
from ltx_ref import quantization
from ltx_ref.checkpoint import read_header
from ltx_ref.quantization import Format
from tests.export import quantized_files

TOKENS, TEXT, BLOCKS = 1024, 256, 3
SIZES = {"batch": 1, "tokens": TOKENS, "timesteps": 1, "text": TEXT}
CODES = {"fp8": "FP8", "int8": "Int8", "nvfp4": "FP4E2M1"}


def exported(folder: Path, form: Format, *, smooth: bool = False) -> Bundle:
    """Some of ltx-tiny in bfloat16, its blocks in this format."""
    checkpoint, kind = folder / f"{form}.safetensors", torch.bfloat16
    quantized_files.write(checkpoint, form, dtype=kind, smooth=smooth, blocks=BLOCKS)
    out = folder / "bundle"
    arguments = ["onnx", str(checkpoint), "--stages", "transformer", "--out", str(out)]
    assert cli.main(arguments) == 0
    return open_bundle(out, cache=folder / "cache")


def build(bundle: Bundle, capability: str) -> engine_layers.Built:
    entry = bundle.stage("transformer")
    assert entry.opset == 23
    return engine_layers.build(bundle.file(entry.file), SIZES, capability)


@pytest.mark.parametrize(
    ("form", "capability", "smooth"),
    [
        ("fp8", "SM89", False),
        ("fp8", "SM120", False),
        ("int8", "SM89", False),
        ("int8", "SM120", True),
        ("nvfp4", "SM120", False),
    ],
)
def test_each_quantized_layer_is_a_product_of_codes_and_each_attention_one_kernel(
    tmp_path: Path, form: Format, capability: str, smooth: bool
) -> None:
    bundle = exported(tmp_path, form, smooth=smooth)
    built = build(bundle, capability)
    paths = list(quantization.layers(read_header(tmp_path / f"{form}.safetensors")))
    assert len(paths) == 10 * BLOCKS
    found = {path: engine_layers.quantized(built, path) for path in paths}
    assert found == dict.fromkeys(paths, CODES[form])
    assert engine_layers.attentions(built) == 2 * BLOCKS
    assert not engine_layers.scores(built, TOKENS)
    assert quantized_entry(bundle) == {form: 10 * BLOCKS}


def quantized_entry(bundle: Bundle) -> dict[str, int]:
    entry = bundle.stage("transformer").quantization
    assert entry is not None
    return {str(form): count for form, count in entry.layers.items()}


def test_the_table_tells_products_of_codes_from_others(tmp_path: Path) -> None:
    """Weights alone in 8 bits are multiplied in 16."""
    bundle = exported(tmp_path, "int8-wo")
    built = build(bundle, "SM89")
    for path in quantization.layers(read_header(tmp_path / "int8-wo.safetensors")):
        assert engine_layers.quantized(built, path) is None
    assert engine_layers.attentions(built) == 2 * BLOCKS
