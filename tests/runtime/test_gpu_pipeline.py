"""The whole pipeline on engines: the frames of ONNX Runtime, from a GPU that overlooks nothing."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.targets import Flavour
from ltx_trt.backend import Backend, Choice, Memory
from ltx_trt.cli import SHIPPED
from ltx_trt.pipeline import frames_of, generate, plan
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import tensorrt_adapter
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.engine_api import EngineError
from tests.runtime import engine_bundles
from tests.runtime.engine_bundles import Engines
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

CLIP, LONGER = VideoShape(9, 32, 64), VideoShape(17, 32, 64)
WISHES = Wishes(prompt="w5 w9", num_inference_steps=3)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)


@pytest.fixture
def folder(make_bundle: Callable[..., Path]) -> Path:
    folder = make_bundle()
    engine_bundles.add(folder, Engines((CLIP, LONGER)))
    return folder


class Machine:
    """A fake GPU as `open_stages` finds it."""

    def __init__(self, gpu: FakeGpu | None = None) -> None:
        self.gpu = gpu or FakeGpu()

    def __call__(self, flavour: Flavour) -> Device:
        return Device.of(self.gpu, FakeLibrary(self.gpu, flavour))

    def frames(self, folder: Path, choice: Choice, *wishes: Wishes) -> Iterator[bytes]:
        with open_stages(folder, choice, open_device=self) as stages:
            for wish in wishes:
                request, _ = resolve(wish, stages.bundle, None)
                stages.prepare(plan(request, stages.bundle.manifest))
                yield frames_of(generate(request, stages.bundle, stages)).tobytes()


ENGINES, GRAPHS = Choice(), Choice(Backend.onnxruntime, threads=1)


def test_engines_make_the_frames_of_onnx_runtime_and_leave_nothing_behind(folder: Path) -> None:
    machine = Machine()
    wishes = (WISHES, Wishes(prompt="w5 w9", num_inference_steps=3, num_frames=17))
    assert [*machine.frames(folder, ENGINES, *wishes)] == [*machine.frames(folder, GRAPHS, *wishes)]
    assert machine.gpu.count("enqueue") > 0
    assert machine.gpu.leaks() == []
    assert machine.gpu.closed


def test_one_stage_after_the_other_is_on_the_gpu(folder: Path) -> None:
    machine = Machine()
    list(machine.frames(folder, ENGINES, WISHES))
    moves = [call[:2] for call in machine.gpu.calls if call[0] in ("load", "close_engine")]
    stages = "text_encoder", "transformer", "vae_decoder"
    assert moves == [(move, stage) for stage in stages for move in ("load", "close_engine")]


def test_kept_stages_are_loaded_once_for_many_clips(folder: Path) -> None:
    machine = Machine()
    first, second = machine.frames(folder, Choice(memory=Memory.resident), WISHES, WISHES)
    assert first == second
    assert machine.gpu.count("load") == 3
    assert machine.gpu.leaks() == []


def test_numbers_pass_through_pinned_memory_only(folder: Path) -> None:
    machine = Machine()
    list(machine.frames(folder, ENGINES, WISHES))
    copies = [c for c in machine.gpu.calls if c[0] in ("upload", "download")]
    assert copies
    assert all(pinned for *_, pinned in copies)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("load", EngineError("a plan of another version")),
        ("context", EngineError("no memory for a context")),
        ("set_shape", EngineError("bad shape")),
        ("allocate", DeviceError("cuMemAlloc(4096): CUDA_ERROR_OUT_OF_MEMORY (out of memory)")),
        ("enqueue", EngineError("kernel not found")),
        ("synchronize", DeviceError("cuStreamSynchronize(7): CUDA_ERROR_ILLEGAL_ADDRESS (no)")),
        ("pinned", DeviceError("cuMemHostAlloc(64, 0): CUDA_ERROR_OUT_OF_MEMORY (no)")),
    ],
)
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("memory", [Memory.staged, Memory.resident])
def test_a_failure_is_one_line_and_nothing_leaks(
    folder: Path, call: str, error: Exception, after: int, memory: Memory
) -> None:
    machine = Machine()
    machine.gpu.fail(call, error, after=after)
    with pytest.raises(UserError, match="stage") as caught:
        list(machine.frames(folder, Choice(memory=memory), WISHES))
    assert "\n" not in str(caught.value)
    assert machine.gpu.leaks() == []
    assert machine.gpu.closed


def test_ctrl_c_gives_everything_back(folder: Path) -> None:
    machine = Machine()
    machine.gpu.fail("enqueue", KeyboardInterrupt(), after=2)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        list(machine.frames(folder, ENGINES, WISHES))
    assert machine.gpu.leaks() == []


def test_a_clip_that_no_profile_fits_is_refused_with_the_nearest_one(folder: Path) -> None:
    machine = Machine()
    wish = Wishes(prompt="w5", num_frames=25)
    with pytest.raises(UserError) as caught:
        list(machine.frames(folder, ENGINES, wish))
    assert "no engine of transformer takes 64x32x25" in str(caught.value)
    assert "the nearest takes tokens 6, not 8 (it was built for 64x32x9, 64x32x17)" in str(
        caught.value
    )
    assert f"ltx-export build-engine {folder} --gpu sm89 --shape 64x32x25" in str(caught.value)
    assert machine.gpu.count("load") == 0


def test_a_flipped_byte_in_a_plan_is_refused_before_it_is_opened(folder: Path) -> None:
    machine = Machine()
    plan_file = folder / open_bundle(folder).manifest.engines[0].file
    data = bytearray(plan_file.read_bytes())
    data[5] ^= 1
    plan_file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="sha256"):
        list(machine.frames(folder, ENGINES, WISHES))
    assert machine.gpu.count("load") == 0
    assert machine.gpu.leaks() == []


def test_ltx_tiny_makes_the_same_frames_on_engines(tmp_path: Path) -> None:
    """The model that ships with the runtime, guided, on a clip that is cut out of a larger one."""
    folder = tmp_path / "bundle"
    shutil.copytree(SHIPPED, folder)
    engine_bundles.add(folder, Engines((VideoShape(17, 96, 96),)))
    machine = Machine()
    wish = Wishes(
        prompt="a red ball moves right",
        width=96,
        height=90,
        num_frames=16,
        num_inference_steps=2,
    )
    assert [*machine.frames(folder, ENGINES, wish)] == [*machine.frames(folder, GRAPHS, wish)]
    assert machine.gpu.count("enqueue") > 4
    assert machine.gpu.leaks() == []
