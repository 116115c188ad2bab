"""Memory that is held for the run: it grows, says when it moved, and is given back."""

from collections.abc import Iterator

import numpy as np
import pytest

from ltx_engines.errors import UserError
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.memory import Arena, Buffers, Watch, aligned
from tests.runtime.fake_gpu import FakeGpu


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = FakeGpu(memory=10_240)
    yield gpu
    assert gpu.leaks() == []


def test_the_arena_moves_only_to_grow_and_counts_it(gpu: FakeGpu) -> None:
    with Arena(gpu) as arena:
        assert (arena.size, arena.revision) == (0, 0)
        first = arena.reserve(1000)
        assert first % 256 == 0
        assert arena.reserve(10) == first
        assert arena.reserve(1024) == first
        assert (arena.size, arena.revision, gpu.count("allocate")) == (1024, 0, 1)
        arena.reserve(1025)
        assert (arena.size, arena.revision, gpu.used) == (1280, 1, 1280)


def test_a_block_may_grow_to_all_there_is(gpu: FakeGpu) -> None:
    with Arena(gpu) as arena:
        arena.reserve(8192)
        arena.reserve(10_240)  # both at once would not fit
        assert gpu.used == 10_240


def test_a_block_goes_when_the_work_in_it_is_done(gpu: FakeGpu) -> None:
    stream = gpu.stream()
    with Arena(gpu, stream) as arena:
        block = arena.reserve(256)
        source = np.ones(256, np.uint8)
        gpu.upload(block, source, stream)
        arena.reserve(512)
        names = [call[0] for call in gpu.calls]
        assert names.index("upload") < names.index("synchronize") < names.index("free")
    gpu.close_stream(stream)


def test_buffers_are_apart_and_only_grow(gpu: FakeGpu) -> None:
    with Buffers(gpu) as buffers:
        latents, text = buffers.get("latents", 300), buffers.get("text", 1)
        assert abs(latents - text) >= 512 or text > latents + 300
        assert buffers.get("latents", 512) == latents
        assert (buffers.total, buffers.size("text"), buffers.size("unknown")) == (768, 256, 0)
        assert buffers.revision == 0
        buffers.get("latents", 513)
        assert buffers.get("text", 1) == text
        assert buffers.revision == 1


def test_too_much_is_refused_with_what_there_is(gpu: FakeGpu) -> None:
    with Buffers(gpu) as buffers:
        buffers.get("latents", 4096)
        with pytest.raises(UserError) as caught:
            buffers.get("activations", 2**33)
        assert str(caught.value) == (
            "Fake RTX 4090 has no room for activations: wanted 8.00 GiB, free are 6144 bytes of "
            "10240 bytes; make the clip smaller or shorter, have one stage there at a time "
            "(--memory staged), or let weights be streamed with a smaller --device-memory"
        )
        assert buffers.get("activations", 6144)


def test_a_buffer_that_could_not_grow_is_gone_but_its_name_is_not(gpu: FakeGpu) -> None:
    with Buffers(gpu) as buffers:
        buffers.get("latents", 256)
        with pytest.raises(UserError):
            buffers.get("latents", 2**20)
        assert (buffers.total, gpu.used) == (0, 0)
        buffers.get("latents", 256)


def test_another_refusal_stays_what_it_is(gpu: FakeGpu) -> None:
    gpu.fail("allocate", DeviceError("cuMemAlloc: CUDA_ERROR_LAUNCH_FAILED"))
    with Buffers(gpu) as buffers, pytest.raises(DeviceError, match="LAUNCH_FAILED"):
        buffers.get("latents", 1)


def test_closed_memory_is_given_back_once(gpu: FakeGpu) -> None:
    buffers = Buffers(gpu)
    buffers.get("latents", 1)
    buffers.close()
    buffers.close()
    assert gpu.count("free") == 1


def test_a_gauge_that_fails_is_no_failure(gpu: FakeGpu) -> None:
    watch = Watch(gpu)
    first = gpu.allocate(2048)
    gpu.fail("memory", DeviceError("CUDA_ERROR_ILLEGAL_ADDRESS"))
    watch.look()
    assert watch.peak == 0
    watch.look()
    assert watch.peak == 2048
    gpu.free(first)


def test_the_peak_is_of_what_was_free_when_the_watch_began(gpu: FakeGpu) -> None:
    before = gpu.allocate(1024)
    watch = Watch(gpu)
    assert watch.peak == 0
    first = gpu.allocate(2048)
    watch.look()
    gpu.free(first)
    watch.look()
    assert watch.peak == 2048
    gpu.free(before)


@pytest.mark.parametrize(("size", "wanted"), [(0, 256), (1, 256), (256, 256), (257, 512)])
def test_sizes_are_multiples_of_what_engines_want(size: int, wanted: int) -> None:
    assert aligned(size) == wanted
