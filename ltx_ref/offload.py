"""Run a model whose blocks do not fit: each is read from its file when its turn comes."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx_ref.checkpoint import CheckpointError, difference, read_header
from ltx_ref.quantized import BLOCKS
from ltx_ref.tensor_file import TensorFile, put

Weights = dict[str, Tensor]


@contextmanager
def offloaded(
    model: nn.Module, path: Path, device: torch.device | str = "cpu", *, ahead: bool = True
) -> Iterator[None]:
    """Within it the transformer runs on the device and holds one block's weights: those of the
    block that runs, and with `ahead` those of the next, which a thread reads meanwhile.

    The model, best a skeleton on the meta device, is named as the file is. What lies outside the
    transformer is left alone. Afterwards the transformer is on the meta device.

    Raises:
        CheckpointError: the file's tensors are not the transformer's.
    """
    home = _home(model)
    header = read_header(path)
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items() if n.startswith(home)}
    found = {name: shape for name, shape in header.shapes().items() if name.startswith(home)}
    if wrong := difference(found, wanted):
        raise CheckpointError(f"{path} does not fit the model: {wrong}")
    _drop(model, list(wanted))
    blocks = list(model.get_submodule(f"{home}{BLOCKS}").children())
    within = [_within(f"{home}{BLOCKS}.{index}.", wanted) for index in range(len(blocks))]
    with ExitStack() as stack:
        stack.callback(_drop, model, list(wanted))
        file = stack.enter_context(TensorFile(header))
        thread = stack.enter_context(ThreadPoolExecutor(1, "next-block"))
        reader = _Reader(model, within, file, torch.device(device), thread if ahead else None)
        stack.callback(reader.forget)
        for name in wanted.keys() - {name for names in within for name in names}:
            put(model, name, file.read(name, device))
        for index, block in enumerate(blocks):
            before = block.register_forward_pre_hook(partial(_fill, reader, index))
            after = block.register_forward_hook(partial(_empty, reader, index), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


class _Reader:
    """The weights of the blocks, `within` which they are by name."""

    def __init__(
        self,
        model: nn.Module,
        within: list[list[str]],
        file: TensorFile,
        device: torch.device,
        thread: ThreadPoolExecutor | None,
    ) -> None:
        self.model, self.within, self.file = model, within, file
        self.device, self.thread = device, thread
        self._next: tuple[int, Future[Weights]] | None = None

    def fill(self, index: int) -> None:
        following, self._next = self._next, None
        if following is not None and following[0] == index:
            weights = following[1].result()
        else:
            weights = self._read(index)
        if self.thread is not None:
            wanted = (index + 1) % len(self.within)
            self._next = wanted, self.thread.submit(self._read, wanted)
        for name, tensor in weights.items():
            put(self.model, name, tensor.to(self.device))

    def empty(self, index: int) -> None:
        _drop(self.model, self.within[index])

    def forget(self) -> None:
        self._next = None

    def _read(self, index: int) -> Weights:
        """Into the host's memory: what is on the device is the block that runs, alone."""
        return {name: self.file.read(name) for name in self.within[index]}


def _fill(reader: _Reader, index: int, *_: Any) -> None:
    reader.fill(index)


def _empty(reader: _Reader, index: int, *_: Any) -> None:
    reader.empty(index)


def _home(model: nn.Module) -> str:
    """What the names of the transformer's tensors begin with."""
    found = [path for path, _ in model.named_modules() if path.split(".")[-1] == BLOCKS]
    if len(found) != 1:
        raise ValueError(f"a model with {len(found)} modules {BLOCKS}, wanted one")
    home: str = found[0].removesuffix(BLOCKS)
    return home


def _within(prefix: str, names: dict[str, tuple[int, ...]]) -> list[str]:
    return [name for name in names if name.startswith(prefix)]


def _drop(model: nn.Module, names: list[str]) -> None:
    for name in names:
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = {**module._parameters, **module._buffers}[own]
        if tensor is None:
            raise AssertionError(f"{name} is no tensor of the model")
        put(model, name, torch.empty_like(tensor, device="meta"))
