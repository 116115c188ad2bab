"""Clips by a transformer whose weights are inputs: the frames of ONNX Runtime, in any room."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="the pieces are cut by the exporter")
pytest.importorskip("onnxruntime")

from ltx_engines import bundle
from ltx_engines.stages import SAMPLER_STEP
from ltx_ref.checkpoint import read_header
from ltx_trt.backend import Backend, Choice
from ltx_trt.request import Wishes
from ltx_trt.session import tensorrt_adapter
from ltx_trt.session.opening import needed
from tests.export import loras
from tests.runtime import weight_input_engines
from tests.runtime.split_engines import CLIP
from tests.runtime.test_gpu_pipeline import Machine
from tests.runtime.weight_input_engines import STAGE

WISHES = Wishes(
    prompt="a red ball",
    width=CLIP.width,
    height=CLIP.height,
    num_frames=CLIP.frames,
    num_inference_steps=2,
)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ltx-tiny with engines for the fake GPU."""
    folder = tmp_path_factory.mktemp("inputs") / "bundle"
    weight_input_engines.make(folder)
    return folder


def room(folder: Path, blocks: int) -> int:
    manifest = bundle.read(folder)
    chain, step = (
        tuple(engine for engine in manifest.engines if engine.key.stage == stage)
        for stage in (STAGE, SAMPLER_STEP)
    )
    need = needed(manifest, chain, step)
    return need.buffers + need.activations + blocks * need.weights[0] + 2**20


def test_a_lora_is_added_to_weights_that_are_streamed(folder: Path, tmp_path: Path) -> None:
    """On the way of each of them to the card."""
    header = read_header(folder / bundle.read(folder).checkpoint)
    factors = {n: (a, 0.3 * b) for n, (a, b) in loras.factors(header.shapes()).items()}
    file = loras.write(tmp_path / "lora.safetensors", loras.tensors(factors, "kohya"))
    machine, added = Machine(), (str(file),)
    (streamed,) = machine.frames(folder, Choice(device_memory=room(folder, 2), loras=added), WISHES)
    assert machine.gpu.count("begin_capture") == 0
    (resident,) = Machine().frames(folder, Choice(loras=added), WISHES)
    (without,) = Machine().frames(folder, Choice(), WISHES)
    assert streamed == resident != without


@pytest.mark.parametrize("blocks", [6, 2])
def test_the_frames_are_those_of_onnx_runtime(folder: Path, blocks: int) -> None:
    """But for a last bit of float32, which here and there is another of 256 levels."""
    manifest = bundle.read(folder)
    chain = tuple(engine for engine in manifest.engines if engine.key.stage == STAGE)
    step = tuple(engine for engine in manifest.engines if engine.key.stage == SAMPLER_STEP)
    need = needed(manifest, chain, step)
    assert len(need.weights) == 6
    machine, wished = Machine(), None if blocks == 6 else room(folder, blocks)
    (found,) = machine.frames(folder, Choice(device_memory=wished), WISHES)
    (wanted,) = machine.frames(folder, Choice(Backend.onnxruntime, threads=1), WISHES)
    levels = [np.frombuffer(frames, np.uint8).astype(int) for frames in (found, wanted)]
    assert abs(levels[0] - levels[1]).max() <= 1
    names = [call[1] for call in machine.gpu.named("enqueue")]
    assert names.count("block") == 6 * names.count("prologue") > 0
    large = [size for _, _, size, *_ in machine.gpu.named("upload") if size == need.weights[0]]
    assert (len(large) == 6) == (blocks == 6)
    assert (machine.gpu.count("begin_capture") > 0) == (blocks == 6)
    assert machine.gpu.leaks() == []
