"""What a client of the video model hears: progress, the clip, or one line why there is none."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from ltx_trt.media import Frames


class Status(StrEnum):
    """Of a request that ends without a clip, by the names that gRPC has for it."""

    invalid = "INVALID_ARG"
    unavailable = "UNAVAILABLE"
    internal = "INTERNAL"
    cancelled = "CANCELLED"


class Refused(Exception):  # noqa: N818 - as gRPC has it: a request ends so, nothing broke
    """A request ends here, with one line for its client."""

    def __init__(self, status: Status, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line


@dataclass(frozen=True, slots=True)
class Response:
    """`event` is told in JSON. The last one has the `video`, or the `frames`."""

    event: dict[str, Any]
    video: bytes | None = None
    frames: Frames | None = None


class Client(Protocol):
    """Whoever asked: gets responses, and may have gone."""

    def send(self, response: Response) -> None: ...

    def gone(self) -> bool: ...
