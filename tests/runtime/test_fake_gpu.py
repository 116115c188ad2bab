"""The fake GPU overlooks nothing: what would be garbage on a GPU is an error or garbage here."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ltx_engines.bundle import open_bundle
from ltx_engines.shapes import VideoShape
from ltx_trt.session.driver import Address, DeviceError, Driver
from ltx_trt.session.engine_api import EngineError, Library
from tests.runtime import engine_bundles
from tests.runtime.engine_bundles import Engines
from tests.runtime.fake_engines import FakeLibrary, read_plan
from tests.runtime.fake_gpu import FakeGpu, MisuseError

CLIP = VideoShape(9, 32, 64)


def test_it_answers_to_the_runtimes_protocols() -> None:
    driver: Driver = FakeGpu()
    library: Library = FakeLibrary(FakeGpu())
    assert (driver.capability, library.flavour) == (89, "tensorrt-rtx")


def test_numbers_go_there_and_back() -> None:
    gpu = FakeGpu()
    stream, there, other = gpu.stream(), gpu.allocate(64), gpu.allocate(64)
    numbers, back = np.arange(16, dtype=np.float32), np.zeros(16, np.float32)
    gpu.upload(there, numbers, stream)
    gpu.copy(other, there, 64, stream)
    gpu.download(back, other, stream)
    assert not back.any()  # nobody has waited
    gpu.synchronize(stream)
    np.testing.assert_array_equal(back, numbers)


def test_what_overtakes_an_event_that_was_not_waited_for_reads_garbage() -> None:
    gpu = FakeGpu()
    first, second, there = gpu.stream(), gpu.stream(), gpu.allocate(4)
    back = np.zeros(2, np.float32)
    gpu.upload(there, one := np.ones(1, np.float32), first)
    gpu.record(event := gpu.event(), first)
    gpu.download(back[:1], there, second)
    gpu.wait(second, event)
    gpu.download(back[1:], there, second)
    gpu.synchronize(second)
    assert back[0] != one[0]
    assert back[1] == one[0]


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("copy", ["upload", "download"])
def test_memory_of_the_host_that_nobody_keeps_is_missed(copy: str, *, pinned: bool) -> None:
    gpu = FakeGpu()
    stream, there = gpu.stream(), gpu.allocate(64)
    memory = gpu.pinned(64) if pinned else np.zeros(64, np.uint8)
    if copy == "upload":
        gpu.upload(there, memory[:32], stream)
    else:
        gpu.download(memory[:32], there, stream)
    if pinned:
        gpu._pinned.clear()  # `unpin` waits, as CUDA does
    del memory
    with pytest.raises(MisuseError, match="is freed"):
        gpu.synchronize(stream)


def test_after_a_fault_that_stays_every_call_fails() -> None:
    gpu = FakeGpu()
    gpu.fail("memory", DeviceError("CUDA_ERROR_ILLEGAL_ADDRESS"), after=1, stays=True)
    gpu.memory()
    for call in (gpu.memory, gpu.stream, gpu.close):
        with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
            call()


@pytest.mark.parametrize("offset", [-1, 1, 4096])
def test_an_access_outside_of_an_allocation_is_refused(offset: int) -> None:
    gpu = FakeGpu()
    stream, there = gpu.stream(), gpu.allocate(64)
    with pytest.raises(MisuseError, match="not inside a live allocation"):
        gpu.upload(Address(there + offset), np.zeros(64, np.uint8), stream)


def test_a_freed_block_is_no_longer_there() -> None:
    gpu = FakeGpu()
    stream, there = gpu.stream(), gpu.allocate(64)
    gpu.free(there)
    with pytest.raises(MisuseError, match="not inside a live allocation"):
        gpu.fill(there, 0, 64, stream)


def test_memory_ends() -> None:
    gpu = FakeGpu(memory=1000)
    gpu.allocate(900)
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        gpu.allocate(200)


def test_a_graph_does_again_what_was_captured_and_nothing_while_it_was() -> None:
    gpu = FakeGpu()
    stream, source, target = gpu.stream(), gpu.allocate(4), gpu.allocate(4)
    gpu.fill(source, 7, 4, stream)
    gpu.fill(target, 0, 4, stream)
    gpu.begin_capture(stream)
    gpu.copy(target, source, 4, stream)
    with pytest.raises(MisuseError, match="inside a capture"):
        gpu.upload(target, np.zeros(4, np.uint8), stream)
    graph = gpu.end_capture(stream)
    gpu.synchronize(stream)
    assert not gpu.bytes_at(target, 4).any()
    gpu.launch(graph, stream)
    gpu.synchronize(stream)
    assert (gpu.bytes_at(target, 4) == 7).all()


def test_what_is_not_given_back_is_named() -> None:
    gpu = FakeGpu()
    gpu.allocate(64)
    gpu.close_stream(gpu.stream())
    gpu.event()
    assert gpu.leaks() == ["1 allocations of [64] bytes", "1 events"]


def test_an_arranged_failure_comes_once_and_in_its_time() -> None:
    gpu = FakeGpu()
    gpu.fail("allocate", DeviceError("no"), after=1)
    gpu.allocate(1)
    with pytest.raises(DeviceError, match="no"):
        gpu.allocate(1)
    gpu.allocate(1)


class TestEngines:
    @pytest.fixture
    def folder(self, make_bundle: Callable[..., Path]) -> Path:
        pytest.importorskip("onnxruntime")
        folder = make_bundle()
        engine_bundles.add(folder, Engines((CLIP,), dtype="bfloat16"))
        return folder

    def test_a_bundle_with_them_is_whole(self, folder: Path) -> None:
        (engine,) = open_bundle(folder).engines("transformer", 89, "tensorrt-rtx")
        assert engine.key.profiles[0]["tokens"] == (CLIP.tokens,) * 3

    def test_an_engine_computes_what_its_graph_says(self, folder: Path) -> None:
        gpu = FakeGpu()
        stream = gpu.stream()
        engine = FakeLibrary(gpu).load(folder / "text_encoder.sm89.tensorrt-rtx.engine")
        assert engine.tensors["prompt_embeds"].dtype == "bfloat16"
        context = engine.context(0)
        ones = np.full((1, 12), 1, np.int64)
        for name in ("input_ids", "attention_mask"):
            gpu.upload(there := gpu.allocate(96), ones, stream)
            context.set_shape(name, (1, 12))
            context.set_address(name, there)
        context.set_memory(gpu.allocate(context.memory()), context.memory())
        context.set_address("prompt_embeds", out := gpu.allocate(12 * 6 * 2))
        context.enqueue(stream)
        gpu.synchronize(stream)
        words = gpu.bytes_at(out, 12 * 6 * 2).view(np.uint16)
        assert set(words) == {0x3C24}  # 0.01 in bfloat16

    def test_a_context_without_memory_shapes_or_addresses_refuses(self, folder: Path) -> None:
        gpu = FakeGpu()
        stream = gpu.stream()
        context = FakeLibrary(gpu).load(folder / "text_encoder.sm89.tensorrt-rtx.engine").context(0)
        with pytest.raises(EngineError, match="no shape for"):
            context.enqueue(stream)
        with pytest.raises(EngineError, match="is not within"):
            context.set_shape("input_ids", (1, 13))
        for name in ("input_ids", "attention_mask"):
            context.set_shape(name, (1, 12))
        with pytest.raises(EngineError, match="no address for"):
            context.enqueue(stream)
        with pytest.raises(MisuseError, match="not a multiple of 256"):
            context.set_address("input_ids", Address(gpu.allocate(512) + 8))

    def test_a_budget_of_weights_is_memory_at_once(self, folder: Path, tmp_path: Path) -> None:
        plan = read_plan(folder / "text_encoder.sm89.tensorrt-rtx.engine")
        file = replace(plan, weights=1000, streamable=900).write(tmp_path / "x.engine")
        gpu = FakeGpu(memory=800)
        with pytest.raises(MisuseError, match="not said at the load"):
            FakeLibrary(FakeGpu()).load(file).set_streaming_budget(0)
        engine = FakeLibrary(gpu).load(file, streams=True)
        assert gpu.used == 100
        with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
            engine.set_streaming_budget(900)
        engine.set_streaming_budget(700)
        assert gpu.used == 800
        engine.set_streaming_budget(300)
        engine.context(0).close()
        assert gpu.used == 400
        engine.close()
        assert gpu.used == 0

    def test_another_gpu_or_another_library_is_refused(self, folder: Path) -> None:
        plan = folder / "text_encoder.sm89.tensorrt-rtx.engine"
        with pytest.raises(EngineError, match="is for"):
            FakeLibrary(FakeGpu(capability=120)).load(plan)
        with pytest.raises(EngineError, match="is of"):
            FakeLibrary(FakeGpu(), version="1.6").load(plan)
