"""A bundle with an engine of the sampler's step: the whole pipeline, whatever fails on its way."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.targets import Flavour
from ltx_trt import cli
from ltx_trt.backend import Backend, Choice
from ltx_trt.job import Job
from ltx_trt.pipeline import frames_of, generate, plan
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import tensorrt_adapter
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.engine_api import EngineError
from tests.runtime import engine_bundles
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu


@pytest.fixture
def folder(make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with engines of every stage and of the step."""
    from ltx_export import step_graph

    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)
    folder = make_bundle()
    step_graph.add(open_bundle(folder))
    names = (*engine_bundles.STAGES, "sampler_step")
    engine_bundles.add(folder, engine_bundles.Engines((VideoShape(9, 32, 64),), names))
    return folder


def video(folder: Path, choice: Choice, gpu: FakeGpu) -> bytes:
    wishes = Wishes(prompt="w5 w9", num_inference_steps=4, sampler="stochastic")

    def device(flavour: Flavour) -> Device:
        try:
            return Device.of(gpu, FakeLibrary(gpu, flavour))
        except DeviceError:
            gpu.close()
            raise

    with open_stages(folder, choice, open_device=device) as stages:
        request, _ = resolve(wishes, stages.bundle, None)
        stages.prepare(plan(request, stages.bundle.manifest))
        return frames_of(generate(request, stages.bundle, stages)).tobytes()


def test_a_bundle_with_the_steps_engine_denoises_on_the_gpu(folder: Path) -> None:
    gpu = FakeGpu()
    frames = video(folder, Choice(), gpu), video(folder, Choice(Backend.onnxruntime), FakeGpu())
    assert gpu.count("launch") > 0
    assert gpu.leaks() == []
    found, wanted = (np.frombuffer(row, np.uint8).astype(int) for row in frames)
    assert np.abs(found - wanted).max() <= 1, "truncation hides what is below a level, or shows it"


@pytest.mark.parametrize(("option", "captures"), [((), 1), (("--no-cuda-graphs",), 0)])
def test_the_command_line_decides_whether_steps_are_captured(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: tuple[str, ...],
    captures: int,
) -> None:
    gpu = FakeGpu()

    def execute(job: Job) -> None:
        video(job.bundle, job.choice, gpu)
        raise UserError("nobody writes it")

    monkeypatch.setattr("ltx_trt.job.execute", execute)
    arguments = ["run", "--bundle", str(folder), "--prompt", "w5", "-o", str(tmp_path / "x.mp4")]
    assert cli.main([*arguments, *option]) == 2
    assert gpu.count("begin_capture") == captures


@pytest.mark.parametrize(
    "call",
    [
        *("allocate", "pinned", "upload", "fill", "copy", "download"),
        *("event", "record", "synchronize", "synchronize_event", "begin_capture", "launch"),
        *("load", "context", "set_shape", "set_address", "set_memory", "enqueue"),
        "memory",
    ],
)
def test_a_failure_anywhere_is_one_line_and_nothing_leaks(folder: Path, call: str) -> None:
    kind = EngineError if call == "load" or call.startswith("set_") else DeviceError
    told = []
    for after in (0, 1, 4, 9, 16):
        gpu = FakeGpu()
        gpu.fail(call, kind("CUDA_ERROR_ILLEGAL_ADDRESS"), after=after)
        try:
            video(folder, Choice(), gpu)
        except UserError as error:
            told.append(str(error))
        if call != "synchronize":  # memory that may be in use is not freed
            assert gpu.leaks() == []
        assert gpu.closed
    assert told
    where = ".* has engines of .*, but |the GPU's memory: " if call == "memory" else "stage .*"
    assert all(re.fullmatch(f"({where})CUDA_ERROR_ILLEGAL_ADDRESS.*", line) for line in told)
