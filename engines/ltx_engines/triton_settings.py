"""What a repository's writer tells the model that serves it: the parameters of its configuration.

Parameters are words to Triton; here they are values, read strictly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from ltx_engines.errors import UserError, nearest

Layout = Literal["single", "stages"]

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
"""The whole pipeline in one model, or a model for each stage that it calls."""

Batching = Literal["exact", "any", "none"]

BATCHINGS: tuple[Batching, ...] = get_args(Batching)
"""Steps of several requests are computed together where no bit of a clip depends on it, wherever
their shapes are equal, or never."""

IDLE = "none"
"""How a parameter says that nothing is set."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`bundle` is a path from the model's version folder; `at_once` are the requests that are
    computed together, the others wait in Triton's queue; `batch_delay` is in seconds, how long a
    step waits for the same step of others, if there are others; `most_pixels` is of a clip, frames
    and all; `threads` are of one operator on the CPU."""

    layout: Layout = "single"
    bundle: str = "bundle"
    at_once: int = 4
    batching: Batching = "exact"
    batch_delay: float = 0.005
    most_pixels: int = 1216 * 704 * 257
    most_steps: int = 200
    backend: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, not {self.layout!r}")
        if self.batching not in BATCHINGS:
            known = ", ".join(BATCHINGS)
            raise UserError(f"batching must be one of {known}, not {self.batching!r}")
        for name in ("at_once", "most_pixels", "most_steps", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.batch_delay <= 1:
            raise UserError(f"batch_delay must be from 0 to 1 second, not {self.batch_delay:g}")

    def with_bundle(self, bundle: str) -> "Settings":
        return replace(self, bundle=bundle)

    def parameters(self) -> dict[str, str]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: IDLE if value is None else str(value) for name, value in values.items()}


READERS: dict[str, Any] = {
    "layout": str,
    "bundle": str,
    "at_once": int,
    "batching": str,
    "batch_delay": float,
    "most_pixels": int,
    "most_steps": int,
    "backend": str,
    "threads": lambda word: None if word == IDLE else int(word),
}


def read(parameters: Mapping[str, str]) -> Settings:
    """
    Raises:
        UserError: one of them is unknown, or its value is not of its kind.
    """
    values = {}
    for name, word in parameters.items():
        if name not in READERS:
            raise UserError(f"unknown parameter {name!r} of the model{nearest(name, READERS)}")
        try:
            values[name] = READERS[name](word)
        except ValueError:
            raise UserError(f"parameter {name} of the model is {word!r}, not a number") from None
    return Settings(**values)
