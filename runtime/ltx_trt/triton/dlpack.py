"""bfloat16 on its way into Triton and out of it: NumPy has no such type, DLPack has.

Only memory of the CPU. The structures are those of DLPack 0.8 (dlpack.h).
"""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint16]
"""The upper halves of float32 words."""

CPU, PINNED = 1, 3
BFLOAT = 4
"""kDLBfloat."""
NAME = b"dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)

_lent: dict[int, tuple[Any, ...]] = {}
"""What a reader of our memory still has, by the address of its description."""


def _forget(address: int) -> None:
    _lent.pop(address, None)


_give_back = _Deleter(_forget)


class Lender:
    """bfloat16 words as an object that DLPack's readers take. They give them back."""

    def __init__(self, words: Words) -> None:
        self._words = np.ascontiguousarray(words)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU, 0

    def __dlpack__(self, stream: Any = None) -> Any:
        words = self._words
        shape = (ctypes.c_int64 * words.ndim)(*words.shape)
        managed = _Managed(
            _Tensor(words.ctypes.data, CPU, 0, words.ndim, BFLOAT, 16, 1, shape, None, 0),
            None,
            ctypes.cast(_give_back, ctypes.c_void_p),
        )
        _lent[address := ctypes.addressof(managed)] = (managed, shape, words)
        return _new(address, NAME, None)


def words(capsule: Any) -> Words:
    """A copy.

    Raises:
        ValueError: it is not bfloat16, not dense, or not on the CPU.
    """
    managed = _Managed.from_address(_pointer(capsule, NAME))
    found: _Tensor = managed.tensor
    if (found.code, found.bits, found.lanes) != (BFLOAT, 16, 1):
        raise ValueError(f"DLPack type {(found.code, found.bits, found.lanes)} is not bfloat16")
    if found.device not in (CPU, PINNED):
        raise ValueError(f"a tensor on DLPack device {found.device}, wanted the CPU's memory")
    shape = tuple(found.shape[: found.ndim])
    _check_dense(found, shape)
    memory = (ctypes.c_uint16 * int(np.prod(shape))).from_address(found.data + found.byte_offset)
    return np.array(np.ctypeslib.as_array(memory)).reshape(shape)


def _check_dense(found: _Tensor, shape: tuple[int, ...]) -> None:
    if not found.strides:
        return
    dense = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    if (strides := list(found.strides[: found.ndim])) != dense:
        raise ValueError(f"strides {strides} of shape {shape} are not dense")
