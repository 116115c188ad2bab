"""The tensors of a stage's safetensors files as bytes, mapped: for engines that hold no weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ltx_engines.errors import UserError
from ltx_ref.checkpoint import CheckpointError, Header, read_header
from ltx_trt.session.driver import Bytes
from ltx_trt.session.engine_api import EngineTensor

STORED: Mapping[str, str] = MappingProxyType(
    {
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8e4m3fn",
        "I8": "int8",
    }
)
"""What an engine calls the types of such files."""


class CheckpointWeights:
    """By the tensors' names. The files must stay as they are."""

    def __init__(self, files: Iterable[Path]) -> None:
        """
        Raises:
            UserError: one is no safetensors file.
        """
        self._found: dict[str, tuple[Header, Bytes]] = {}
        for file in files:
            header = _read(file)
            mapped = np.memmap(file, np.uint8, mode="r")
            self._found |= dict.fromkeys(header.tensors, (header, mapped))

    def check(self, name: str, tensor: EngineTensor) -> None:
        """
        Raises:
            UserError: there is no such tensor, or it does not fit the engine's input.
        """
        if name not in self._found:
            raise UserError(
                f"the engine takes {name}, which the checkpoint has not; build it for this one "
                "(ltx-export build-engine --engine-weights inputs)"
            )
        header, _ = self._found[name]
        info = header.tensors[name]
        if (dtype := STORED.get(info.dtype)) != tensor.dtype or info.shape != tensor.shape:
            raise UserError(
                f"{header.path}: {name} is {dtype or info.dtype} {list(info.shape)}, the engine "
                f"takes {tensor.dtype} {list(tensor.shape)}; build it for this checkpoint "
                "(ltx-export build-engine --engine-weights inputs)"
            )

    def __call__(self, name: str) -> Bytes:
        header, mapped = self._found[name]
        info = header.tensors[name]
        return mapped[info.begin : info.end]


def _read(file: Path) -> Header:
    try:
        return read_header(file)
    except (CheckpointError, OSError) as error:
        raise UserError(str(error)) from error
