"""What computes a stage on the GPU: one engine and a chain of them look alike from here."""

from collections.abc import Mapping
from typing import Protocol

from ltx_trt.session.driver import Address, Stream
from ltx_trt.session.engine_api import EngineTensor, Shape


class Runner(Protocol):
    """One stage: bound to shapes and addresses, then enqueued."""

    @property
    def tensors(self) -> Mapping[str, EngineTensor]:
        """Of the whole stage, inputs and outputs."""
        ...

    @property
    def capturable(self) -> bool:
        """A CUDA graph may hold it: not while weights are streamed."""
        ...

    def bind(self, shapes: Mapping[str, Shape], addresses: Mapping[str, Address]) -> None:
        """Inputs' shapes, and an address for each input and output; reserves the arena.

        Raises:
            UserError: no profile fits; with the axis, what was asked and what each profile takes.
        """
        ...

    def enqueue(self, stream: Stream) -> None:
        """As often as wished after `bind`.

        Raises:
            DeviceError, EngineError: it was not enqueued.
        """
        ...

    def close(self) -> None: ...
