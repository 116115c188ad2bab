"""What TensorRT and TensorRT-RTX are told, and what becomes of what they refuse."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines.errors import UserError
from ltx_engines.libraries import MODULES, released
from ltx_engines.targets import Flavour
from ltx_trt.session import complaints, tensorrt_adapter
from ltx_trt.session.driver import Address, Stream
from ltx_trt.session.engine_api import Engine, EngineError, EngineTensor, Library
from ltx_trt.session.tensorrt_adapter import TensorRT
from tests.runtime.fake_gpu import FakeGpu
from tests.runtime.recorded_tensorrt import BF16, FP8, TENSORS, Recorder, used_of_rtx

STREAM = Stream(7)


@pytest.fixture(autouse=True)
def no_logger_is_kept() -> Iterator[None]:
    """The libraries keep one for the process; here there are many libraries."""
    complaints.of_library.cache_clear()
    yield
    complaints.of_library.cache_clear()


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (file := tmp_path / "x.engine").write_bytes(b"a plan")
    return file


class Bench:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.gpu = patch, FakeGpu()

    def library(self, recorder: Recorder) -> Library:
        flavour: Flavour = "tensorrt-rtx" if recorder.rtx else "tensorrt"
        self.patch.setitem(sys.modules, MODULES[flavour], recorder.module())
        return TensorRT(flavour, self.gpu)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def classic(**changes: Any) -> Recorder:
    return Recorder(rtx=False, version="11.1.0.7", **changes)


def test_an_engine_has_the_tensors_and_profiles_of_its_plan(bench: Bench, plan: Path) -> None:
    engine: Engine = bench.library(Recorder()).load(plan)
    assert engine.tensors == {
        "latents": EngineTensor("latents", "bfloat16", (-1, -1, 8), True),
        "timestep": EngineTensor("timestep", "float32", (1,), True),
        "velocity": EngineTensor("velocity", "bfloat16", (-1, -1, 8), False),
    }
    assert engine.profiles == 2
    assert engine.limits(1, "latents") == ((1, 1, 8), (2, 1, 8), (3, 1, 8))
    assert engine.layers() == "the layers as json"


def test_a_run_is_told_profile_shapes_memory_and_addresses_in_this_order(
    bench: Bench, plan: Path
) -> None:
    context = bench.library(recorder := classic()).load(plan).context(1)
    context.set_shape("latents", (2, 5, 8))
    assert context.memory() == 512
    context.set_memory(Address(4096), 512)
    for number, name in enumerate(TENSORS):
        context.set_address(name, Address(8192 * (number + 1)))
    context.enqueue(STREAM)
    stream = bench.gpu.named("close_stream")[0][1]
    assert recorder.calls == [
        ("deserialize_cuda_engine", b"a plan"),
        ("create_execution_context", "user"),
        ("set_optimization_profile_async", 1, stream),
        ("set_input_shape", "latents", (2, 5, 8)),
        ("update_device_memory_size_for_shapes",),
        ("set_device_memory", 4096, 512),
        ("set_tensor_address", "latents", 8192),
        ("set_tensor_address", "timestep", 16384),
        ("set_tensor_address", "velocity", 24576),
        ("execute_async_v3", 7),
    ]


def test_a_profile_is_there_before_the_context_is_used(bench: Bench, plan: Path) -> None:
    """It is copied on a stream of its own, which is waited for."""
    bench.library(Recorder()).load(plan).context(1)
    assert [call[0] for call in bench.gpu.calls] == ["stream", "synchronize", "close_stream"]
    assert bench.gpu.leaks() == []


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("deserialize_cuda_engine", "tensorrt_rtx refused to open x.engine: "),
        ("set_runtime_cache", "tensorrt_rtx refused the cache of kernels: "),
        ("create_execution_context", "tensorrt_rtx refused a context: "),
        ("set_optimization_profile_async", "tensorrt_rtx refused profile 0: "),
        ("set_input_shape", "tensorrt_rtx refused latents of shape (2, 5, 8): "),
        ("update_device_memory_size_for_shapes", "memory for these shapes: "),
        ("set_device_memory", "512 bytes of activations: "),
        ("set_tensor_address", "tensorrt_rtx refused latents at 0x1000: "),
        ("execute_async_v3", "tensorrt_rtx refused to enqueue: "),
    ],
)
def test_what_is_refused_is_raised_with_what_was_logged(
    bench: Bench, plan: Path, method: str, words: str
) -> None:
    recorder = Recorder(refuses={method}, needs=0 if method.startswith("update") else 512)
    library = bench.library(recorder)
    recorder.complain("an older complaint")
    with pytest.raises(EngineError) as caught:
        context = library.load(plan).context(0)
        context.set_shape("latents", (2, 5, 8))
        context.set_memory(Address(4096), context.memory())
        context.set_address("latents", Address(4096))
        context.enqueue(STREAM)
    assert str(caught.value) == f"{words}{method} is not possible"
    assert bench.gpu.leaks() == []


def test_shapes_that_are_missing_or_do_not_fit_are_named(bench: Bench, plan: Path) -> None:
    recorder = Recorder(unknown=["latents"])
    context = bench.library(recorder).load(plan).context(0)
    with pytest.raises(EngineError, match="no shape for latents"):
        context.memory()
    recorder.refuses.add("infer_shapes")
    with pytest.raises(EngineError, match="do not fit each other: 2 is not 3"):
        context.memory()


def test_an_engine_with_a_tensor_on_the_host_is_refused(bench: Bench, plan: Path) -> None:
    with pytest.raises(EngineError, match="timestep would have to be in the host's memory"):
        bench.library(Recorder(host="timestep")).load(plan)


def test_rtx_is_asked_whether_a_plan_is_valid_before_it_is_opened(bench: Bench, plan: Path) -> None:
    recorder = Recorder(validity=("invalid", 3))
    with pytest.raises(EngineError, match=r"not valid .*: version mismatch, unsupported cc$"):
        bench.library(recorder).load(plan)
    assert [call[0] for call in recorder.calls] == ["get_engine_validity"]


@pytest.mark.parametrize("way", ["swaps", "streams"])
def test_a_plan_that_is_too_large_only_as_a_whole_is_opened_in_pieces(
    bench: Bench, plan: Path, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    recorder = Recorder(validity=("invalid", 16))
    library = bench.library(recorder)
    with pytest.raises(EngineError, match="insufficient gpu memory"):
        library.load(plan)
    library.load(plan, **{way: True})  # type: ignore[arg-type]
    assert "x.engine as a whole is too large for this GPU" in caplog.text
    recorder.validity = ("invalid", 17)
    with pytest.raises(EngineError, match="version mismatch, insufficient gpu memory"):
        library.load(plan, **{way: True})  # type: ignore[arg-type]


def test_rtx_says_what_a_cuda_graph_can_hold_and_tensorrt_is_not_asked(
    bench: Bench, plan: Path
) -> None:
    recorder = Recorder()
    context = bench.library(recorder).load(plan).context(0)
    assert context.capturable(STREAM)
    assert recorder.named("is_stream_capturable") == [("is_stream_capturable", 7)]
    recorder.capturable = False
    assert not context.capturable(STREAM)
    assert bench.library(classic(capturable=False)).load(plan).context(0).capturable(STREAM)


def test_rtx_compiles_before_it_runs_and_leaves_graphs_to_us(bench: Bench, plan: Path) -> None:
    recorder = Recorder()
    bench.library(recorder).load(plan).context(0)
    ((_, config),) = recorder.named("create_execution_context")
    assert config.cuda_graph_strategy == "none"
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert recorder.named("set_execution_context_allocation_strategy")[0][1] == "user"


def test_compiled_kernels_are_read_before_and_written_once_after(
    bench: Bench, plan: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "kernels" / "x.cache"
    recorder = Recorder()
    engine = bench.library(recorder).load(plan, cache=cache)
    assert recorder.named("cache.deserialize") == []
    engine.save_cache()
    assert cache.read_bytes() == b"compiled"
    cache.unlink()
    engine.save_cache()
    assert not cache.exists()  # nothing new
    recorder.cached = b"compiled more"
    engine.save_cache()
    bench.library(recorder).load(plan, cache=cache)
    assert recorder.named("cache.deserialize") == [("cache.deserialize", b"compiled more")]
    assert sorted(file.name for file in cache.parent.iterdir()) == ["x.cache"]


def test_kernels_that_the_library_keeps_to_itself_are_an_error_with_its_words(
    bench: Bench, plan: Path, tmp_path: Path
) -> None:
    recorder = Recorder(refuses={"serialize"})
    engine = bench.library(recorder).load(plan, cache=tmp_path / "x.cache")
    with pytest.raises(EngineError, match=r"to hand over its kernels: serialize is not possible$"):
        engine.save_cache()


def test_kernels_that_cannot_be_read_are_compiled_again(
    bench: Bench, plan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.cache").mkdir()
    bench.library(recorder := Recorder()).load(plan, cache=tmp_path / "x.cache")
    assert recorder.named("cache.deserialize") == []
    assert "compiled kernels are not read: " in caplog.text


def test_kernels_of_another_gpu_are_said_and_left_out(
    bench: Bench, plan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (cache := tmp_path / "x.cache").write_bytes(b"of another")
    bench.library(Recorder(refuses={"cache.deserialize"})).load(plan, cache=cache)
    assert "is of another GPU or driver" in caplog.text


def test_tensorrt_has_neither_cache_nor_check(bench: Bench, plan: Path, tmp_path: Path) -> None:
    engine = bench.library(recorder := classic()).load(plan, cache=tmp_path / "x.cache")
    engine.save_cache()
    assert [call[0] for call in recorder.calls] == ["deserialize_cuda_engine"]
    assert not (tmp_path / "x.cache").exists()
    assert not engine.sleep()


def test_streamed_weights_take_scratch_memory_and_the_profiles_whole_room(
    bench: Bench, plan: Path
) -> None:
    engine = bench.library(classic(streamable=1000)).load(plan)
    assert engine.streamable == 1000
    assert engine.set_streaming_budget(5000) == 0
    assert engine.context(1).memory() == 512
    assert engine.set_streaming_budget(100) == 64
    assert engine.context(1).memory() == 2048


def test_a_budget_that_is_not_taken_is_an_error(bench: Bench, plan: Path) -> None:
    recorder = classic(streamable=1000, refuses={"weight_streaming_budget_v2"})
    engine = bench.library(recorder).load(plan)
    with pytest.raises(EngineError, match="budget of 100 bytes of weights was refused"):
        engine.set_streaming_budget(100)


class TestRefit:
    def test_weights_are_given_by_type_address_and_count(self, bench: Bench, plan: Path) -> None:
        engine = bench.library(recorder := Recorder()).load(plan)
        assert engine.refittable() == {"a", "b", "d", "e"}
        a, b = np.zeros(6, np.uint16), np.zeros(4, np.uint8)
        engine.refit([("a", "bfloat16", a), ("b", "float8e4m3fn", b)])
        assert recorder.named("set_named_weights", "refit_cuda_engine") == [
            ("set_named_weights", "a", ("weights", BF16, a.ctypes.data, 6)),
            ("set_named_weights", "b", ("weights", FP8, b.ctypes.data, 4)),
            ("refit_cuda_engine",),
        ]

    def test_weights_are_there_until_they_are_taken(self, bench: Bench, plan: Path) -> None:
        """TensorRT has only their addresses; whoever makes them keeps none."""
        engine = bench.library(recorder := Recorder()).load(plan)
        names = ["a", "d", "e"]
        engine.refit((n, "bfloat16", np.full(6, i, np.uint16)) for i, n in enumerate(names, 1))
        assert recorder.refitted == {n: bytes([i, 0] * 6) for i, n in enumerate(names, 1)}

    @pytest.mark.parametrize(
        ("name", "dtype", "size", "words"),
        [
            ("a", "float16", 6, "weights a are 6 bfloat16, not 6 float16"),
            ("a", "bfloat16", 5, "weights a are 6 bfloat16, not 5 bfloat16"),
            ("c", "bfloat16", 6, "no weights c"),
        ],
    )
    def test_others_than_the_engines_are_refused_before_it_is_touched(
        self, bench: Bench, plan: Path, name: str, dtype: str, size: int, words: str
    ) -> None:
        engine = bench.library(recorder := Recorder()).load(plan)
        good = ("b", "float8e4m3fn", np.zeros(4, np.uint8))
        with pytest.raises(EngineError, match=words):
            engine.refit([good, (name, dtype, np.zeros(size, np.uint16))])
        assert recorder.named("refit_cuda_engine") == []

    def test_weights_that_are_merged_with_these_must_come_too(
        self, bench: Bench, plan: Path
    ) -> None:
        engine = bench.library(recorder := Recorder(missing=["d", "c"])).load(plan)
        with pytest.raises(EngineError, match=r"2 weights are merged .* such as c, d"):
            engine.refit([("a", "bfloat16", np.zeros(6, np.uint16))])
        assert recorder.named("refit_cuda_engine") == []

    @pytest.mark.parametrize("method", ["Refitter", "set_named_weights", "refit_cuda_engine"])
    def test_a_refusal_is_raised(self, bench: Bench, plan: Path, method: str) -> None:
        engine = bench.library(Recorder(refuses={method})).load(plan)
        with pytest.raises(EngineError, match=f"{method} is not possible"):
            engine.refit([("a", "bfloat16", np.zeros(6, np.uint16))])


def test_weights_that_take_turns_come_from_the_plan_again(bench: Bench, plan: Path) -> None:
    engine = bench.library(recorder := Recorder()).load(plan, swaps=True)
    assert engine.sleep()
    engine.wake()
    assert [call[0] for call in recorder.named("load_weights", "unload_weights")] == [
        *("load_weights", "unload_weights", "load_weights")
    ]
    assert recorder.named("load_weights")[1][1] == b"a plan"
    assert not bench.library(Recorder()).load(plan).sleep(), "only what was asked to swap"


def test_a_package_that_was_made_again_holds_the_same_library(bench: Bench) -> None:
    library = bench.library(Recorder(version="1.7.1.116.post1"))
    assert library.version == "1.7.1.116"


@pytest.mark.parametrize(
    ("rtx", "version", "words"),
    [
        (False, "10.13.2", "tensorrt is 10.13.2, wanted 10.14 or later; pip install tensorrt "),
        (True, "1.6.0", "tensorrt_rtx is 1.6.0, wanted 1.7 or later; pip install 'ltx-trt"),
    ],
)
def test_a_library_that_is_too_old_is_refused(
    bench: Bench, rtx: bool, version: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        bench.library(Recorder(rtx=rtx, version=version))


def test_a_library_that_is_not_there_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match=r"tensorrt .* pip install tensorrt --extra-index-url"):
        TensorRT("tensorrt", FakeGpu())


class TestInstalled:
    """TensorRT-RTX itself, as far as it goes without a GPU."""

    def test_every_name_that_the_adapter_uses_is_there(self) -> None:
        trt = pytest.importorskip("tensorrt_rtx")
        used = list(used_of_rtx())
        missing = [
            f"{kind}.{name}"
            for kind, names in used
            for name in sorted(names)
            if not hasattr(getattr(trt, kind), name)
        ]
        assert used
        assert missing == []
        assert set(tensorrt_adapter.TYPES) <= set(trt.DataType.__members__)

    def test_its_version_is_known_without_loading_it(self) -> None:
        trt = pytest.importorskip("tensorrt_rtx")
        assert tensorrt_adapter.version("tensorrt-rtx") == released(trt.__version__)

    def test_what_is_no_plan_is_refused_in_its_words(self, plan: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        plan.write_bytes(b"no plan at all " * 99)
        with pytest.raises(EngineError, match=r"x\.engine is not valid .* malformed engine"):
            TensorRT("tensorrt-rtx", FakeGpu()).load(plan)
