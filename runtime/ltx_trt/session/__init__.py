"""One stage, ready to run: the seam behind which ONNX Runtime, TensorRT and a test look alike."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ltx_engines import stages
from ltx_engines.bundle import StageEntry, tensors

Array = NDArray[Any]
Feeds = Mapping[str, Array]

FLOATS = ("float32", "float16", "bfloat16")


class Session(Protocol):
    """Holds the weights of one stage from `with` to its end. Floats go in and out in float32."""

    def __call__(self, feeds: Feeds) -> dict[str, Array]: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


Opened = AbstractContextManager[Session]
"""A session from `with` to its end, which need not be the session's own."""

OpenSession = Callable[[str], Opened]
"""By the stage's name."""


def check_feeds(stage: str, entry: StageEntry, feeds: Feeds) -> None:
    """Refuse feeds that break the manifest's table, before an engine does so in its own words.

    Raises:
        ValueError: names, shapes or element types differ.
    """
    inputs = tensors(entry.inputs)
    stages.check_feeds(stage, inputs, {name: feed.shape for name, feed in feeds.items()})
    for tensor in inputs:
        wanted = "float32" if tensor.dtype in FLOATS else tensor.dtype
        if (found := feeds[tensor.name].dtype) != np.dtype(wanted):
            raise ValueError(f"{stage}: {tensor.name} is {found}, wanted {wanted}")
