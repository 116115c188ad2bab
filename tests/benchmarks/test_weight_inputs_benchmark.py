"""What the benchmark of weights as inputs counts, and when its aims are met."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import weight_inputs
import weight_inputs_step
from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_export.layer_table import Layer, Operand, products
from ltx_trt.session.device import Device
from ltx_trt.session.engine_runner import EngineRunner


def row(**changes: object) -> dict[str, object]:
    plain = {"products": {"FP8": 10}, "attentions": 2, "score_kernels": 0, "weights_made_anew": 0}
    return {**plain, **changes}


def gemm(*paths: str) -> Layer:
    inputs = (Operand("x", (8, 4), "FP8"), Operand("w", (4, 4), "FP8"))
    outputs = (Operand("y", (8, 4), "BFloat16"),)
    return Layer("gemm", "gemm", inputs, (), outputs, frozenset(f"{p}/MatMul" for p in paths))


def test_an_embedded_kernel_of_two_blocks_counts_once_for_one_of_them() -> None:
    found = products([gemm("blocks.0.to_k", "blocks.1.to_k"), gemm("blocks.1.to_q")])
    assert weight_inputs.of(found, "FP8", "blocks.1") == 2
    assert weight_inputs.of(found, "FP8", "") == 3


def test_a_kernel_that_writes_a_weight_again_is_found() -> None:
    weight = Operand("attn1.to_q.weight", (4, 16), "BFloat16")
    turned = Operand("t", (1, 16, 4), "BFloat16")
    product = Operand("y", (1, 8, 4), "BFloat16")
    copy = Layer("__myl_Tran", "kgen", (weight,), (), (turned,), frozenset())
    assert weight_inputs.made_anew(
        [copy, Layer("g", "gemm", (weight,), (), (product,), frozenset())]
    )
    assert not weight_inputs.made_anew([gemm("to_q")])


def test_a_block_must_be_what_the_embedded_one_is() -> None:
    rows = {"embedded": row(), "prologue": row(), "block": row(), "epilogue": row()}
    assert weight_inputs.met(rows)
    assert not weight_inputs.met(rows | {"block": row(products={"FP8": 9})})
    assert not weight_inputs.met(rows | {"block": row(weights_made_anew=1)})
    assert not weight_inputs.met(rows | {"epilogue": {"failed": "why"}})


def test_a_step_may_take_a_tenth_longer() -> None:
    rows = {f"{form} {kind}": {"step_s": 1.0} for form in ("bf16", "fp8") for kind in KINDS}
    assert weight_inputs.fast(rows | {"fp8 inputs": {"step_s": 1.09}})
    assert not weight_inputs.fast(rows | {"fp8 inputs": {"step_s": 1.11}})
    assert not weight_inputs.fast(rows | {"bf16 embedded": {"failed": "why"}})


def test_a_graph_that_gives_other_bytes_misses_the_aim() -> None:
    rows = {"embedded": {"same_when_captured": True}, "inputs": {"same_when_captured": None}}
    assert weight_inputs.captured(rows)
    assert not weight_inputs.captured(rows | {"inputs": {"same_when_captured": False}})


def test_a_graph_is_compared_with_what_it_was_captured_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx_ir")
    pytest.importorskip("onnxruntime")
    from tests.runtime import split_engines
    from tests.runtime.fake_engines import FakeEngine, FakeLibrary
    from tests.runtime.fake_gpu import FakeGpu

    split_engines.make(tmp_path / "bundle", 1)
    bundle, clip = open_bundle(tmp_path / "bundle"), split_engines.CLIP
    monkeypatch.setattr(weight_inputs_step, "TEXT", 64)
    gpu = FakeGpu()
    with Device.of(gpu, FakeLibrary(gpu)) as device:
        runner = weight_inputs_step.opened(device, bundle)
        assert isinstance(runner, EngineRunner)
        assert isinstance(runner.engine, FakeEngine)
        shape = f"{clip.width}x{clip.height}x{clip.frames}"
        velocity = weight_inputs_step.bind(device, bundle, runner, shape)
        weight_inputs_step.timed(device, runner)
        assert weight_inputs_step.same_when_captured(device, runner, *velocity) is True
        monkeypatch.setattr(gpu, "launch", lambda *_: None)
        assert weight_inputs_step.same_when_captured(device, runner, *velocity) is False
        runner.engine.plan = replace(runner.engine.plan, capturable=False)
        assert weight_inputs_step.same_when_captured(device, runner, *velocity) is None
        runner.close()


KINDS = ("embedded", "inputs")


def test_without_a_gpu_it_says_why_it_skips(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(flavour: str) -> None:
        raise UserError(f"no GPU for {flavour}")

    monkeypatch.setattr(Device, "open", missing)
    assert weight_inputs.main(["--gpu"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"skipped": "no GPU for tensorrt-rtx"}
