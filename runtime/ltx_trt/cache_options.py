"""The options of step caching, and what was said with them. Light: the command line reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

CacheSteps = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD[:THRESHOLD]",
        help="magcache, easycache or teacache: steps that are like the one before reuse it.",
    ),
]
CacheTableFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Of calibrate-cache, for magcache and teacache; else the bundle's step_cache.json.",
    ),
]
CacheFirst = Annotated[
    int | None, typer.Option(min=0, help="Steps at the beginning that are always computed.")
]
CacheLast = Annotated[
    int | None, typer.Option(min=0, help="Steps at the end that are always computed; else 1.")
]
CacheRetention = Annotated[
    float | None, typer.Option(help="magcache: the same as a share of all steps; else 0.2.")
]
CacheLongest = Annotated[
    int | None, typer.Option(min=1, help="magcache: steps in a row that may reuse (K); else 3.")
]
Compare = Annotated[
    bool,
    typer.Option("--compare", help="Make the clip without caching too: speed-up, PSNR, SSIM."),
]


@dataclass(frozen=True, slots=True)
class CacheWishes:
    """The command line's part; None leaves the choice to the method."""

    steps: str | None = None
    table: Path | None = None
    first: int | None = None
    last: int | None = None
    retention: float | None = None
    longest: int | None = None
    compare: bool = False

    def idle(self) -> str:
        """An option that does nothing without `--cache-steps`, or an empty string."""
        said = {
            "--cache-table": self.table,
            "--cache-first": self.first,
            "--cache-last": self.last,
            "--cache-retention": self.retention,
            "--cache-longest": self.longest,
            "--compare": self.compare or None,
        }
        return next((option for option, value in said.items() if value is not None), "")
