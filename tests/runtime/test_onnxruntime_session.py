"""Sessions on graphs made by hand, and what is said when a graph is spoilt."""

import builtins
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines import cpu
from ltx_engines.bundle import (
    Bundle,
    QuantizationEntry,
    StageEntry,
    create,
    open_bundle,
    seal,
    tensor_entries,
)
from ltx_engines.errors import UserError
from ltx_engines.stages import FLOAT, Tensor
from ltx_trt.session import onnxruntime_session as module
from ltx_trt.session.onnxruntime_session import (
    OnnxRuntimeSession,
    from_bfloat16,
    to_bfloat16,
)
from tests.runtime.conftest import (
    GAIN,
    LAYERS,
    WIDTH,
    manifest,
    write_files,
    write_graph,
    write_transformer,
)

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
    with pytest.raises(UserError, match=r"bfloat16.*CUDA; build an engine.*--precision float32"):
        OnnxRuntimeSession.open(Bundle(bundle.path, changed), "transformer", provider="cpu")


def quantized(entry: StageEntry, **layers: int) -> StageEntry:
    """The stage as if so many of its layers had these formats."""
    found = QuantizationEntry.model_validate({"recipe": "mine", "layers": layers})
    return entry.model_copy(update={"quantization": found})


@pytest.mark.parametrize("saturating", [False, True])
def test_a_session_is_told_what_its_formats_want_of_this_cpu(
    monkeypatch: pytest.MonkeyPatch, saturating: bool
) -> None:
    import onnxruntime

    monkeypatch.setattr(cpu, "saturates", lambda: saturating)
    plain = manifest().stages["transformer"]
    keys = ("disable_prepacking", "disable_quant_qdq", "x64quantprecision")
    for entry, formats in (
        (plain, ()),
        (quantized(plain, int8=4), ("int8",)),
        (quantized(plain, fp8=3, **{"int8-wo": 1}), ("fp8", "int8-wo")),
    ):
        options = module._options(onnxruntime, None, entry)
        found = {}
        for key in (f"session.{key}" for key in keys):
            with suppress(RuntimeError):  # so it says that nobody set it
                found[key] = options.get_session_config_entry(key)
        assert found == cpu.session_options(formats)


def test_integer_products_that_leave_the_gpu_are_told(caplog: pytest.LogCaptureFixture) -> None:
    plain = manifest().stages["transformer"].model_copy(update={"opset": 20})
    tensorrt = plain.model_copy(update={"opset": 23})
    for entry in (plain, quantized(plain, fp8=2, **{"int8-wo": 2}), quantized(tensorrt, int8=4)):
        module._check_provider("transformer", entry, module.CUDA, module.CUDA)
    module._check_provider("transformer", quantized(plain, int8=4), module.CPU, module.CPU)
    assert not caplog.text
    module._check_provider("transformer", quantized(plain, int8=4), module.CUDA, module.CUDA)
    assert "transformer: its int8 products run on the CPU" in caplog.text
    assert "--opset 23" in caplog.text


def test_four_bit_floats_are_refused_with_what_computes_them(bundle: Bundle) -> None:
    entry = quantized(bundle.stage("transformer"), nvfp4=280)
    stages = bundle.manifest.stages | {"transformer": entry}
    changed = bundle.manifest.model_copy(update={"stages": stages})
    with pytest.raises(UserError, match=r"transformer is nvfp4.*TensorRT.*SM120.*recipe int8"):
        OnnxRuntimeSession.open(Bundle(bundle.path, changed), "transformer")


@pytest.mark.parametrize("opset", [20, 21])
def test_an_opset_that_has_attention_is_refused_on_the_cpu(bundle: Bundle, opset: int) -> None:
    """21 is what weights of four bits want."""
    entry = bundle.stage("transformer")
    module._check_cpu("transformer", entry.model_copy(update={"opset": opset}))
    with pytest.raises(UserError, match=r"opset 23.*ltx-export onnx --opset 20"):
        module._check_cpu("transformer", entry.model_copy(update={"opset": 23}))


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


def test_a_gpu_that_cannot_start_is_told(caplog: pytest.LogCaptureFixture) -> None:
    entry = manifest().stages["transformer"]
    module._check_provider("transformer", entry, module.CUDA, module.CPU)
    assert "could not start" in caplog.text


def referring(tmp_path: Path, *homes: str) -> Path:
    """A bundle whose transformer has its weights in these folders, and none in its own."""
    files = [tmp_path / home / "by-hand.safetensors" for home in homes]
    with create(tmp_path / "bundle") as temporary:
        write_files(temporary)
        for file in files:
            file.parent.mkdir()
            file.write_bytes((temporary / file.name).read_bytes())
        (temporary / files[0].name).unlink()
        keys = tuple(map(str, files))
        plain = manifest()
        stage = plain.stages["transformer"].model_copy(update={"weights": keys})
        stages = plain.stages | {"transformer": stage}
        seal(temporary, manifest(checkpoint=keys[0], stages=stages), elsewhere=keys)
    return tmp_path / "bundle"


def test_weights_in_another_folder_are_found_there(tmp_path: Path) -> None:
    bundle = open_bundle(referring(tmp_path, "hub"))
    assert not list(bundle.path.rglob("*.safetensors"))
    with OnnxRuntimeSession.open(bundle, "transformer") as session:
        velocity = session(feeds())["velocity"]
    assert np.allclose(velocity[0], 3 - GAIN)


def test_a_bundle_that_moved_still_finds_weights_that_did_not(tmp_path: Path) -> None:
    moved = referring(tmp_path, "hub").rename(tmp_path / "moved")
    with OnnxRuntimeSession.open(open_bundle(moved), "transformer") as session:
        assert np.allclose(session(feeds())["velocity"][0], 3 - GAIN)


def test_weights_in_two_folders_cost_one_line_that_names_both(tmp_path: Path) -> None:
    bundle = open_bundle(referring(tmp_path, "hub", "lora"))
    with pytest.raises(UserError, match="they must lie in one folder") as told:
        OnnxRuntimeSession.open(bundle, "transformer")
    said = str(told.value)
    assert said.isprintable()
    assert str(tmp_path / "hub") in said
    assert str(tmp_path / "lora") in said
    with OnnxRuntimeSession.open(bundle, "vae_decoder"):
        pass


def test_weights_in_the_bundle_and_elsewhere_cost_one_line_too(tmp_path: Path) -> None:
    """A fused checkpoint is written into the bundle, an upsampler may stay where it is."""
    bundle = open_bundle(referring(tmp_path, "hub"))
    stage = bundle.stage("transformer")
    both = stage.model_copy(update={"weights": (*stage.weights, "transformer.onnx")})
    stages = bundle.manifest.stages | {"transformer": both}
    mixed = Bundle(bundle.path, bundle.manifest.model_copy(update={"stages": stages}))
    with pytest.raises(UserError, match="they must lie in one folder") as told:
        OnnxRuntimeSession.open(mixed, "transformer")
    assert str(bundle.path) in str(told.value)
    assert str(tmp_path / "hub") in str(told.value)


ROWS = 4096
"""A square weight of 64 MiB."""


def write_large(graph: Path, weights: Path) -> None:
    """velocity = latents (W^T W): the second product is with a transpose, as exporters write it."""
    from onnx import TensorProto, helper

    matrix = np.zeros((4, ROWS), np.float32)
    matrix[:, :4] = np.eye(4)
    weights.write_bytes(matrix.tobytes() + b"\0" * 4 * ROWS * ROWS)
    tensors = []
    for name, offset, dims in (("w", 0, [4, ROWS]), ("v", 16 * ROWS, [ROWS, ROWS])):
        tensor = TensorProto(name=name, data_type=1, dims=dims, data_location=TensorProto.EXTERNAL)
        length = 4 * dims[0] * dims[1]
        for key, value in (("location", weights.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    node = helper.make_node
    nodes = [
        node("MatMul", ["latents", "w"], ["wide"]),
        node("Transpose", ["v"], ["turned"], perm=[1, 0]),
        node("MatMul", ["wide", "turned"], ["nothing"]),
        node("Add", ["wide", "nothing"], ["sum"]),
        node("Transpose", ["w"], ["back"], perm=[1, 0]),
        node("MatMul", ["sum", "back"], ["product"]),
        *(node("ReduceSum", [name], [f"{name}_0"], keepdims=0) for name in UNUSED),
        node("Sum", [f"{name}_0" for name in UNUSED], ["unused"]),
        node("Mul", ["unused", "zero"], ["nil"]),
        node("Add", ["product", "nil"], ["velocity"]),
    ]
    write_graph(graph, "transformer", nodes, {"zero": np.float32(0)}, tensors)


UNUSED = ("coords", "timestep", "prompt_embeds", "prompt_mask", "skip_layer_mask")


def private() -> int:
    """Bytes of this process that no file stands behind."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no line Anonymous")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells")
@pytest.mark.parametrize("home", ["bundle", "hub"])
def test_weights_are_mapped_and_not_copied(tmp_path: Path, home: str) -> None:
    pytest.importorskip("onnx")
    (tmp_path / "hub").mkdir()
    key = "large.bin" if home == "bundle" else str(tmp_path / "hub" / "large.bin")
    with create(tmp_path / "bundle") as temporary:
        write_files(temporary)
        write_large(temporary / "transformer.onnx", temporary / key)
        plain = manifest()
        stage = plain.stages["transformer"].model_copy(update={"weights": (key,)})
        sealed = manifest(stages=plain.stages | {"transformer": stage})
        seal(temporary, sealed, elsewhere=() if home == "bundle" else (key,))
    bundle = open_bundle(tmp_path / "bundle")
    before = private()
    with OnnxRuntimeSession.open(bundle, "transformer", threads=1) as session:
        velocity = session(feeds())["velocity"]
        grown = private() - before
    assert np.array_equal(velocity, feeds()["latents"])
    assert grown < ROWS * ROWS, "less than a quarter of the weight"
