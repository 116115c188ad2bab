"""What a bundle runs on; and one line for all that is missing, before anything large is read."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from ltx_engines import hashes
from ltx_engines.bundle import read
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.targets import Flavour
from ltx_trt import cli
from ltx_trt.backend import Backend, Choice
from ltx_trt.session import choice, tensorrt_adapter
from ltx_trt.session.device import Device
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.graph_stages import OnnxRuntimeStages
from tests.runtime import engine_bundles
from tests.runtime.engine_bundles import Engines
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

MakeBundle = Callable[..., Path]
RTX, CLASSIC = "1.7.1.116", "11.1.0"
ENGINES = Engines((VideoShape(9, 32, 64),))


class World:
    """What is installed here, and the GPU if there is one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.versions: dict[str, str] = {"tensorrt-rtx": RTX}
        self.gpu: FakeGpu | None = FakeGpu()
        self.gpus: list[FakeGpu] = []
        self.refusal: Exception = UserError("the NVIDIA driver is not installed; install it")
        self.hashed: list[str] = []
        self.opened: list[Flavour] = []
        patch.setattr(tensorrt_adapter, "version", lambda flavour: self.versions.get(flavour))
        patch.setattr(Device, "open", self.device)
        verify = hashes.verify

        def verified(file: Path, *rest: Any) -> str:
            self.hashed.append(file.name)
            return verify(file, *rest)

        patch.setattr(hashes, "verify", verified)

    def device(self, flavour: Flavour) -> Device:
        self.opened.append(flavour)
        if self.gpu is None:
            raise self.refusal
        if self.gpu.closed:
            self.gpu = FakeGpu(capability=self.gpu.capability, name=self.gpu.name)
        self.gpus.append(self.gpu)
        return Device.of(self.gpu, FakeLibrary(self.gpu, flavour, self.versions[flavour]))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.fixture
def folder(make_bundle: MakeBundle) -> Path:
    folder = make_bundle()
    engine_bundles.add(folder, ENGINES)
    return folder


def run(folder: Path, *options: object) -> int:
    words = ("--prompt", "w5 w9", "-o", folder.parent / "o.gif", "--num-inference-steps", 2)
    return cli.main([str(word) for word in ("run", "--bundle", folder, *words, *options)])


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_run_uses_the_engines_and_makes_the_same_frames(
    folder: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    hashed = []
    for backend in ("auto", "tensorrt-rtx", "onnxruntime"):
        world.gpu = FakeGpu()
        assert run(folder, "--backend", backend, "--json") == 0
        hashed.append(json.loads(capsys.readouterr().out)["sha256"])
        assert (world.gpu.count("enqueue") > 0) == (backend != "onnxruntime")
        assert world.gpu.leaks() == []
    assert len(set(hashed)) == 1
    assert world.opened == ["tensorrt-rtx", "tensorrt-rtx"]


def test_a_batch_keeps_the_engines_between_its_clips(
    folder: Path, world: World, tmp_path: Path
) -> None:
    assert world.gpu is not None
    (prompts := tmp_path / "prompts.txt").write_text("w5\nw7\nw9\n")
    words = ("--prompts", prompts, "-o", tmp_path / "out", "--num-inference-steps", 1)
    more = ("--format", "gif", "--bundle", folder)
    assert cli.main(["batch", *map(str, (*words, *more))]) == 0
    assert world.gpu.count("load") == 3
    assert world.gpu.leaks() == []


def test_a_batch_on_a_small_gpu_keeps_none_of_them(
    make_bundle: MakeBundle, world: World, tmp_path: Path
) -> None:
    engine_bundles.add(folder := make_bundle(), replace(ENGINES, weights=2**20))
    world.gpu = FakeGpu(memory=5 * 2**19)
    (prompts := tmp_path / "prompts.txt").write_text("w5\nw7\n")
    words = ("--prompts", prompts, "-o", tmp_path / "out", "--num-inference-steps", 1)
    more = ("--format", "gif", "--bundle", folder)
    assert cli.main(["batch", *map(str, (*words, *more))]) == 0
    assert world.gpu.count("load") == 6
    assert world.gpu.leaks() == []


def test_a_bundle_without_engines_runs_on_onnx_runtime_and_asks_for_no_gpu(
    make_bundle: MakeBundle, world: World
) -> None:
    with choice.open_stages(make_bundle(), Choice()) as stages:
        assert isinstance(stages, OnnxRuntimeStages)
    assert world.opened == []


def test_a_stage_without_engine_runs_on_onnx_runtime_and_that_is_said(
    make_bundle: MakeBundle, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.gpu is not None
    folder = make_bundle()
    engine_bundles.add(folder, Engines(ENGINES.clips, ("transformer",)))
    assert run(folder) == 0
    said = capsys.readouterr().err
    assert "text_encoder has no engine and runs on ONNX Runtime" in said
    assert "vae_decoder has no engine and runs on ONNX Runtime" in said
    assert "transformer has no engine" not in said
    assert {call[1] for call in world.gpu.named("enqueue")} == {"transformer"}


def test_of_two_libraries_that_is_taken_whose_version_is_here(folder: Path, world: World) -> None:
    engine_bundles.add(folder, Engines(ENGINES.clips, flavour="tensorrt", version=CLASSIC))
    for versions, flavour in (
        ({"tensorrt-rtx": RTX}, "tensorrt-rtx"),
        ({"tensorrt-rtx": RTX, "tensorrt": "10.14.1"}, "tensorrt-rtx"),
        ({"tensorrt-rtx": RTX, "tensorrt": CLASSIC}, "tensorrt"),
    ):
        world.versions, world.gpu = versions, FakeGpu()
        choice.open_stages(folder, Choice()).__exit__(None, None, None)
        assert world.opened[-1] == flavour


def test_of_two_libraries_the_one_with_engines_for_this_card_is_taken(
    folder: Path, world: World
) -> None:
    other = Engines(ENGINES.clips, flavour="tensorrt", version=CLASSIC, targets=(120,))
    engine_bundles.add(folder, other)
    world.versions = {"tensorrt-rtx": RTX, "tensorrt": CLASSIC}
    for capability, flavour in ((89, "tensorrt-rtx"), (120, "tensorrt")):
        world.opened, world.gpus, world.gpu = [], [], FakeGpu(capability=capability)
        choice.open_stages(folder, Choice()).__exit__(None, None, None)
        assert world.opened[-1] == flavour
        assert all(gpu.closed and not gpu.leaks() for gpu in world.gpus)


def test_when_neither_library_fits_all_that_is_here_and_all_that_is_wanted_is_said(
    folder: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Engines(ENGINES.clips, flavour="tensorrt", version=CLASSIC, targets=(120,))
    engine_bundles.add(folder, other)
    wanted = f"engines of tensorrt {CLASSIC} for SM120"
    world.versions = {"tensorrt-rtx": "1.8.0"}
    assert run(folder) == 2
    said = complaint(capsys)
    assert f"has {wanted}, which is not installed and engines of tensorrt-rtx {RTX}" in said
    assert "for SM89, installed is 1.8.0; pip install tensorrt " in said
    world.versions = {"tensorrt-rtx": RTX, "tensorrt": CLASSIC}
    world.gpu = FakeGpu(capability=86, name="RTX 3090")
    assert run(folder) == 2
    said = complaint(capsys)
    here = "this GPU is SM86 (RTX 3090)"
    assert f"for SM120, {here} and engines of tensorrt-rtx for SM89, {here}; build them" in said
    assert CPU in said


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
@pytest.mark.parametrize("flag", ["--no-cuda-graphs"])
def test_a_flag_that_only_engines_have_is_refused_without_them(
    folder: Path,
    make_bundle: MakeBundle,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    backend: str,
    flag: str,
) -> None:
    if backend == "auto":
        shutil.rmtree(folder)
        folder = make_bundle()
    assert run(folder, "--backend", backend, flag) == 2
    assert f"{folder} runs on ONNX Runtime, " in (said := complaint(capsys))
    assert f"; leave out {flag}, or build engines" in said
    (prompts := tmp_path / "prompts.txt").write_text("w5\n")
    words = ("--prompts", prompts, "-o", tmp_path / "out", "--bundle", folder, flag)
    assert cli.main(["batch", "--backend", backend, *map(str, words)]) == 2
    assert f"leave out {flag}" in complaint(capsys)
    assert world.opened == []


def test_threads_of_the_cpu_are_refused_when_all_stages_are_on_the_gpu(
    folder: Path, make_bundle: MakeBundle, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--threads", 2) == 2
    assert f"every stage of {folder} runs on the GPU; leave out --threads" in complaint(capsys)
    assert world.gpu is not None
    assert world.gpu.leaks() == []
    shutil.rmtree(folder)
    engine_bundles.add(folder := make_bundle(), Engines(ENGINES.clips, ("transformer",)))
    world.gpu = FakeGpu()
    assert run(folder, "--threads", 2) == 0


@pytest.mark.parametrize("call", ["memory", "synchronize", "enqueue", "upload"])
@pytest.mark.parametrize("after", range(0, 13, 2))
def test_a_fault_that_stays_ends_in_one_line(
    folder: Path, world: World, capsys: pytest.CaptureFixture[str], call: str, after: int
) -> None:
    """After a kernel's illegal access every call fails, in whatever order they come."""
    assert world.gpu is not None
    fault = DeviceError("CUDA_ERROR_ILLEGAL_ADDRESS")
    world.gpu.fail(call, fault, after=after, stays=True)
    code = run(folder)
    if after < world.gpu.count(call):
        assert code == 2
        lines = capsys.readouterr().err.splitlines()
        (said,) = (line for line in lines if "without an engine of sampler_step" not in line)
        assert "CUDA_ERROR_ILLEGAL_ADDRESS" in said
    else:
        assert code == 0


CPU = "or run it on the CPU with --backend onnxruntime"


def test_a_library_that_is_not_installed_is_said_first(
    folder: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.versions, world.gpu = {}, None
    assert run(folder) == 2
    said = complaint(capsys)
    assert f"engines of tensorrt-rtx {RTX} for SM89, which is not installed; pip install" in said
    assert CPU in said
    assert (world.opened, world.hashed) == ([], [])


def test_another_version_is_said_before_the_gpu_is_looked_for(
    folder: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.versions["tensorrt-rtx"] = "1.8.0"
    assert run(folder) == 2
    said = complaint(capsys)
    assert f"engines of tensorrt-rtx {RTX} for SM89, installed is 1.8.0; build them: " in said
    assert (world.opened, world.hashed) == ([], [])


@pytest.mark.parametrize(
    "refusal",
    [
        UserError("the NVIDIA driver is not installed; install it"),
        DeviceError("cuDevicePrimaryCtxRetain(0): CUDA_ERROR_OUT_OF_MEMORY (out of memory)"),
    ],
)
def test_without_a_gpu_the_engines_are_named_and_the_way_without(
    folder: Path, world: World, capsys: pytest.CaptureFixture[str], refusal: Exception
) -> None:
    world.gpu, world.refusal = None, refusal
    assert run(folder) == 2
    said = complaint(capsys)
    assert f"has engines of tensorrt-rtx for SM89, but {refusal}, {CPU}" in said
    assert world.hashed == []


def test_another_gpu_is_named_with_the_command_that_builds_for_it(
    folder: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.gpu = FakeGpu(capability=120, name="NVIDIA GeForce RTX 5090")
    assert run(folder) == 2
    said = complaint(capsys)
    assert "engines of tensorrt-rtx for SM89, this GPU is SM120 (NVIDIA GeForce RTX 5090)" in said
    assert f"ltx-export build-engine {folder} --gpu sm120 --shape" in said
    assert world.hashed == []
    assert world.gpu.leaks() == []
    assert world.gpu.closed


def test_the_way_without_engines_is_named_only_where_there_is_one(
    make_bundle: MakeBundle, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_bfloat16(row: Any) -> Any:
        return row.model_copy(update={"dtype": "bfloat16"}) if row.dtype == "float32" else row

    folder = make_bundle()
    engine_bundles.add(folder, ENGINES)
    found = read(folder)
    stages = {
        name: entry.model_copy(update={"inputs": tuple(map(in_bfloat16, entry.inputs))})
        for name, entry in found.stages.items()
    }
    text = found.model_copy(update={"stages": stages}).model_dump_json()
    (folder / "manifest.json").write_text(text)
    world.gpu = None
    assert run(folder) == 2
    assert "onnxruntime" not in complaint(capsys)


def test_a_backend_that_the_bundle_has_no_engines_of_is_refused(
    folder: Path, make_bundle: MakeBundle, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--backend", "tensorrt") == 2
    said = complaint(capsys)
    assert "has no engine of tensorrt, only tensorrt-rtx; build it: " in said
    assert f"ltx-export build-engine {folder} --backend tensorrt" in said


def test_an_unknown_backend_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--backend", "torch") == 2
    assert "--backend" in complaint(capsys)


def test_a_plan_that_is_not_in_the_manifest_cannot_be_opened(folder: Path, world: World) -> None:
    stranger = folder / "stranger.engine"
    stranger.write_bytes((folder / read(folder).engines[0].file).read_bytes())
    with (
        choice.open_stages(folder, Choice(Backend.tensorrt_rtx)) as stages,
        pytest.raises(ValueError, match="is not a file of"),
    ):
        stages.bundle.file(stranger.name)
