"""The loop on the GPU is the loop on the host, and asks nothing of the host on its way."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from ltx_engines.errors import UserError
from ltx_trt.denoising import Denoises, Denoising, on_the_host
from ltx_trt.guidance import StepGuidance
from ltx_trt.sampler import SAMPLERS
from ltx_trt.session.device import Device
from ltx_trt.session.device_loop import DeviceLoop, Engines
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.engine_api import EngineError
from tests.runtime import device_loops, fake_gpu
from tests.runtime.device_loops import GUIDANCE, STEPS, Graphs, Twin, job, runner
from tests.runtime.fake_engines import FakeEngine, FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

Floats = NDArray[np.float32]
BOUND = 1e-5
"""Of the largest latent: what single precision leaves of six steps."""

HOST = {"upload", "download", "pinned", "allocate", "synchronize"}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return device_loops.write(tmp_path_factory.mktemp("graphs"), 128)


@pytest.fixture(scope="module")
def narrow_graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Velocities of which the second begins where no engine takes it."""
    return device_loops.write(tmp_path_factory.mktemp("narrow"), 4)


class Stage:
    """A device with both engines and the loop."""

    def __init__(self, graphs: Graphs, precision: str = "float32", streamable: int = 0) -> None:
        self.gpu = FakeGpu()
        self.device = Device.of(self.gpu, FakeLibrary(self.gpu))
        self.transformer = runner(self.device, "transformer", graphs, precision, streamable)
        self.step = runner(self.device, "sampler_step", graphs, precision)
        self.twin = Twin(graphs, precision)

    @property
    def engines(self) -> Engines:
        return Engines(self.device, self.transformer, self.step)

    def loop(self, *, cuda_graphs: bool = True) -> DeviceLoop:
        return DeviceLoop(self.twin, self.engines, cuda_graphs=cuda_graphs)


@contextmanager
def opened(graphs: Graphs, precision: str = "float32", streamable: int = 0) -> Iterator[Stage]:
    """Nothing of it is left behind."""
    stage = Stage(graphs, precision, streamable)
    with stage.device:
        try:
            yield stage
        finally:
            stage.transformer.close()
            stage.step.close()
        stage.device.arena.close()
        assert stage.gpu.leaks() == ["1 streams"]


@pytest.fixture
def stage(graphs: Graphs) -> Iterator[Stage]:
    with opened(graphs) as stage:
        yield stage


def finished(steps: Generator[None, None, Floats]) -> Floats:
    """What the generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            latents: Floats = end.value
            return latents


def difference(found: Floats, wanted: Floats) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_it_ends_where_the_host_does(
    stage: Stage, graphs: Graphs, sampler: str, guidance: str
) -> None:
    for seed in (0, 1):
        wish = graphs, sampler, GUIDANCE[guidance], seed
        wanted = finished(on_the_host(stage.twin, job(*wish)))
        captured, plain = (
            finished(stage.loop(cuda_graphs=on).denoise(job(*wish))) for on in (True, False)
        )
        assert difference(captured, wanted) <= BOUND
        np.testing.assert_array_equal(captured, plain)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ltx_tiny_ends_where_it_does_on_the_host(
    tmp_path_factory: pytest.TempPathFactory, sampler: str
) -> None:
    tiny = device_loops.shipped(tmp_path_factory.mktemp("tiny"))
    with opened(tiny) as stage:
        wish = tiny, sampler, GUIDANCE["changing"]
        wanted = finished(on_the_host(stage.twin, job(*wish)))
        assert difference(finished(stage.loop().denoise(job(*wish))), wanted) <= BOUND


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_velocities_between_addresses_are_brought_to_one(
    narrow_graphs: Graphs, sampler: str
) -> None:
    with opened(narrow_graphs) as stage:
        for guidance in GUIDANCE.values():
            wanted = finished(on_the_host(stage.twin, job(narrow_graphs, sampler, guidance)))
            found = finished(stage.loop().denoise(job(narrow_graphs, sampler, guidance)))
            assert difference(found, wanted) <= BOUND


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_a_narrow_engine_reads_and_writes_its_own_type(
    graphs: Graphs, dtype: str, bound: float
) -> None:
    """The bound is a few roundings of the type: latents that differ in the last digit of float32
    may fall on either side of one."""
    with opened(graphs, dtype) as stage:
        wish = graphs, "stochastic", GUIDANCE["changing"]
        wanted = finished(on_the_host(stage.twin, job(*wish)))
        found = finished(stage.loop().denoise(job(*wish)))
        assert difference(found, wanted) <= bound
        assert difference(found, finished(on_the_host(Twin(graphs), job(*wish)))) > BOUND


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_passes_between_host_and_gpu_from_the_first_step_to_the_last(
    stage: Stage, graphs: Graphs, sampler: str, *, cuda_graphs: bool
) -> None:
    finished(stage.loop(cuda_graphs=cuda_graphs).denoise(job(graphs, sampler)))
    assert all(pinned for *_, pinned in stage.gpu.named("upload") + stage.gpu.named("download"))
    names = [call[0] for call in stage.gpu.calls]
    works = [i for i, name in enumerate(names) if name in ("enqueue", "launch")]
    assert not HOST & set(names[works[0] : works[-1]])
    assert names.count("download") == 1
    waits = names[works[0] :].count("synchronize_event")
    assert waits == STEPS, "the host waits for a step once"


def test_the_host_is_one_step_ahead_of_what_it_tells(stage: Stage, graphs: Graphs) -> None:
    steps = stage.loop().denoise(job(graphs))
    for done in range(1, STEPS + 1):
        next(steps)
        recorded = [event for _, event, _ in stage.gpu.named("record")]
        assert len(recorded) == min(done + 1, STEPS)
        assert stage.gpu.named("synchronize_event")[-1][1] == recorded[done - 1]
    finished(steps)


def test_an_engine_at_work_is_not_bound_anew(stage: Stage, graphs: Graphs) -> None:
    finished(stage.loop().denoise(job(graphs, guidance=GUIDANCE["changing"])))
    at_work = False
    for name, *_ in stage.gpu.calls:
        assert not (at_work and name in ("set_shape", "set_address", "set_memory"))
        at_work = name in ("enqueue", "launch") or (at_work and name != "synchronize")


def test_nothing_is_read_that_nobody_wrote(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_gpu, "FRESH", 0xFF)  # in every float NaN
    with opened(graphs) as stage:
        for sampler in SAMPLERS:
            wish = graphs, sampler, GUIDANCE["changing"]
            assert np.isfinite(finished(stage.loop().denoise(job(*wish)))).all()


def test_a_binding_is_enqueued_once_captured_once_and_then_launched(
    stage: Stage, graphs: Graphs
) -> None:
    finished(stage.loop().denoise(job(graphs)))
    names = [call[0] for call in stage.gpu.calls]
    assert names.count("enqueue") == 4, "two engines, each once for itself and once for the graph"
    assert (names.count("begin_capture"), names.count("launch")) == (1, STEPS - 1)


def test_other_branches_are_captured_anew(stage: Stage, graphs: Graphs) -> None:
    twice = (GUIDANCE["alone"][:3], GUIDANCE["all"][:3], GUIDANCE["alone"][:3])
    guidance = tuple(guide for guides in twice for guide in guides)[:STEPS]
    finished(stage.loop().denoise(job(graphs, guidance=guidance)))
    assert (stage.gpu.count("begin_capture"), stage.gpu.count("launch")) == (2, 4)


def test_blocks_to_skip_change_without_a_new_graph(stage: Stage, graphs: Graphs) -> None:
    guidance = tuple(StepGuidance(3.0, 2.0, 0.7, (step % 3,)) for step in range(STEPS))
    wanted = finished(on_the_host(stage.twin, job(graphs, guidance=guidance)))
    found = finished(stage.loop().denoise(job(graphs, guidance=guidance)))
    assert difference(found, wanted) <= BOUND
    assert stage.gpu.count("begin_capture") == 1


def test_activations_that_move_are_bound_and_captured_anew(stage: Stage, graphs: Graphs) -> None:
    wanted = finished(stage.loop().denoise(job(graphs)))
    captures = stage.gpu.count("begin_capture")
    steps = stage.loop().denoise(job(graphs))
    for _ in range(3):
        next(steps)
    stage.device.arena.reserve(2 * stage.device.arena.size)
    np.testing.assert_array_equal(finished(steps), wanted)
    assert stage.gpu.count("begin_capture") == captures + 2


def test_streamed_weights_are_never_captured(graphs: Graphs) -> None:
    with opened(graphs, streamable=1000) as stage:
        finished(stage.loop().denoise(job(graphs)))
        assert (stage.gpu.count("begin_capture"), stage.gpu.count("enqueue")) == (0, 2 * STEPS)


def test_an_engine_that_no_graph_can_hold_is_enqueued_in_each_step(graphs: Graphs) -> None:
    with opened(graphs) as stage:
        engine = stage.transformer.engine
        assert isinstance(engine, FakeEngine)
        engine.plan = replace(engine.plan, capturable=False)
        found = finished(stage.loop().denoise(job(graphs)))
        assert (stage.gpu.count("begin_capture"), stage.gpu.count("enqueue")) == (0, 2 * STEPS)
        wanted = finished(stage.loop(cuda_graphs=False).denoise(job(graphs)))
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("after", range(STEPS))
def test_who_stops_leaves_nothing_behind(stage: Stage, graphs: Graphs, after: int) -> None:
    before = stage.gpu.leaks()
    with closing(stage.loop().denoise(job(graphs, "stochastic"))) as steps:
        for _ in range(after):
            next(steps)
    finished(stage.loop().denoise(job(graphs)))
    left = [row for row in stage.gpu.leaks() if row not in before]
    assert left[0] == f"1 allocations of [{stage.device.arena.size}] bytes"
    assert sorted(left[1:]) == ["1 context 0 of sampler_step", "1 context 0 of transformer"]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_refusal_is_told_with_its_step_and_words(
    stage: Stage, graphs: Graphs, *, cuda_graphs: bool
) -> None:
    stage.gpu.fail("enqueue", EngineError("no kernel"), after=1)
    with pytest.raises(UserError, match=r"step 1 of 6: no kernel"):
        finished(stage.loop(cuda_graphs=cuda_graphs).denoise(job(graphs)))
    stage.gpu.fail("synchronize_event", DeviceError("an illegal address"), after=2)
    with pytest.raises(UserError, match=r"step 3 of 6: an illegal address"):
        finished(stage.loop(cuda_graphs=cuda_graphs).denoise(job(graphs)))


@pytest.mark.parametrize(
    ("call", "error", "after"),
    [
        ("begin_capture", DeviceError("not now"), 0),
        ("enqueue", EngineError("not now"), 3),
        ("enqueue", UserError("not now"), 2),
    ],
)
def test_a_capture_that_fails_says_how_to_do_without(
    stage: Stage, graphs: Graphs, call: str, error: Exception, after: int
) -> None:
    stage.gpu.fail(call, error, after=after)
    with pytest.raises(UserError, match=r"captured as a CUDA graph: not now; .*--no-cuda-graphs"):
        finished(stage.loop().denoise(job(graphs)))
    finished(stage.loop().denoise(job(graphs)))  # the stream has left the capture


def test_a_gpu_that_fails_for_good_is_told_of_once(stage: Stage, graphs: Graphs) -> None:
    stage.gpu.fail("synchronize_event", DeviceError("an illegal address"), after=2)
    stage.gpu.fail("close_graph", DeviceError("still an illegal address"))
    with pytest.raises(UserError, match="step 3 of 6"):
        finished(stage.loop().denoise(job(graphs)))
    (graph,) = stage.gpu._graphs
    stage.gpu.close_graph(graph)


def test_the_stream_of_noise_goes_on_where_the_hosts_does(stage: Stage, graphs: Graphs) -> None:
    for sampler in SAMPLERS:
        here, there = job(graphs, sampler), job(graphs, sampler)
        finished(stage.loop().denoise(here))
        finished(on_the_host(stage.twin, there))
        np.testing.assert_array_equal(here.noise.normal((20,)), there.noise.normal((20,)))


def test_what_is_not_finite_is_no_result(stage: Stage, graphs: Graphs) -> None:
    wish = job(graphs)
    wish.text.embeds[0, 0, 0] = np.inf
    with pytest.raises(UserError, match=r"the last step .* overflowed .*--precision float32"):
        finished(stage.loop().denoise(wish))


def test_noise_that_finds_no_room_is_told_of(stage: Stage, graphs: Graphs) -> None:
    with closing(stage.loop().denoise(job(graphs, "stochastic"))) as steps:
        next(steps)
    sizes = [call[1] for call in stage.gpu.named("allocate")]
    stage.gpu.fail("allocate", DeviceError("OUT_OF_MEMORY"), after=sizes.index(5 * sizes[0]))
    with pytest.raises(UserError, match="no room for the noise of 5 steps"):
        finished(stage.loop().denoise(job(graphs, "stochastic")))


def test_two_engines_that_do_not_fit_are_refused(stage: Stage, graphs: Graphs) -> None:
    stage.step.close()
    stage.step = runner(stage.device, "sampler_step", graphs, "float16")
    with pytest.raises(UserError, match="latents is float32, the sampler step's batch is float16"):
        finished(stage.loop().denoise(job(graphs)))


@pytest.mark.parametrize("error", [DeviceError("an illegal address"), EngineError("an illegal")])
def test_a_step_that_cannot_be_closed_is_told_of(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse() -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(stage.step, "close", refuse)
        with pytest.raises(UserError, match=r"^stage sampler_step: an illegal"), stage.loop():
            pass


def test_it_is_a_session_that_denoises(stage: Stage, graphs: Graphs) -> None:
    with stage.loop() as loop:
        assert isinstance(loop, Denoises)
        wish: Denoising = job(graphs)
        feeds = wish.feeds(wish.latents, *next(wish.steps()))
        np.testing.assert_array_equal(loop(feeds)["velocity"], stage.twin(feeds)["velocity"])
    assert stage.twin.run is None
    assert stage.gpu.count("close_engine") == 1
    stage.step = runner(stage.device, "sampler_step", graphs)
