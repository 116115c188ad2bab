"""The rows of a benchmark as a person reads them, and the whole as a script does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from child import ChildError

Facts = dict[str, Any]


def ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """How many times as much the peer takes; nothing where one of the two failed."""
    if "failed" in ours or "failed" in theirs:
        return {}
    return {
        key: round(theirs[key] / ours[key], 1)
        for key in ("wall_s", "cpu_s", "peak_rss", "peak_anon", "new_bytes")
    }


def attempt(what: str, work: Callable[[], Facts]) -> Facts:
    """A failed row is said and does not end the others."""
    try:
        result = work()
    except ChildError as error:
        result = {"failed": str(error)}
    print(f"{what:<32}{summary(result)}", flush=True)
    return result


def summary(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return str(row["failed"])
    text = f"{row['wall_s']:8.1f} s {row['peak_rss'] / 1e6:8.0f} MB peak"
    if "new_bytes" in row:
        text += f" {row['new_bytes'] / 1e6:9.2f} MB written"
    if "weights" in row:
        text += f"  {row['weights_by_name']:>4} of {row['weights']} names"
    if "nodes" in row:
        text += f"  {row['nodes']} nodes, {row['nodes_per_block'] or '-'} a block"
        text += f"; checker {row['checker']}"
    if "ready_s" in row:
        text += f"  session ready in {row['ready_s']:.2f} s"
    return text


def machine() -> Facts:
    model = next(
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    return {"cpu": model, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
