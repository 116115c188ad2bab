"""A runner takes the profile with the least to spare, and tells its context nothing twice."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_trt.session.cuda_graphs import Graphs
from ltx_trt.session.driver import Address, Stream
from ltx_trt.session.engine_api import EngineError, Shape
from ltx_trt.session.engine_runner import EngineRunner
from ltx_trt.session.memory import Arena
from tests.runtime import engine_bundles
from tests.runtime.engine_bundles import Engines
from tests.runtime.fake_engines import FakeEngine, FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

SMALL, LARGE = VideoShape(9, 32, 64), VideoShape(17, 64, 64)


@pytest.fixture
def bundle(make_bundle: Callable[..., Path]) -> Bundle:
    folder = make_bundle()
    engine_bundles.add(folder, Engines((LARGE, SMALL), ("transformer",), refittable=("gain",)))
    return open_bundle(folder)


class Bench:
    def __init__(self, bundle: Bundle) -> None:
        self.gpu = FakeGpu()
        self.stream: Stream = self.gpu.stream()
        (entry,) = bundle.engines("transformer", 89)
        self.arena = Arena(self.gpu, self.stream)
        self.engine: FakeEngine = FakeLibrary(self.gpu).load(bundle.file(entry.file))
        self.runner = EngineRunner(self.engine, self.arena, entry)
        names = self.runner.tensors
        self.addresses = {name: self.gpu.allocate(65536) for name in names}

    def bind(self, tokens: int, batch: int = 1) -> None:
        self.runner.bind(shapes(tokens, batch), self.addresses)

    def told(self) -> list[str]:
        """What the contexts were told since the last time."""
        words = ("context", "set_shape", "set_memory", "set_address", "enqueue")
        found = [call[0] for call in self.gpu.calls if call[0] in words]
        self.gpu.calls.clear()
        return found


def shapes(tokens: int, batch: int) -> dict[str, Shape]:
    return {
        "latents": (batch, tokens, 4),
        "coords": (batch, 3, tokens),
        "timestep": (batch, 1),
        "prompt_embeds": (batch, 12, 6),
        "prompt_mask": (batch, 12),
        "skip_layer_mask": (3, batch),
    }


@pytest.fixture
def bench(bundle: Bundle) -> Bench:
    return Bench(bundle)


@pytest.mark.parametrize(("clip", "profile"), [(LARGE, 0), (SMALL, 1)])
def test_the_profile_is_that_of_the_clip(bench: Bench, clip: VideoShape, profile: int) -> None:
    bench.bind(clip.tokens)
    assert bench.gpu.named("context") == [("context", "transformer", profile)]


def test_of_two_that_fit_the_smaller_is_taken(bundle: Bundle, bench: Bench) -> None:
    wide = {
        name: (low, low, high) for name, (low, _, high) in bench.engine.plan.profiles[0].items()
    }
    for name, (low, _, high) in bench.engine.plan.profiles[1].items():
        wide[name] = low, high, wide[name][2]
    bench.engine.plan = replace(bench.engine.plan, profiles=(wide, *bench.engine.plan.profiles[1:]))
    bench.bind(SMALL.tokens)
    assert bench.gpu.named("context") == [("context", "transformer", 1)]
    bench.bind(SMALL.tokens + 1)
    assert bench.gpu.named("context")[1:] == [("context", "transformer", 0)]


def test_nothing_is_set_twice_and_what_changed_is_set(bench: Bench) -> None:
    bench.bind(SMALL.tokens)
    assert sorted(set(bench.told())) == ["context", "set_address", "set_memory", "set_shape"]
    bench.bind(SMALL.tokens)
    assert bench.told() == []
    bench.addresses["velocity"] = bench.gpu.allocate(65536)
    bench.bind(SMALL.tokens)
    assert bench.told() == ["set_address"]
    bench.bind(SMALL.tokens, batch=2)
    assert bench.told() == ["set_shape"] * 6 + ["set_memory"]
    bench.bind(LARGE.tokens)
    bench.bind(SMALL.tokens, batch=2)  # its context has everything but the arena, which grew
    assert bench.told()[-1] == "set_memory"


def test_an_arena_that_grew_after_the_binding_is_told_before_the_run(bench: Bench) -> None:
    bench.bind(SMALL.tokens)
    bench.arena.reserve(2**20)
    bench.told()
    bench.runner.enqueue(bench.stream)
    assert bench.told() == ["set_memory", "enqueue"]
    bench.runner.enqueue(bench.stream)
    assert bench.told() == ["enqueue"]


def test_what_no_profile_takes_is_said_with_what_each_takes(bench: Bench) -> None:
    with pytest.raises(UserError) as caught:
        bench.bind(7)
    assert str(caught.value) == (
        "no profile of transformer.sm89.tensorrt-rtx.engine takes tokens 7: tokens 12; tokens 4; "
        "build it for this size (ltx-export build-engine --shape)"
    )
    with pytest.raises(UserError, match=r"takes batch 4: .*batch 1 to 3"):
        bench.bind(SMALL.tokens, batch=4)


def test_an_engine_that_is_not_the_manifests_is_refused(bundle: Bundle, bench: Bench) -> None:
    (entry,) = bundle.engines("transformer", 89)
    other = entry.model_copy(
        update={"outputs": (entry.outputs[0].model_copy(update={"dtype": "bfloat16"}),)}
    )
    with pytest.raises(UserError, match="and the manifest differ in velocity"):
        EngineRunner(bench.engine, bench.arena, other)


def test_it_is_bound_before_it_runs(bench: Bench) -> None:
    with pytest.raises(ValueError, match="bound before"):
        bench.runner.enqueue(bench.stream)


def ran(bench: Bench) -> None:
    bench.bind(SMALL.tokens)
    bench.runner.enqueue(bench.stream)
    bench.gpu.synchronize(bench.stream)


def test_closing_gives_back_contexts_and_engine_and_keeps_what_was_compiled(bench: Bench) -> None:
    bench.bind(SMALL.tokens)
    bench.bind(LARGE.tokens)
    bench.gpu.fill(Address(bench.addresses["latents"]), 0, 64, bench.stream)
    bench.runner.enqueue(bench.stream)
    bench.gpu.synchronize(bench.stream)
    bench.told()
    bench.runner.close()
    assert [call[0] for call in bench.gpu.calls] == [
        *("save_cache", "close_context", "close_context", "close_engine")
    ]


@pytest.mark.parametrize("error", [OSError("the disk is full"), EngineError("no memory")])
def test_kernels_that_cannot_be_kept_do_not_keep_it_open(
    bench: Bench, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    ran(bench)
    bench.gpu.fail("save_cache", error)
    bench.runner.close()
    assert [call[0] for call in bench.gpu.calls[-2:]] == ["close_context", "close_engine"]
    assert f"compiled kernels are not kept: {error}" in caplog.text


def test_what_cannot_be_in_a_cuda_graph_runs_without_one_and_says_so_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.bind(SMALL.tokens)
    assert bench.runner.capturable, "nobody knows yet"
    for capturable, captures in ((False, 0), (True, 1)):
        bench.engine.plan = replace(bench.engine.plan, capturable=capturable)
        graphs = Graphs(bench.gpu, bench.stream, (bench.runner,))
        for _ in range(3):
            graphs.run("key", partial(bench.runner.enqueue, bench.stream))
        graphs.close()
        assert bench.gpu.count("begin_capture") == captures
    assert caplog.text.count("cannot be in a CUDA graph") == 1


def test_nothing_compiled_is_nothing_kept(bench: Bench) -> None:
    bench.runner.close()
    assert bench.gpu.named("save_cache") == []
