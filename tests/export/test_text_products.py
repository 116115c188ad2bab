"""Each block's keys and values of the text are products of their own, whatever their format."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")

import torch

from ltx_engines.bundle import open_bundle
from ltx_export import build, cli, layer_table, text_products
from ltx_export.build_job import Job
from ltx_export.layer_table import Layer
from ltx_ref.quantization import Format
from tests.export import quantized_files

BLOCKS = 6
SIZES = {"batch": 2, "tokens": 96, "timesteps": 1, "text": 64}


def exported(folder: Path, form: Format | None, dtype: torch.dtype) -> Path:
    checkpoint = folder / "tiny.safetensors"
    chosen = form or (lambda _: None)
    quantized_files.write(checkpoint, chosen, dtype=dtype, smooth=form == "int8")
    out = folder / "bundle"
    arguments = ["onnx", str(checkpoint), "--stages", "transformer", "--opset", "23"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    bundle = open_bundle(out, cache=folder / "cache")
    return bundle.file(bundle.stage("transformer").file)


def built(graph: Path, folder: Path) -> list[Layer]:
    import onnx

    shapes = {}
    for value in onnx.load(graph, load_external_data=False).graph.input:
        axes = value.type.tensor_type.shape.dim
        shape = tuple(SIZES[d.dim_param] if d.dim_param else d.dim_value for d in axes)
        shapes[value.name] = (shape, shape, shape)
    engine, table = folder / "x.engine", folder / "x.json"
    version = build.version("tensorrt-rtx")
    build.build(
        Job(graph, engine, table, "tensorrt-rtx", version, (89,), (shapes,), {}),
        lambda _: None,
    )
    return list(layer_table.read(table))


def text_products_of(layers: Sequence[Layer]) -> list[list[str]]:
    """The products of the text's keys and values, by kernel that has a matrix of weights."""
    multiply = [layer for layer in layers if any(min(c.shape) > 1 for c in layer.constants)]
    found = [[n for n in layer.nodes if text_products.PRODUCT.search(n)] for layer in multiply]
    return [nodes for nodes in found if nodes]


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(None, torch.bfloat16), ("fp8", torch.bfloat16), ("int8", torch.float16)],
)
def test_no_kernel_multiplies_the_text_twice(
    tmp_path: Path, form: Format | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = exported(tmp_path, form, dtype)
    layers = built(graph, tmp_path)
    apart = text_products_of(layers)
    assert sorted(map(len, apart)) == [1] * (2 * BLOCKS)
    if form is not None:
        word = layer_table.CODES[form]
        assert {layer.codes for layer in layers if text_products_of([layer])} == {word}
    monkeypatch.setattr(text_products, "FEWEST", 2 * BLOCKS + 1)
    merged = text_products_of(built(graph, tmp_path))
    assert max(map(len, merged)) > 1, "the builder does not merge them: is this needed at all?"


@pytest.mark.parametrize(
    ("kind", "dtype"), [("BF16", torch.bfloat16), ("HALF", torch.float16), ("FLOAT", torch.float32)]
)
def test_a_bound_is_the_whole_number_in_its_type(kind: str, dtype: torch.dtype) -> None:
    for value in (1, 2, 97, 255):
        bits = text_products._bits(kind, value)
        held = torch.from_numpy(np.frombuffer(bits.tobytes(), np.uint8).copy()).view(dtype)
        assert held.tolist() == [value]
