"""The GPU at hand, as its driver describes it; nothing but the driver's own library is loaded."""

import ctypes
from dataclasses import dataclass
from typing import Any

MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*."""

NAME_BYTES = 256


@dataclass(frozen=True, slots=True)
class Card:
    """`capability` is 89 for SM89, `free` are bytes of memory that nobody uses now."""

    name: str
    capability: int
    free: int


def at_hand() -> Card | None:
    """The first visible GPU; None if there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    numbers = ctypes.c_int(), ctypes.c_int()
    for number, attribute in zip(numbers, (MAJOR, MINOR), strict=True):
        if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    name = ctypes.create_string_buffer(NAME_BYTES)
    if cuda.cuDeviceGetName(name, NAME_BYTES, device):
        return None
    if (free := _free(cuda, device)) is None:
        return None
    capability = 10 * numbers[0].value + numbers[1].value
    return Card(name.value.decode(errors="replace"), capability, free)


def _free(cuda: Any, device: ctypes.c_int) -> int | None:
    """A driver tells it in a context only; the primary one is what a builder makes anyway."""
    context = ctypes.c_void_p()
    if cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        if cuda.cuCtxPushCurrent_v2(context):
            return None
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        failed = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
        return None if failed else free.value
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(device)
