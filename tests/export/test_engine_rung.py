"""The rung of the engine, up to TensorRT itself: a runner of polygraphy's stands in its place."""

import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import onnx
import pytest
import torch

from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_export import build as builder
from ltx_export import (
    build_process,
    card,
    debug_layers,
    engine_refusals,
    engine_rung,
    ladder_report,
    polygraphy_engine,
    verify,
)
from ltx_export.build_job import Job
from ltx_export.card import Card
from ltx_export.engine_rung import Climbable
from ltx_export.ladder import Skipped
from ltx_export.onnx_transformer import VELOCITY, Graph, OnnxTransformer
from tests.export import made_engines
from tests.export.test_verify import TINY, climbed, order, rows

SHAPE = VideoShape(9, 64, 64)
FEEDS = {
    "latents": torch.zeros(3, 8, 32),
    "prompt_embeds": torch.zeros(3, 16, 64),
    "timestep": torch.zeros(3, 1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    profile = made_engines.PROFILE | {"text": (1, 256, 256)}
    return made_engines.add(tmp_path_factory.mktemp("engine") / "bundle", profile)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    def has(capability: int | None) -> None:
        found = None if capability is None else Card("a card", capability, 10**9)
        monkeypatch.setattr(card, "at_hand", lambda: found)
        monkeypatch.setattr(polygraphy_engine, "missing", lambda _: None)

    return has


def why(found: Climbable | Skipped) -> str:
    assert isinstance(found, Skipped)
    assert found.rung == "engine"
    return found.why


def test_without_a_bundle_there_is_no_engine() -> None:
    assert "give the bundle that ltx-export build-engine made with --bundle" in why(
        engine_rung.find(None, SHAPE, FEEDS)
    )


def test_a_bundle_without_engines_says_how_to_get_one() -> None:
    said = why(engine_rung.find(TINY, SHAPE, FEEDS))
    assert f"ltx-export build-engine {TINY} --stages transformer --shape 64x64x9" in said


def test_without_a_gpu_it_says_where_it_runs(
    folder: Path, gpu: Callable[[int | None], None]
) -> None:
    gpu(None)
    said = why(engine_rung.find(folder, SHAPE, FEEDS))
    assert said.startswith("no NVIDIA GPU is here, and the engine is for SM89")


def test_on_another_gpu_it_says_what_to_build(
    folder: Path, gpu: Callable[[int | None], None]
) -> None:
    gpu(120)
    assert "ltx-export build-engine --gpu sm120" in why(engine_rung.find(folder, SHAPE, FEEDS))


def test_a_library_that_is_missing_is_named(
    folder: Path, gpu: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(89)
    monkeypatch.setattr(polygraphy_engine, "missing", lambda flavour: f"{flavour} is missing")
    assert why(engine_rung.find(folder, SHAPE, FEEDS)) == "tensorrt-rtx is missing"


def test_the_profile_is_the_one_that_takes_the_inputs(
    folder: Path, gpu: Callable[[int | None], None]
) -> None:
    gpu(89)
    found = engine_rung.find(folder, SHAPE, FEEDS)
    assert isinstance(found, Climbable)
    assert found.profile == 0
    (engine,) = found.chain
    small = made_engines.PROFILE | {"tokens": (4, 4, 4)}
    profiles = (small, engine.key.profiles[0])
    assert polygraphy_engine.profile_for(profiles, found.chain, FEEDS) == 1
    larger = FEEDS | {"latents": torch.zeros(3, 12, 32)}
    said = why(engine_rung.find(folder, VideoShape(9, 64, 96), larger))
    assert "no profile of it takes 3 branches of 96x64x9" in said
    assert "--shape 96x64x9 --gpu sm89 --branches 3" in said


class FakeTrt:
    """polygraphy's backend for TensorRT; its runner computes with ONNX Runtime."""

    def __init__(self, session: Any, factor: float = 1.0) -> None:
        self.session, self.factor = session, factor
        self.calls: list[object] = []

    def EngineFromBytes(self, read: Callable[[], bytes]) -> Callable[[], object]:  # noqa: N802
        return lambda: self.calls.append(("deserialize", read()))

    def TrtRunner(self, engine: Any, name: str, optimization_profile: int) -> "FakeRunner":  # noqa: N802
        self.calls.append((name, optimization_profile))
        return FakeRunner(self, engine)


class FakeRunner:
    def __init__(self, backend: FakeTrt, engine: Callable[[], object]) -> None:
        self.backend, self.engine = backend, engine
        self.output = np.zeros(0, np.float32)

    def __enter__(self) -> Self:
        self.engine()
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.calls.append("closed")

    def infer(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        self.output[...] = np.nan  # the memory of the call before
        arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
        (found,) = self.backend.session.run([VELOCITY], arrays)
        self.output = found * np.float32(self.backend.factor)
        return {VELOCITY: self.output}


@pytest.fixture
def fake(
    monkeypatch: pytest.MonkeyPatch, folder: Path, gpu: Callable[[int | None], None]
) -> Iterator[FakeTrt]:
    gpu(89)
    backend = FakeTrt(OnnxTransformer(Graph(open_bundle(folder))).session)
    monkeypatch.setattr(polygraphy_engine, "load", lambda _: backend)
    yield backend
    assert backend.calls[-1] == "closed"


def engine_order(folder: Path) -> verify.Order:
    return replace(order(TINY / "ltx-tiny.safetensors"), bundle=folder)


def test_the_engine_climbs_last_beside_onnx_runtime(folder: Path, fake: FakeTrt) -> None:
    report = climbed(engine_order(folder))
    assert report.skipped == ()
    assert [*rows(report, "engine")] == ["velocity onnx", "latents onnx"]
    assert all(row.distance == 0 for row in rows(report, "engine").values())
    assert report.rows[-1].rung == "engine"
    assert fake.calls == [(made_engines.PLAN, 0), ("deserialize", b"a plan"), "closed"]


def test_an_engine_with_wrong_numbers_breaks_its_rung(folder: Path, fake: FakeTrt) -> None:
    fake.factor = 1.5
    report = climbed(engine_order(folder))
    assert report.broken is not None
    assert report.broken.rung == "engine"
    assert f"ltx-export debug-layers {folder}" in [*ladder_report._tail(report)][-1]


def test_one_process_has_one_flavour(monkeypatch: pytest.MonkeyPatch) -> None:
    """polygraphy asks for the name of its module once."""
    from polygraphy import config

    monkeypatch.setenv(polygraphy_engine.LIBRARIES, "")
    monkeypatch.setattr(config, "USE_TENSORRT_RTX", False)
    monkeypatch.setattr(polygraphy_engine, "missing", lambda _: None)
    loader = "polygraphy.backend.trt.loader"
    monkeypatch.setitem(sys.modules, loader, SimpleNamespace())
    with pytest.raises(UserError, match="polygraphy runs tensorrt in this process"):
        polygraphy_engine.load("tensorrt-rtx")


def test_the_switch_is_the_one_that_polygraphys_variable_sets() -> None:
    """In a fresh process: its TensorRT is TensorRT-RTX, which can be asked without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")
    code = (
        "from ltx_export import polygraphy_engine\n"
        "backend = polygraphy_engine.load('tensorrt-rtx')\n"
        "from polygraphy.backend.trt import util\n"
        "print(util.trt.Logger.__module__, backend.TrtRunner.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "tensorrt_rtx_bindings.tensorrt_rtx TrtRunner\n", done.stderr


def test_what_polygraphy_refuses_is_one_line() -> None:
    from polygraphy.exception import PolygraphyException

    with (
        pytest.raises(UserError, match=r"^x\.engine: polygraphy: no such thing$"),
        polygraphy_engine.told("x.engine"),
    ):
        raise PolygraphyException("no\nsuch   thing")
    with (
        pytest.raises(UserError, match="CUDA's runtime library is not found"),
        polygraphy_engine.told("x.engine"),
    ):
        raise OSError("libcudart.so: cannot open shared object file")


def test_debug_layers_marks_the_blocks_of_an_engine_that_it_builds(
    folder: Path, gpu: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(89)
    graph = Graph(open_bundle(folder))
    jobs: list[Job] = []

    def build(job: Job, _: str) -> Iterator[str]:
        yield "built"
        job.engine.write_bytes(b"a plan")
        jobs.append(job)

    def marked(*_: object) -> "Computed":
        names = onnx.load(jobs[-1].graph, load_external_data=False).graph.output
        return Computed(OnnxTransformer(graph, [value.name for value in names]))

    monkeypatch.setattr(build_process, "run", build)
    monkeypatch.setattr(engine_refusals, "flavour", lambda *_: "tensorrt-rtx")
    monkeypatch.setattr(builder, "version", lambda _: "1.7")
    monkeypatch.setattr(polygraphy_engine, "load", lambda _: None)
    monkeypatch.setattr(polygraphy_engine, "runner_of", marked)
    (*_,) = (
        work := Kept(debug_layers.run(debug_layers.Order(folder, shape="64x64x9", branches=2)))
    )
    assert work.found.passed is False
    assert "worst is transformer_blocks.0" in work.found.numbers
    whole, velocity, blocks, layers = jobs
    assert (whole.profiles, whole.weights) == ((), velocity.weights)
    assert velocity.profiles[0]["latents"] == ((1, 8, 32), (2, 8, 32), (2, 8, 32))
    assert Path(blocks.weights["ltx-tiny.safetensors"]).samefile(folder / "ltx-tiny.safetensors")
    assert layers.targets == (89,)


class Computed:
    """A runner; what it gives of the first block, and so of the velocity, is too large."""

    def __init__(self, model: OnnxTransformer) -> None:
        self.model = model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def infer(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {name: value * 1.5 for name, value in self.model.run(feeds).items()}


class Kept:
    """A generator's steps, and then what it returned."""

    def __init__(self, work: Generator[str, None, debug_layers.Findings]) -> None:
        self.work = work

    def __iter__(self) -> Iterator[str]:
        self.found = yield from self.work
