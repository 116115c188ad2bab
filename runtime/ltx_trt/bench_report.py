"""What a bench measured: a table for people, and one line of JSON for scripts."""

import json
import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ltx_engines.byte_sizes import said
from ltx_trt.bench import Measured, Opened, Order

if TYPE_CHECKING:
    from rich.table import Table


def table(one: Measured) -> "Table":
    from rich.table import Table

    found = Table(title=str(one.case), title_justify="left", caption=_memory(one))
    for column in ("ms", "median", "p90", "worst", "of"):
        found.add_column(column, justify="left" if column == "ms" else "right")
    for name, timing in one.seconds.items():
        numbers = (timing.median, timing.p90, timing.worst)
        found.add_row(name, *(f"{1e3 * seconds:.2f}" for seconds in numbers), str(timing.runs))
    return found


def as_json(order: Order, opened: Opened, measured: Sequence[Measured]) -> str:
    return json.dumps(
        {
            "bundle": str(order.bundle),
            "runs_on": opened.runs_on,
            "memory": order.choice.memory.value,
            "runs": order.runs,
            "warmup": order.warmup,
            "machine": f"{platform.platform()}, {os.cpu_count()} CPUs",
            "open": round(opened.seconds, 6),
            "cases": [one.document() for one in measured],
        }
    )


def _memory(one: Measured) -> str:
    """Peaks, of those that are known."""
    words = {
        "host": one.host_memory,
        "its own": one.host_anonymous,
        "GPU": one.device_memory,
    }
    return ", ".join(f"{word} {said(size)}" for word, size in words.items() if size is not None)
