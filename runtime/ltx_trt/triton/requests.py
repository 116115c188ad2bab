"""What a client sends becomes an order, and what goes wrong becomes one line for this client.

A line for a client never names a file of the server: whose fault it is decides what it says. The
whole story goes to the server's log.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltx_engines.bundle import Bundle
from ltx_engines.errors import UserError, nearest
from ltx_engines.triton_model import FORMATS, INPUTS
from ltx_engines.triton_settings import Settings
from ltx_trt import SEED, media
from ltx_trt.pipeline import Planned, choose_shape, plan
from ltx_trt.request import Request, Wishes, resolve
from ltx_trt.triton.responses import Refused, Status

Array = NDArray[Any]

TEXTS = tuple(wire.name for wire in INPUTS if wire.dtype == "BYTES")

PATH = re.compile(r"(?<![\w.<])(?:[A-Za-z]:\\|~?/(?=\w))[^\s,;:'\")]*")
"""What may be one: absolute, after a blank or a quote."""


@dataclass(frozen=True, slots=True)
class Order:
    """One request, checked."""

    request: Request
    planned: Planned
    notes: tuple[str, ...]
    form: str


def read(
    inputs: Mapping[str, Array],
    parameters: Iterable[str],
    bundle: Bundle,
    settings: Settings,
) -> Order:
    """
    Raises:
        Refused: the client can mend it.
    """
    known = [wire.name for wire in INPUTS]
    for name in (*parameters, *inputs):
        if name not in known:
            raise Refused(
                Status.invalid,
                f"unknown parameter {name!r}, inputs are {', '.join(known)}{nearest(name, known)}",
            )
    try:
        return _order(
            {name: _value(name, array) for name, array in inputs.items()}, bundle, settings
        )
    except UserError as error:
        raise Refused(Status.invalid, without_paths(error)) from error


def without_paths(error: BaseException) -> str:
    """One line of an error that was meant for whoever runs the server."""
    return PATH.sub("<path>", " ".join(str(error).split()))


def _value(name: str, array: Array) -> Any:
    """The one value of an input. Singles become the decimal that they were before, 29.97 and not
    29.969999, as on the command line."""
    if array.size != 1:
        raise UserError(f"{name} must be one value, not {array.size}")
    value = array.reshape(-1)[0]
    if name not in TEXTS:
        return float(str(value)) if isinstance(value, np.floating) else int(value)
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: byte {error.start} is not; send text") from None


def _order(values: dict[str, Any], bundle: Bundle, settings: Settings) -> Order:
    if "prompt" not in values:
        raise UserError("there is no prompt; say what the clip shows")
    form = values.pop("format", FORMATS[0])
    if form not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"unknown format {form!r}, known are {known}{nearest(form, FORMATS)}")
    wishes = Wishes(**{"seed": SEED, **values})
    request, notes = resolve(wishes, bundle)
    _check_size(request, settings)
    if form == "mp4":
        media.check_even(request.height, request.width)
    planned = plan(request, bundle.manifest)
    return Order(request, planned, (*notes, *planned.notes), form)


def _check_size(request: Request, settings: Settings) -> None:
    """Before anything of that size is made."""
    steps = [request.steps, *([] if request.second is None else [request.second.steps])]
    if (count := sum(one.count for one in steps)) > settings.most_steps:
        raise UserError(f"{count} steps; this server makes at most {settings.most_steps}")
    shape = choose_shape(request)
    if (pixels := shape.frames * shape.height * shape.width) > settings.most_pixels:
        raise UserError(
            f"{shape.frames} frames of {shape.width} x {shape.height} are {pixels} pixels; this "
            f"server makes at most {settings.most_pixels}; ask for fewer frames or smaller ones"
        )
