"""The decoder that goes on where it was, on TensorRT or TensorRT-RTX: what its convolutions keep of
a clip stays on the GPU.

    a clip begins   what is read as kept is filled with zeros; timestep and noises go up
    a piece         latents and place go up, the engine reads one half of what is kept and writes
                    the other, the pixels come down
    the next        the halves have changed places
"""

from collections.abc import Mapping
from math import prod
from types import TracebackType
from typing import Self

from ltx_engines.bundle import StageEntry
from ltx_engines.stages import NEXT, PAST
from ltx_trt.session import Array, Feeds, Session, check_feeds, sizes
from ltx_trt.session.closing import told
from ltx_trt.session.device import Device
from ltx_trt.session.driver import Address
from ltx_trt.session.element_types import stored
from ltx_trt.session.engine_api import Shape
from ltx_trt.session.kept_frames import shape
from ltx_trt.session.runner import Runner
from ltx_trt.session.tensorrt_session import TensorRTSession

PIECE = ("latents", "place")
"""What goes up for each piece of a clip; all else is the clip's."""


class StreamSession(TensorRTSession):
    """Implements Streaming too. Called with arrays, it is given what is kept and gives it back."""

    def __init__(self, stage: str, entry: StageEntry, device: Device, runner: Runner) -> None:
        super().__init__(stage, entry, device, runner)
        given = tuple(tensor for tensor in entry.inputs if not _is_kept(tensor.name))
        self._given = entry.model_copy(update={"inputs": given})
        self._clip: _Clip | None = None

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        self._clip = None  # what is kept goes into its memory
        return super().__call__(feeds)

    def begin(self) -> Session:
        """Whoever was at an earlier clip is not to go on with it: there is one memory."""
        self._clip = _Clip(self)
        return self._clip

    def piece(self, clip: "_Clip", feeds: Feeds, number: int) -> dict[str, Array]:
        """The pixels of the clip's piece of that number, counted from 0."""
        if clip is not self._clip:
            raise ValueError("another clip has begun on this decoder")
        runner = self._open()
        check_feeds(self._stage, self._given, feeds)
        with told(f"stage {self._stage}"):
            return self._go_on(runner, feeds, number)

    def _go_on(self, runner: Runner, feeds: Feeds, number: int) -> dict[str, Array]:
        shapes = {name: feed.shape for name, feed in feeds.items()}
        shapes |= self._kept(feeds["latents"].shape)
        made = sizes.outputs(self._entry, shapes)
        addresses = self._addresses(runner, {**shapes, **made})
        if number == 0:
            for name in shapes.keys() - feeds.keys():
                size = prod(shapes[name]) * stored(runner.tensors[name].dtype).itemsize
                self._device.driver.fill(addresses[name], 0, size, self._device.stream)
        runner.bind(shapes, _turned(addresses) if number % 2 else addresses)
        for name, feed in feeds.items():
            if number == 0 or name in PIECE:
                self._upload(runner, name, feed, addresses[name])
        runner.enqueue(self._device.stream)
        pixels = {name: shape for name, shape in made.items() if not _is_kept(name)}
        return self._downloaded(runner, pixels, addresses)

    def _kept(self, latents: Shape) -> dict[str, Shape]:
        """The shape of each tensor that is kept, for such latents."""
        batch, _, *grid = latents
        kept = (tensor for tensor in self._entry.inputs if _is_kept(tensor.name))
        return {tensor.name: shape(tensor, tuple(grid), batch) for tensor in kept}


class _Clip:
    """Implements Session, for one clip. The memory is the decoder's."""

    def __init__(self, decoder: StreamSession) -> None:
        self._decoder, self._pieces = decoder, 0

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        made = self._decoder.piece(self, feeds, self._pieces)
        self._pieces += 1
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def _is_kept(name: str) -> bool:
    return name.startswith((PAST, NEXT))


def _turned(addresses: Mapping[str, Address]) -> dict[str, Address]:
    """What was written is read, and what was read is written over."""
    return {name: addresses[_twin(name)] for name in addresses}


def _twin(name: str) -> str:
    if name.startswith(PAST):
        return name.replace(PAST, NEXT, 1)
    return name.replace(NEXT, PAST, 1) if name.startswith(NEXT) else name
