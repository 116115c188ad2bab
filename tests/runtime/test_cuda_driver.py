"""What CUDA is told, by a module that records it in cuda-python's place."""

import ctypes
import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ltx_engines.errors import UserError
from ltx_trt.session.cuda_driver import CudaDriver
from ltx_trt.session.driver import Address, DeviceError, Driver, Event, Graph, Stream

OK, FAILED, NO_DEVICE, UNNAMED = 0, 700, 100, 999
WORDS = {
    FAILED: (b"CUDA_ERROR_ILLEGAL_ADDRESS\0", b"an illegal memory access was encountered\0"),
    UNNAMED: (b"", b""),
}
A, B, STREAM, EVENT, GRAPH = Address(2**41), Address(2**42), Stream(7), Event(8), Graph(9)

ANSWERS: dict[str, tuple[Any, ...]] = {
    "cuDeviceGet": (3,),
    "cuDeviceGetName": (b"RTX 4090\0\0",),
    "cuDevicePrimaryCtxRetain": ("context",),
    "cuMemGetInfo": (10, 20),
    "cuMemAlloc": (A,),
    "cuStreamCreate": (STREAM,),
    "cuEventCreate": (EVENT,),
    "cuEventElapsedTime": (1500.0,),
    "cuStreamEndCapture": (6,),
    "cuGraphInstantiate": (GRAPH,),
}


class Recorder(ModuleType):
    """Answers every call that begins with `cu`; `codes` are those that fail."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.calls: list[tuple[Any, ...]] = []
        self.codes: dict[str, int] = {}
        self.pinned = ctypes.create_string_buffer(64)
        self.CUresult = SimpleNamespace(CUDA_SUCCESS=OK, CUDA_ERROR_NO_DEVICE=NO_DEVICE)
        self.CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="local")
        name = "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_"
        self.CUdevice_attribute = SimpleNamespace(**{f"{name}MAJOR": 75, f"{name}MINOR": 76})

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: self.answer(name, *arguments)

    def answer(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        if name in ("cuGetErrorName", "cuGetErrorString"):
            return OK, WORDS[arguments[0]][name == "cuGetErrorString"]
        self.calls.append((name, *arguments))
        if code := self.codes.get(name):
            return (code, *(None for _ in ANSWERS.get(name, ())))
        if name == "cuDeviceGetAttribute":
            return OK, {75: 8, 76: 9}[arguments[0]]
        if name == "cuMemHostAlloc":
            return OK, ctypes.addressof(self.pinned)
        return OK, *ANSWERS.get(name, ())

    def since(self, mark: int) -> list[tuple[Any, ...]]:
        return self.calls[mark:]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    parent = ModuleType("cuda.bindings")
    parent.driver = recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", parent)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", recorder)
    return recorder


def test_it_starts_in_the_primary_context_of_the_first_gpu(cuda: Recorder) -> None:
    driver: Driver = CudaDriver()
    assert (driver.name, driver.capability) == ("RTX 4090", 89)
    assert cuda.calls == [
        ("cuInit", 0),
        ("cuDeviceGet", 0),
        ("cuDeviceGetName", 256, 3),
        ("cuDeviceGetAttribute", 75, 3),
        ("cuDeviceGetAttribute", 76, 3),
        ("cuDevicePrimaryCtxRetain", 3),
    ]
    assert driver.memory() == (10, 20)
    driver.close()
    assert cuda.calls[-3:] == [
        ("cuCtxSetCurrent", "context"),
        ("cuMemGetInfo",),
        ("cuDevicePrimaryCtxRelease", 3),
    ]


NUMBERS = np.arange(6, dtype=np.float32)
HERE = NUMBERS.ctypes.data

Row = tuple[Callable[[CudaDriver], Any], Any, list[tuple[Any, ...]]]
ROWS: dict[str, Row] = {
    "allocate": (lambda d: d.allocate(512), A, [("cuMemAlloc", 512)]),
    "free": (lambda d: d.free(A), None, [("cuMemFree", A)]),
    "stream": (lambda d: d.stream(), STREAM, [("cuStreamCreate", 1)]),
    "close_stream": (lambda d: d.close_stream(STREAM), None, [("cuStreamDestroy", 7)]),
    "synchronize": (lambda d: d.synchronize(STREAM), None, [("cuStreamSynchronize", 7)]),
    "upload": (
        lambda d: d.upload(A, NUMBERS, STREAM),
        None,
        [("cuMemcpyHtoDAsync", A, HERE, 24, 7)],
    ),
    "download": (
        lambda d: d.download(NUMBERS, A, STREAM),
        None,
        [("cuMemcpyDtoHAsync", HERE, A, 24, 7)],
    ),
    "copy": (lambda d: d.copy(A, B, 5, STREAM), None, [("cuMemcpyDtoDAsync", A, B, 5, 7)]),
    "fill": (lambda d: d.fill(A, 255, 5, STREAM), None, [("cuMemsetD8Async", A, 255, 5, 7)]),
    "event": (lambda d: d.event(), EVENT, [("cuEventCreate", 0)]),
    "close_event": (lambda d: d.close_event(EVENT), None, [("cuEventDestroy", 8)]),
    "record": (lambda d: d.record(EVENT, STREAM), None, [("cuEventRecord", 8, 7)]),
    "wait": (lambda d: d.wait(STREAM, EVENT), None, [("cuStreamWaitEvent", 7, 8, 0)]),
    "synchronize_event": (
        lambda d: d.synchronize_event(EVENT),
        None,
        [("cuEventSynchronize", 8)],
    ),
    "elapsed": (lambda d: d.elapsed(EVENT, Event(5)), 1.5, [("cuEventElapsedTime", 8, 5)]),
    "begin_capture": (
        lambda d: d.begin_capture(STREAM),
        None,
        [("cuStreamBeginCapture", 7, "local")],
    ),
    "end_capture": (
        lambda d: d.end_capture(STREAM),
        GRAPH,
        [("cuStreamEndCapture", 7), ("cuGraphInstantiate", 6, 0), ("cuGraphDestroy", 6)],
    ),
    "launch": (lambda d: d.launch(GRAPH, STREAM), None, [("cuGraphLaunch", 9, 7)]),
    "close_graph": (lambda d: d.close_graph(GRAPH), None, [("cuGraphExecDestroy", 9)]),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_method_asks_cuda_for_just_that(cuda: Recorder, name: str) -> None:
    method, answer, calls = ROWS[name]
    driver = CudaDriver()
    mark = len(cuda.calls)
    assert method(driver) == answer
    assert cuda.since(mark) == [("cuCtxSetCurrent", "context"), *calls]


@pytest.mark.parametrize("name", ROWS)
def test_every_refusal_is_raised_with_the_call_the_code_and_its_words(
    cuda: Recorder, name: str
) -> None:
    method, _, calls = ROWS[name]
    driver = CudaDriver()
    cuda.codes[calls[-1][0]] = FAILED
    with pytest.raises(DeviceError) as caught:
        method(driver)
    assert str(caught.value).startswith(f"{calls[-1][0]}(")
    assert str(caught.value).endswith(
        "CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)"
    )


def test_a_graph_that_cannot_be_made_leaves_nothing_behind(cuda: Recorder) -> None:
    driver = CudaDriver()
    cuda.codes["cuGraphInstantiate"] = FAILED
    with pytest.raises(DeviceError, match="cuGraphInstantiate"):
        driver.end_capture(STREAM)
    assert cuda.calls[-1] == ("cuGraphDestroy", 6)


def test_addresses_are_said_as_such_and_a_code_without_a_name_as_a_number(cuda: Recorder) -> None:
    driver = CudaDriver()
    cuda.codes["cuMemcpyDtoDAsync"] = UNNAMED
    with pytest.raises(DeviceError, match=r"\(0x20000000000, 0x40000000000, 5, 7\): error 999$"):
        driver.copy(A, B, 5, STREAM)


def test_pinned_memory_is_the_very_memory_and_is_given_back_by_its_address(
    cuda: Recorder,
) -> None:
    driver = CudaDriver()
    memory = driver.pinned(64)
    memory[:3] = (1, 2, 3)
    assert cuda.pinned.raw[:4] == b"\x01\x02\x03\x00"
    with pytest.raises(ValueError, match="1 pieces of pinned memory are in use"):
        driver.close()
    with pytest.raises(ValueError, match="not pinned here"):
        driver.unpin(memory[:32])
    driver.unpin(memory)
    assert ("cuMemFreeHost", ctypes.addressof(cuda.pinned)) == cuda.calls[-1]
    driver.close()


def test_the_context_is_set_once_for_each_thread(cuda: Recorder) -> None:
    driver = CudaDriver()
    driver.memory()
    driver.memory()
    thread = threading.Thread(target=driver.memory)
    thread.start()
    thread.join()
    assert [call[0] for call in cuda.calls[6:]] == [
        *("cuCtxSetCurrent", "cuMemGetInfo", "cuMemGetInfo"),
        *("cuCtxSetCurrent", "cuMemGetInfo"),
    ]


def test_a_thread_that_bears_the_name_of_another_has_no_context_yet(
    cuda: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their numbers are given out again. The driver alone sees them so: a thread that had the
    number of who waits for it could not be waited for."""
    same = SimpleNamespace(**{**vars(threading), "get_ident": lambda: 7})
    monkeypatch.setattr("ltx_trt.session.cuda_driver.threading", same)
    driver = CudaDriver()
    for _ in range(2):
        thread = threading.Thread(target=driver.memory)
        thread.start()
        thread.join()
    driver.memory()
    assert [call[0] for call in cuda.calls[6:]] == ["cuCtxSetCurrent", "cuMemGetInfo"] * 3


def test_a_thread_stays_in_the_context_while_others_come_and_go(cuda: Recorder) -> None:
    driver = CudaDriver()
    driver.memory()
    thread = threading.Thread(target=driver.memory)
    thread.start()
    thread.join()
    mark = len(cuda.calls)
    driver.memory()
    assert cuda.since(mark) == [("cuMemGetInfo",)]


def test_scattered_arrays_are_refused_before_cuda_is_asked(cuda: Recorder) -> None:
    driver = CudaDriver()
    mark = len(cuda.calls)
    scattered = np.zeros((4, 4), np.float32)[:, :2]
    with pytest.raises(ValueError, match="not contiguous"):
        driver.upload(A, scattered, STREAM)
    with pytest.raises(ValueError, match="not contiguous"):
        driver.download(scattered, A, STREAM)
    assert cuda.since(mark) == []


def test_without_a_gpu_one_line_says_so(cuda: Recorder) -> None:
    cuda.codes["cuInit"] = NO_DEVICE
    with pytest.raises(UserError, match="no NVIDIA GPU here"):
        CudaDriver()


def test_a_driver_that_does_not_start_is_quoted(cuda: Recorder) -> None:
    cuda.codes["cuInit"] = FAILED
    with pytest.raises(UserError, match="does not start: CUDA_ERROR_ILLEGAL_ADDRESS"):
        CudaDriver()


def test_without_the_vendors_driver_one_line_says_so(
    cuda: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: int) -> None:
        raise RuntimeError("DynamicLibNotFoundError")

    monkeypatch.setattr(cuda, "cuInit", missing, raising=False)
    with pytest.raises(UserError, match="NVIDIA driver is not installed"):
        CudaDriver()


def test_without_cuda_python_its_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(UserError, match="pip install cuda-python"):
        CudaDriver()


def test_every_name_that_it_uses_is_cuda_pythons() -> None:
    """The recorder answers to any name; cuda-python does not."""
    driver = pytest.importorskip("cuda.bindings.driver")
    used = {call[0] for _, _, calls in ROWS.values() for call in calls}
    used |= {"cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuMemHostAlloc"}
    used |= {"cuMemFreeHost", "cuMemGetInfo", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"}
    used |= {"cuDevicePrimaryCtxRelease", "cuGetErrorName", "cuGetErrorString"}
    assert [name for name in sorted(used) if not hasattr(driver, name)] == []
    assert driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    assert driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    assert driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    assert driver.CUresult.CUDA_ERROR_NO_DEVICE
