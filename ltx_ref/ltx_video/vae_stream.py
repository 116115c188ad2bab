"""Frames before and after those at hand: what a decoder's convolutions read in time.

Of a whole clip the edge frames repeat. Of a clip that comes a few frames at a time, each
convolution keeps the last two frames that it saw and is a frame late, since it reads one that is
yet to come; so memory does not grow with the clip, and no frame is computed twice. Both give the
same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

KEPT = 2
"""Frames that a convolution of three keeps."""


class Past(NamedTuple):
    """What a decoder that goes on is told of the clip so far."""

    first: Tensor
    """int64, the first of the latent frames that it is given now."""

    total: Tensor
    """int64, the clip's latent frames."""

    frames: Sequence[Tensor]
    """One for each of `states(config)`, B channels 2 H W of its level; zeros at first."""


class Frames(Protocol):
    """B C F H W everywhere. Called in the order of the decoder's convolutions."""

    def joined(self, x: Tensor) -> Tensor:
        """After the frames that were kept here."""
        ...

    def padded(self, joined: Tensor) -> Tensor:
        """As a convolution of three frames reads it: two more than come out."""
        ...

    def beside(self, joined: Tensor, convolutions: int, /) -> Tensor:
        """Those frames that so many convolutions make of it."""
        ...

    def untwinned(self, x: Tensor) -> Tensor:
        """Of frames that were doubled in number: the clip's first stands alone."""
        ...

    def doubled(self) -> None:
        """From here on there are twice as many."""
        ...


@dataclass(frozen=True, slots=True)
class WholeClip:
    """Implements Frames. Causal: both repeated frames are in front, else one on each side."""

    causal: bool

    def joined(self, x: Tensor) -> Tensor:
        return x

    def padded(self, joined: Tensor) -> Tensor:
        first, last = joined[:, :, :1], joined[:, :, -1:]
        return torch.cat([first, first, joined] if self.causal else [first, joined, last], dim=2)

    def beside(self, joined: Tensor, _convolutions: int, /) -> Tensor:
        return joined

    def untwinned(self, x: Tensor) -> Tensor:
        return x[:, :, 1:]

    def doubled(self) -> None:
        pass


class Stream:
    """Implements Frames. Frames have numbers; those that are not of the clip are computed too, and
    read by nobody: whoever would read them reads the clip's first or last frame."""

    def __init__(self, causal: bool, past: Past) -> None:
        self._late = 0 if causal else 1
        self._start, self._last = past.first, past.total - 1
        self._past, self._left = iter(past.frames), list[Tensor]()

    def joined(self, x: Tensor) -> Tensor:
        joined = torch.cat([next(self._past), x], dim=2)
        self._left.append(joined[:, :, -KEPT:])
        return joined

    def padded(self, joined: Tensor) -> Tensor:
        count, before = joined.shape[2], self._start - KEPT
        number = torch.arange(count, device=joined.device) + before
        number = torch.minimum(number.clamp(min=0), self._last)
        self._start = self._start - self._late
        return joined.index_select(2, (number - before).clamp(0, count - 1))

    def beside(self, joined: Tensor, convolutions: int, /) -> Tensor:
        begin = KEPT - self._late * convolutions
        return joined[:, :, begin : begin + joined.shape[2] - KEPT]

    def untwinned(self, x: Tensor) -> Tensor:
        return x

    def doubled(self) -> None:
        """The first frame's twin is the frame before the clip."""
        self._start, self._last = 2 * self._start - 1, 2 * self._last

    def left(self) -> tuple[Tensor, ...]:
        """What the next ones are given as `past`."""
        return tuple(self._left)
