"""ltx-export build-engine --backend onnxruntime: graphs for the providers that compute them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ltx_engines import bundle
from ltx_engines.bundle import open_bundle
from ltx_export import cli
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from tests.export import quantized_files

SHAPES = ("--shape", "64x64x9", "--shape", "96x64x9")


def built(source: Path, *options: str) -> int:
    return cli.main(["build-engine", str(source), "--backend", "onnxruntime", *options])


def from_checkpoint(folder: Path, *options: str) -> Path:
    file = quantized_files.write(
        folder / "tiny.safetensors", lambda _: None, dtype=torch.bfloat16, blocks=3
    )
    stages = ("--stages", "transformer,vae_decoder", "--out", str(folder / "bundle"))
    assert built(file, *stages, *SHAPES, *options) == 0
    return folder / "bundle"


def test_float16_is_for_cuda_with_attention_in_one_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = from_checkpoint(tmp_path, "--precision", "fp16")
    manifest = open_bundle(out).manifest
    assert manifest.precision == "float16"
    assert {stage.opset for stage in manifest.stages.values()} == {20}
    assert manifest.stages["transformer"].domains == ("com.microsoft",)
    assert not manifest.engines
    assert manifest.onnxruntime["transformer"].providers == ("cuda", "tensorrt-rtx")
    decoder = manifest.onnxruntime["vae_decoder"]
    assert decoder.providers == ("cpu", "cuda", "tensorrt-rtx")
    assert [profile["latent_width"] for profile in decoder.profiles] == [(2, 2, 2), (3, 3, 3)]
    said = capsys.readouterr().out
    assert said == "transformer: cuda, tensorrt-rtx\nvae_decoder: cpu, cuda, tensorrt-rtx\n"
    assert built(out, *SHAPES) == 0
    assert capsys.readouterr().out == f"{out}: up to date (transformer, vae_decoder)\n"
    assert built(out, "--shape", "64x64x9") == 0
    assert len(bundle.read(out).onnxruntime["vae_decoder"].profiles) == 1


def test_a_builder_reads_onnx_runtimes_own_attention_as_one_kernel(tmp_path: Path) -> None:
    """For which bundles list the provider that asks the same parser."""
    pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")
    out = from_checkpoint(tmp_path, "--precision", "fp16")
    words = ["--stages", "transformer", "--gpu", "sm89", *SHAPES[:2], "--branches", "1"]
    assert cli.main(["build-engine", str(out), *words]) == 0
    (engine,) = (e for e in bundle.read(out).engines if e.key.stage == "transformer")
    assert engine.counts["fused attentions"] == 6
    assert engine.counts["score kernels"] == 0


def test_fused_attention_computes_what_the_written_out_one_does(tmp_path: Path) -> None:
    file = quantized_files.write(tmp_path / "tiny.safetensors", lambda _: None, blocks=3)
    plain, fused = tmp_path / "plain", tmp_path / "fused"
    stages = ("--stages", "transformer", "--out")
    assert cli.main(["onnx", str(file), *stages, str(plain)]) == 0
    assert built(file, *stages, str(fused), *SHAPES) == 0
    sizes = {"batch": 2, "tokens": 10, "text": 6, "timesteps": 1}
    found = []
    for folder in (plain, fused):
        opened = open_bundle(folder)
        assert ("com.microsoft" in opened.stage("transformer").domains) == (folder == fused)
        inputs = opened.stage("transformer").inputs
        shapes = {t.name: [a if isinstance(a, int) else sizes[a] for a in t.axes] for t in inputs}
        dice = np.random.default_rng(2)
        feeds = {n: dice.uniform(0.1, 1, s).astype(np.float32) for n, s in shapes.items()}
        feeds["prompt_mask"] = np.array([[1] * 6, [1] * 3 + [0] * 3], np.float32)
        with OnnxRuntimeSession.open(opened, "transformer", provider="cpu", threads=1) as session:
            found.append(session(feeds)["velocity"])
    assert np.abs(found[0] - found[1]).max() < 1e-5


def test_bfloat16_is_for_tensorrt_rtx_and_it_is_said_why_not_for_cuda(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = open_bundle(from_checkpoint(tmp_path)).manifest
    assert manifest.stages["transformer"].opset == 23
    assert manifest.onnxruntime["transformer"].providers == ("tensorrt-rtx",)
    assert "not cuda: stage transformer is bfloat16" in capsys.readouterr().out


def test_graphs_for_no_gpu_are_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = quantized_files.write(tmp_path / "tiny.safetensors", "int8", blocks=3)
    out = str(tmp_path / "bundle")
    assert cli.main(["onnx", str(file), "--stages", "transformer", "--out", out]) == 0
    assert built(Path(out)) == 2
    assert "is int8, whose products ONNX Runtime has not for CUDA" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [("--gpu", "sm89"), ("--split", "2"), ("--weight-streaming",), ("--engine-weights", "inputs")],
)
def test_what_is_of_engines_is_refused(
    option: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built(quantized_files.TINY.parent, *option) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"{option[0]} is for engines; leave it out with --backend onnxruntime\n")
