"""A stage on TensorRT or TensorRT-RTX, as every session: arrays go in, arrays come out."""

from collections.abc import Mapping
from math import prod
from types import TracebackType
from typing import Self

import numpy as np

from ltx_engines.bundle import StageEntry
from ltx_trt.session import Array, Feeds, check_feeds, sizes
from ltx_trt.session.closing import close_all, told
from ltx_trt.session.device import Device
from ltx_trt.session.driver import Address, Bytes
from ltx_trt.session.element_types import narrowed, stored, widened
from ltx_trt.session.engine_api import Shape
from ltx_trt.session.memory import Buffers
from ltx_trt.session.runner import Runner


class TensorRTSession:
    """Arrays pass through pinned memory, since only that is copied without a detour. The runner is
    the session's own: it is closed with it."""

    def __init__(self, stage: str, entry: StageEntry, device: Device, runner: Runner) -> None:
        self._stage, self._entry, self._device = stage, entry, device
        self._runner: Runner | None = runner
        self._buffers = Buffers(device.driver, device.stream)
        self._staging: dict[str, Bytes] = {}

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        runner = self._open()
        check_feeds(self._stage, self._entry, feeds)
        with told(f"stage {self._stage}"):
            return self._run(runner, feeds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Waits for what is at work. `error` is what it is closed because of."""
        if self._runner is None:
            return
        driver, runner, self._runner = self._device.driver, self._runner, None
        memory, self._staging = list(self._staging.values()), {}
        steps = [
            self._device.watch.look,
            lambda: driver.synchronize(self._device.stream),
            runner.close,
            self._buffers.close,
            *((lambda piece=piece: driver.unpin(piece)) for piece in memory),
        ]
        with told(f"stage {self._stage}"):
            close_all(steps, error)

    def _run(self, runner: Runner, feeds: Feeds) -> dict[str, Array]:
        shapes: dict[str, Shape] = {name: feed.shape for name, feed in feeds.items()}
        made = sizes.outputs(self._entry, shapes)
        addresses = self._addresses(runner, {**shapes, **made})
        runner.bind(shapes, addresses)
        for name, feed in feeds.items():
            self._upload(runner, name, feed, addresses[name])
        runner.enqueue(self._device.stream)
        return self._downloaded(runner, made, addresses)

    def _open(self) -> Runner:
        if self._runner is None:
            raise ValueError(f"the session of stage {self._stage} is closed")
        return self._runner

    def _addresses(self, runner: Runner, shapes: Mapping[str, Shape]) -> dict[str, Address]:
        tensors = runner.tensors
        return {
            name: self._buffers.get(name, prod(shape) * stored(tensors[name].dtype).itemsize)
            for name, shape in shapes.items()
        }

    def _upload(self, runner: Runner, name: str, feed: Array, address: Address) -> None:
        dtype = runner.tensors[name].dtype
        staged = self._staged(name, feed.shape, dtype)
        np.copyto(staged, narrowed(feed, dtype))
        self._device.driver.upload(address, staged, self._device.stream)

    def _downloaded(
        self, runner: Runner, shapes: Mapping[str, Shape], addresses: Mapping[str, Address]
    ) -> dict[str, Array]:
        """When all that was enqueued is done."""
        dtypes = {name: runner.tensors[name].dtype for name in shapes}
        results = {name: self._staged(name, shape, dtypes[name]) for name, shape in shapes.items()}
        for name, staged in results.items():
            self._device.driver.download(staged, addresses[name], self._device.stream)
        self._device.driver.synchronize(self._device.stream)
        return {name: _taken(staged, dtypes[name]) for name, staged in results.items()}

    def _staged(self, name: str, shape: Shape, dtype: str) -> Array:
        """Pinned memory as an array; of one name only one at a time."""
        kind = stored(dtype)
        size = prod(shape) * kind.itemsize
        if name in self._staging and self._staging[name].nbytes < size:
            self._device.driver.unpin(self._staging.pop(name))
        if name not in self._staging:
            self._staging[name] = self._device.driver.pinned(size)
        return self._staging[name][:size].view(kind).reshape(shape)


def _taken(staged: Array, dtype: str) -> Array:
    """A copy: the next call writes here again."""
    values = widened(staged, dtype)
    return values.copy() if values is staged else values
