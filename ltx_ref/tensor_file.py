"""Tensors of a safetensors file, read one at a time into memory of their own.

A mapped file's pages count as the process's memory while nobody else wants them, and stay; what is
read here is gone as soon as it is dropped.
"""

from collections.abc import Iterator
from threading import Lock
from types import MappingProxyType, TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from ltx_ref.checkpoint import CheckpointError, Header

DTYPES = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
        "BOOL": torch.bool,
    }
)


PIECE = 1 << 22
"""Bytes."""


class TensorFile:
    """Two threads may read from one."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._file = header.path.open("rb", buffering=0)
        self._lock = Lock()

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """
        Raises:
            CheckpointError: the file has become shorter.
        """
        info = self.header.tensors[name]
        tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype], device="cpu")
        self._fill(tensor.reshape(-1).view(torch.uint8).numpy().data, info.begin)
        return tensor.to(device)

    def rows(self, name: str, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """The rows of a matrix, in order, some at a time: at most PIECE bytes, or one row.

        Raises:
            CheckpointError: the file has become shorter.
        """
        info = self.header.tensors[name]
        count, columns = info.shape
        width = max(1, (info.end - info.begin) // max(1, count))
        step = max(1, PIECE // width)
        for begin in range(0, count, step):
            shape = min(step, count - begin), columns
            piece = torch.empty(shape, dtype=DTYPES[info.dtype], device="cpu")
            self._fill(piece.view(-1).view(torch.uint8).numpy().data, info.begin + begin * width)
            yield piece.to(device)

    def _fill(self, rest: memoryview, begin: int) -> None:
        with self._lock:
            self._file.seek(begin)
            while rest:
                if not (count := self._file.readinto(rest)):
                    raise CheckpointError(
                        f"{self.header.path} became shorter while it was read; start again"
                    )
                rest = rest[count:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """In the place of the parameter or buffer of that name. `load_state_dict` wants them all."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    elif own in module._buffers:
        module._buffers[own] = tensor
    else:
        raise KeyError(name)
