"""Sessions on graphs made by hand, and what is said when a graph is spoilt."""

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines.bundle import Bundle, StageEntry, open_bundle, tensor_entries
from ltx_engines.errors import UserError
from ltx_engines.stages import FLOAT, Tensor
from ltx_trt.session import onnxruntime_session as module
from ltx_trt.session.onnxruntime_session import (
    OnnxRuntimeSession,
    from_bfloat16,
    to_bfloat16,
)
from tests.runtime.conftest import GAIN, LAYERS, WIDTH, manifest, write_transformer

pytest.importorskip("onnxruntime")

MakeBundle = Callable[..., Path]


def feeds(**changes: Any) -> dict[str, Any]:
    return {
        "latents": np.full((2, 5, 4), 3, np.float32),
        "coords": np.zeros((2, 3, 5), np.float32),
        "timestep": np.array([[1.0], [0.5]], np.float32),
        "prompt_embeds": np.ones((2, 7, WIDTH), np.float32),
        "prompt_mask": np.ones((2, 7), np.float32),
        "skip_layer_mask": np.ones((LAYERS, 2), np.float32),
    } | changes


def test_a_session_computes_what_the_graph_says_with_weights_from_the_checkpoint(
    bundle: Bundle,
) -> None:
    with OnnxRuntimeSession.open(bundle, "transformer") as session:
        velocity = session(feeds())["velocity"]
    assert velocity.dtype == np.float32
    assert np.allclose(velocity[0], 3 - GAIN)
    assert np.allclose(velocity[1], (3 - GAIN) / 0.5)


def test_every_stage_opens(bundle: Bundle) -> None:
    for stage in bundle.manifest.stages:
        with OnnxRuntimeSession.open(bundle, stage, threads=1):
            pass


def test_a_closed_session_refuses_to_run(bundle: Bundle) -> None:
    with OnnxRuntimeSession.open(bundle, "transformer") as session:
        pass
    with pytest.raises(ValueError, match="closed"):
        session(feeds())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"latents": np.zeros((2, 5, 3), np.float32)}, "axis 4 is 3"),
        ({"coords": np.zeros((2, 3, 6), np.float32)}, "'tokens' is 6"),
        ({"latents": np.zeros((2, 5, 4), np.float64)}, "float64, wanted float32"),
        ({"noise": np.zeros(1, np.float32)}, "unknown"),
    ],
)
def test_feeds_are_checked_by_the_manifests_table(
    bundle: Bundle, wrong: dict[str, Any], words: str
) -> None:
    with (
        OnnxRuntimeSession.open(bundle, "transformer") as session,
        pytest.raises(ValueError, match=words),
    ):
        session(feeds(**wrong))


def away(folder: Path) -> None:
    (folder.parent / "elsewhere.bin").write_bytes(b"\0" * 64)
    write_transformer(folder / "transformer.onnx", offset=0, location="../elsewhere.bin")


def beyond(folder: Path) -> None:
    write_transformer(folder / "transformer.onnx", offset=4096)


def junk(folder: Path) -> None:
    (folder / "transformer.onnx").write_bytes(b"not a graph")


def empty(folder: Path) -> None:
    (folder / "transformer.onnx").write_bytes(b"")


def other_stage(folder: Path) -> None:
    (folder / "transformer.onnx").write_bytes((folder / "vae_decoder.onnx").read_bytes())


@pytest.mark.parametrize("spoil", [away, beyond, junk, empty, other_stage])
def test_a_spoilt_graph_costs_one_line_that_names_stage_and_file(
    make_bundle: MakeBundle, spoil: Callable[[Path], None]
) -> None:
    bundle = open_bundle(make_bundle(spoil))
    with pytest.raises(UserError) as told:
        OnnxRuntimeSession.open(bundle, "transformer")
    message = str(told.value)
    assert "\n" not in message
    assert "transformer" in message
    assert str(bundle.path / "transformer.onnx") in message


def test_a_failure_inside_the_graph_is_told_too(bundle: Bundle) -> None:
    entry = bundle.stage("text_encoder")
    loose = StageEntry(file=entry.file, inputs=entry.inputs, outputs=entry.outputs)
    with OnnxRuntimeSession.open(bundle, "text_encoder") as session:
        session._entry = loose.model_copy(
            update={
                "inputs": tensor_entries(
                    (
                        Tensor("input_ids", "int64", ("batch", "text")),
                        Tensor("attention_mask", "int64", ("batch", "other")),
                    ),
                    "float32",
                )
            }
        )
        ids, mask = np.ones((1, 3), np.int64), np.ones((1, 2), np.int64)
        wrong = {"input_ids": ids, "attention_mask": mask}
        with pytest.raises(UserError, match="stage text_encoder") as told:
            session(wrong)
    assert "\n" not in str(told.value)


def test_bfloat16_is_refused_on_the_cpu_with_what_to_do(bundle: Bundle) -> None:
    entry = bundle.stage("transformer")
    rows = tensor_entries((Tensor("latents", FLOAT, ("batch", "tokens", 4)),), "bfloat16")
    half = entry.model_copy(update={"inputs": rows})
    stages = bundle.manifest.stages | {"transformer": half}
    changed = bundle.manifest.model_copy(update={"stages": stages})
    with pytest.raises(UserError, match=r"bfloat16.*onnxruntime-gpu.*--precision float32"):
        OnnxRuntimeSession.open(Bundle(bundle.path, changed), "transformer", providers=[module.CPU])


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, np.inf, np.nan, 3.4e38], np.float32)
    there = from_bfloat16(to_bfloat16(values))
    expected = np.array([1, 1, 1 + 2**-6, -0.0, np.inf, np.nan, np.inf], np.float32)
    assert np.array_equal(there, expected, equal_nan=True)
    assert np.signbit(there[3])


def test_bfloat16_and_float16_cross_the_border_as_float32() -> None:
    ort = pytest.importorskip("onnxruntime")
    helper = pytest.importorskip("onnx").helper
    values = np.array([[1.0, -2.5, 0.15625]], np.float32)
    for number, dtype in ((16, "bfloat16"), (10, "float16")):
        info = [helper.make_tensor_value_info(name, number, [1, 3]) for name in "xy"]
        graph = helper.make_graph(
            [helper.make_node("Identity", ["x"], ["y"])], "g", info[:1], info[1:]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        session = ort.InferenceSession(model.SerializeToString(), providers=[module.CPU])
        rows = [tensor_entries((Tensor(n, dtype, (1, 3)),), "float32") for n in "xy"]
        entry = StageEntry(file="g.onnx", inputs=rows[0], outputs=rows[1])
        with OnnxRuntimeSession("g", entry, "g.onnx", session) as opened:
            found = opened({"x": values})["y"]
        assert found.dtype == np.float32
        assert np.array_equal(found, values)


def test_a_missing_package_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'ltx-trt\[onnxruntime\]'"):
        OnnxRuntimeSession.open(bundle, "transformer")


def test_an_unknown_provider_names_those_that_exist(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="CPUExecutionProvider"):
        OnnxRuntimeSession.open(bundle, "transformer", providers=["TpuExecutionProvider"])


def test_cuda_comes_first_where_it_exists() -> None:
    here = [module.CPU, "Azure", module.CUDA]
    assert module._providers(here, None) == [module.CUDA, module.CPU]
    assert module._providers([module.CPU], None) == [module.CPU]


def test_a_gpu_that_cannot_start_is_told(caplog: pytest.LogCaptureFixture) -> None:
    entry = manifest().stages["transformer"]
    module._check_provider("transformer", entry, module.CUDA, module.CPU)
    assert "could not start" in caplog.text
