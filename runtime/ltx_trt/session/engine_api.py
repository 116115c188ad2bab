"""What the runtime asks of a deserialized engine, the same of TensorRT and of TensorRT-RTX.

`tensorrt_adapter.py` is the one file that speaks to either package; the tests answer with ONNX
Runtime on memory of their own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from ltx_engines.targets import Flavour
from ltx_trt.session.driver import Address, Stream

Shape = tuple[int, ...]


class EngineError(Exception):
    """The builder's library refused: its own words."""


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """As the engine has it: `dtype` is a NumPy name or bfloat16; a free axis is -1."""

    name: str
    dtype: str
    shape: Shape
    is_input: bool


class Context(Protocol):
    """One engine's execution with one profile. Not to be used by two streams at once."""

    def set_shape(self, name: str, shape: Shape) -> None: ...

    def memory(self) -> int:
        """Bytes of activations for the shapes that are set now."""
        ...

    def set_memory(self, address: Address, size: int) -> None:
        """The block that it may use while it runs."""
        ...

    def set_address(self, name: str, address: Address) -> None: ...

    def capturable(self, stream: Stream) -> bool:
        """A CUDA graph may hold what is enqueued there with the shapes that are set now."""
        ...

    def enqueue(self, stream: Stream) -> None:
        """
        Raises:
            EngineError: it was not enqueued; with what the library said.
        """
        ...

    def close(self) -> None: ...


class Engine(Protocol):
    @property
    def tensors(self) -> Mapping[str, EngineTensor]: ...

    @property
    def profiles(self) -> int: ...

    def limits(self, profile: int, name: str) -> tuple[Shape, Shape, Shape]:
        """The smallest, likeliest and largest shape of an input."""
        ...

    def context(self, profile: int) -> Context:
        """Without activation memory of its own."""
        ...

    @property
    def streamable(self) -> int:
        """Bytes of weights that may stay on the host; 0 if it was not built for that."""
        ...

    def set_streaming_budget(self, size: int) -> int:
        """Bytes of weights that may be on the GPU; before any context. The GPU's memory is
        taken here. Returns the scratch memory that streaming takes for itself."""
        ...

    def sleep(self) -> bool:
        """The weights leave the GPU, contexts and all that they were told stay. No work may be
        waiting. False if they cannot (TensorRT; an engine that was not loaded to swap)."""
        ...

    def wake(self) -> None:
        """The weights are on the GPU again when this returns."""
        ...

    def refittable(self) -> frozenset[str]:
        """Names of the weights that `refit` may set."""
        ...

    def refit(self, weights: Iterable[tuple[str, str, NDArray[Any]]]) -> None:
        """Name, element type and the bytes of each, all or none.

        Raises:
            EngineError: a weight is missing or of another type or size.
        """
        ...

    def layers(self) -> str:
        """The inspector's JSON."""
        ...

    def save_cache(self) -> None:
        """What was compiled on this machine goes to the cache, for the next start (RTX)."""
        ...

    def close(self) -> None: ...


class Library(Protocol):
    """TensorRT or TensorRT-RTX, loaded."""

    @property
    def flavour(self) -> Flavour: ...

    @property
    def version(self) -> str: ...

    def load(
        self,
        plan: Path,
        *,
        cache: Path | None = None,
        swaps: bool = False,
        streams: bool = False,
    ) -> Engine:
        """`plan` has been checked against its hash: a plan is code. With `swaps` its weights can
        leave the GPU and come again, where the library has means for that; with `streams` some of
        them stay on the host.

        Raises:
            EngineError: it does not fit this library or this GPU.
        """
        ...
