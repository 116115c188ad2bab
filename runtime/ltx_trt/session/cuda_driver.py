"""The first visible NVIDIA GPU, by way of cuda-python: the one file that speaks to CUDA.

It uses the primary context, which is also the one that TensorRT works in.
"""

import ctypes
import threading
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_trt.session.driver import Address, Bytes, DeviceError, Event, Graph, Stream


class CudaDriver:
    """Implements Driver."""

    def __init__(self) -> None:
        """
        Raises:
            UserError: cuda-python, the vendor's driver or a GPU is missing.
        """
        self._cuda = cuda = _module()
        _start(cuda)
        self._device = self._ask("cuDeviceGet", 0)
        self.name = _text(self._ask("cuDeviceGetName", 256, self._device))
        self.capability = 10 * self._attribute(f"{CAPABILITY}_MAJOR") + self._attribute(
            f"{CAPABILITY}_MINOR"
        )
        self._context = self._ask("cuDevicePrimaryCtxRetain", self._device)
        self._entered = threading.local()
        self._pinned: dict[int, int] = {}

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return free, total

    def allocate(self, size: int) -> Address:
        return Address(int(self._call("cuMemAlloc", size)))

    def free(self, address: Address) -> None:
        self._call("cuMemFree", int(address))

    def pinned(self, size: int) -> Bytes:
        address = int(self._call("cuMemHostAlloc", size, 0))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        self._pinned[address] = size
        return memory

    def unpin(self, memory: Bytes) -> None:
        """
        Raises:
            ValueError: it is not what `pinned` returned.
        """
        address = memory.ctypes.data
        if self._pinned.get(address) != memory.nbytes:
            raise ValueError(f"{memory.nbytes} bytes that were not pinned here")
        self._call("cuMemFreeHost", address)
        del self._pinned[address]

    def stream(self) -> Stream:
        flags = int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return Stream(int(self._call("cuStreamCreate", flags)))

    def close_stream(self, stream: Stream) -> None:
        self._call("cuStreamDestroy", int(stream))

    def synchronize(self, stream: Stream) -> None:
        self._call("cuStreamSynchronize", int(stream))

    def upload(self, target: Address, source: NDArray[Any], stream: Stream) -> None:
        _check_contiguous(source)
        self._call("cuMemcpyHtoDAsync", int(target), source.ctypes.data, source.nbytes, int(stream))

    def download(self, target: NDArray[Any], source: Address, stream: Stream) -> None:
        _check_contiguous(target)
        self._call("cuMemcpyDtoHAsync", target.ctypes.data, int(source), target.nbytes, int(stream))

    def copy(self, target: Address, source: Address, size: int, stream: Stream) -> None:
        self._call("cuMemcpyDtoDAsync", int(target), int(source), size, int(stream))

    def fill(self, target: Address, byte: int, size: int, stream: Stream) -> None:
        self._call("cuMemsetD8Async", int(target), byte, size, int(stream))

    def event(self) -> Event:
        return Event(int(self._call("cuEventCreate", 0)))

    def close_event(self, event: Event) -> None:
        self._call("cuEventDestroy", int(event))

    def record(self, event: Event, stream: Stream) -> None:
        self._call("cuEventRecord", int(event), int(stream))

    def wait(self, stream: Stream, event: Event) -> None:
        self._call("cuStreamWaitEvent", int(stream), int(event), 0)

    def synchronize_event(self, event: Event) -> None:
        self._call("cuEventSynchronize", int(event))

    def elapsed(self, begin: Event, end: Event) -> float:
        milliseconds = self._call("cuEventElapsedTime", int(begin), int(end))
        return float(milliseconds) / 1000

    def begin_capture(self, stream: Stream) -> None:
        # Other threads may allocate meanwhile; this one may not.
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", int(stream), mode)

    def end_capture(self, stream: Stream) -> Graph:
        """What launches it is kept, what describes it is not."""
        graph = int(self._call("cuStreamEndCapture", int(stream)))
        try:
            return Graph(int(self._call("cuGraphInstantiate", graph, 0)))
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: Graph, stream: Stream) -> None:
        self._call("cuGraphLaunch", int(graph), int(stream))

    def close_graph(self, graph: Graph) -> None:
        self._call("cuGraphExecDestroy", int(graph))

    def close(self) -> None:
        """
        Raises:
            ValueError: pinned memory was not given back.
        """
        if self._pinned:
            raise ValueError(f"{len(self._pinned)} pieces of pinned memory are in use")
        self._ask("cuDevicePrimaryCtxRelease", self._device)

    def _attribute(self, name: str) -> int:
        which = getattr(self._cuda.CUdevice_attribute, name)
        return int(self._ask("cuDeviceGetAttribute", which, self._device))

    def _call(self, name: str, *arguments: Any) -> Any:
        """In the primary context, which CUDA keeps for each thread."""
        if not hasattr(self._entered, "context"):
            self._ask("cuCtxSetCurrent", self._context)
            self._entered.context = self._context
        return self._ask(name, *arguments)

    def _ask(self, name: str, *arguments: Any) -> Any:
        """What a call returns beside its code: nothing, one thing, or a tuple."""
        code, *results = getattr(self._cuda, name)(*arguments)
        if code != self._cuda.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"{name}{_said(arguments)}: {_words(self._cuda, code)}")
        return results[0] if len(results) == 1 else tuple(results)


CAPABILITY = "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY"


def _module() -> Any:
    try:
        return import_module("cuda.bindings.driver")
    except ImportError:
        raise UserError(
            "cuda-python is not installed, which engines need; pip install cuda-python"
        ) from None


def _start(cuda: Any) -> None:
    try:
        (code,) = cuda.cuInit(0)
    except (RuntimeError, OSError):  # cuda-python looks for the library at the first call
        raise UserError(
            "the NVIDIA driver is not installed (libcuda.so.1 was not found); install it"
        ) from None
    results = cuda.CUresult
    if code == results.CUDA_ERROR_NO_DEVICE:
        raise UserError(
            "there is no NVIDIA GPU here that may be used; look at CUDA_VISIBLE_DEVICES"
        )
    if code != results.CUDA_SUCCESS:
        raise UserError(f"the NVIDIA driver does not start: {_words(cuda, code)}; repair it")


def _words(cuda: Any, code: Any) -> str:
    """CUDA_ERROR_OUT_OF_MEMORY (out of memory)."""
    (_, name), (_, words) = cuda.cuGetErrorName(code), cuda.cuGetErrorString(code)
    return f"{_text(name)} ({_text(words)})" if name else f"error {int(code)}"


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode(errors="replace")


def _said(arguments: tuple[Any, ...]) -> str:
    """Sizes as they are; what is larger than any of them is an address or a handle."""
    numbers = (f"{a:#x}" if isinstance(a, int) and a > 2**40 else str(a) for a in arguments)
    return f"({', '.join(numbers)})"


def _check_contiguous(array: NDArray[Any]) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} that is not contiguous")
