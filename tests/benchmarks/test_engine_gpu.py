"""The engines' benchmark as far as a machine without a GPU can go: on one that is made up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import engine_gpu
import engine_gpu_step as once
import quantized_slice
from child import ChildError, Cost
from engine_gpu import Question
from ltx_engines.bundle import open_bundle
from ltx_engines.shapes import VideoShape
from ltx_export import card, step_graph
from ltx_export.card import Card
from ltx_trt.backend import Choice
from ltx_trt.session import tensorrt_adapter
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.session.driver import Driver
from tests.runtime import engine_bundles
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
CLIP = VideoShape(9, 32, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ltx-tiny, with engines of its transformer and of the sampler's step."""
    folder = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("engine") / "bundle"))
    step_graph.add(open_bundle(folder))
    names = ("transformer", "sampler_step")
    engine_bundles.add(folder, engine_bundles.Engines((CLIP,), names))
    return folder


@pytest.fixture
def measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)

    def measure(*, graphs: bool) -> dict[str, Any]:
        gpu = FakeGpu()
        counting = once.Counting(cast(Driver, gpu))
        device = Device.of(cast(Driver, counting), FakeLibrary(gpu))
        choice = Choice(cuda_graphs=graphs)
        with open_stages(folder, choice, open_device=lambda _: device) as stages:
            found = once.measure(stages, CLIP, 2, counting.copies)
        return found | {"launches": gpu.count("launch")}

    return measure


def test_a_step_on_the_gpu_copies_nothing_from_or_to_the_host(
    measured: Callable[..., dict[str, Any]],
) -> None:
    found = measured(graphs=True)
    assert found["on_the_gpu"]
    assert found["transfers_per_step"] == [0] * (once.WARM_UP + 1)
    assert len(found["step_s_each"]) == 2
    assert found["launches"] == once.WARM_UP + 2 - 1
    assert found["peak_memory"] > 0


def test_without_graphs_every_step_is_enqueued(measured: Callable[..., dict[str, Any]]) -> None:
    assert measured(graphs=False)["launches"] == 0


def test_without_a_gpu_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(card, "at_hand", lambda: None)
    assert engine_gpu.main([]) == 0
    assert "no NVIDIA GPU" in json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"]


@pytest.mark.parametrize(
    ("name", "capability", "target"),
    [
        ("NVIDIA GeForce RTX 4090", 89, "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", 90, "H100 SXM"),
        ("NVIDIA GB10", 121, "sm121"),
    ],
)
def test_a_card_of_unknown_rates_is_named_by_its_capability(
    name: str, capability: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "at_hand", lambda: Card(name, capability, 10**9))
    assert engine_gpu.target() == target


STEP = {"step_s": 0.02, "transfers_per_step": [0, 0], "peak_memory": 1}


def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is run, with an answer as that program would give it."""
    seen: list[list[str]] = []

    def run(command: Any) -> tuple[Cost, str]:
        words = [str(word) for word in command]
        seen.append(words)
        if "diffusers" in words:
            raise ChildError("diffusers ended with 1: out of memory")
        if "plan" in words:
            return Cost(1, 1, 1, 1), json.dumps({"gpus": [{"seconds": {"transformer": 0.01}}]})
        slow = {"step_s": 0.03} if "--no-cuda-graphs" in words else {}
        return Cost(1, 1, 1, 1), "built\n" + json.dumps(STEP | slow)

    monkeypatch.setattr(engine_gpu, "run", run)
    monkeypatch.setattr(quantized_slice, "run", run)
    return seen


def test_an_engine_stands_beside_its_roofline_and_its_peers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = commands(monkeypatch)
    question = Question("2b", None, "1216x704x121", 5, "RTX 4090")
    rows = engine_gpu.benchmark(question, ("bf16", "fp8"), ("bf16-compiled", "diffusers"))
    assert list(rows) == ["engine bf16", "engine fp8", "bf16-compiled", "diffusers"]
    row = rows["engine fp8"]
    assert (row["graph_gain"], row["of_roofline"]) == (1.5, 0.5)
    assert rows["diffusers"] == {"failed": "diffusers ended with 1: out of memory"}
    assert engine_gpu.passed(rows)
    builds = [words for words in seen if "build-engine" in words]
    assert all(words[words.index("--gpu") + 1] == "RTX 4090" for words in builds)
    assert [Path(words[4]).name for words in builds] == ["2b", "2b-fp8"]
    said = capsys.readouterr().out
    assert "20.00 ms a step, 50% of the roofline, 1.50x by CUDA graphs, 0 copies" in said


def test_no_roofline_is_better_than_that_of_another_card(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = commands(monkeypatch)
    question = Question("2b", None, "1216x704x121", 5, "sm121")
    assert engine_gpu.roofline(question, Path("2b.safetensors")) is None
    assert not seen


@pytest.mark.parametrize(
    ("row", "met"),
    [(STEP, True), ({"failed": "x"}, False), (STEP | {"transfers_per_step": [0, 2]}, False)],
)
def test_an_engine_that_failed_or_came_back_to_the_host_does_not_pass(
    row: dict[str, Any], met: bool
) -> None:
    assert engine_gpu.passed({"engine bf16": row, "diffusers": {"failed": "x"}}) is met


def test_no_engine_is_no_proof() -> None:
    assert not engine_gpu.passed({"diffusers": STEP})
