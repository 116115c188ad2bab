"""The ladder for people, as a table and what follows from it, and for programs, as JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ltx_export import derive
from ltx_export.ladder import Culprit, Report, Row
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX

UNFOLDED = 120
"""Columns that the table needs where no terminal says how many there are."""


def console() -> Console:
    """For stdout."""
    own = Console()
    return own if own.is_terminal else Console(width=max(own.width, UNFOLDED))


def show(report: Report, console: Console) -> None:
    for line in _head(report):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(_table(report))
    for line in _tail(report):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _head(report: Report) -> Iterator[str]:
    facts = report.facts
    steps = len(facts["sigmas"]) - 1
    yield f"{facts['checkpoint']}: {facts['shape']}, {steps} steps, seed {facts['seed']}"
    if report.coverage is not None:
        yield report.coverage


def _table(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("rung", no_wrap=True)
    table.add_column("against", no_wrap=True)
    table.add_column("output", no_wrap=True)
    for name in ("relative L2", "bound", "cosine", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in report.rows:
        table.add_row(
            row.rung,
            row.against,
            row.output,
            f"{row.distance:.2e}",
            f"{row.bound.limit:.2e}",
            f"{row.cosine:.6f}",
            f"{row.largest:.2e}",
            "ok" if row.passed else "BEYOND",
        )
    return table


def _tail(report: Report) -> Iterator[str]:
    for row in report.rows:
        if row.place is not None:
            place = row.place.removeprefix(TRANSFORMER_PREFIX)
            yield f"worst {row.output} of {row.rung}: {place}, {row.distance:.2e}"
    for skipped in report.skipped:
        yield f"{skipped.rung} skipped: {skipped.why}"
    if (broken := report.broken) is None:
        yield "every rung is within its bounds"
        return
    yield f"the first rung that breaks is {broken.rung}: {verdict(broken)}"
    yield f"the bound: {broken.bound.why}"
    if report.culprit is None and broken.rung == "engine":
        yield f"which part does so: ltx-export debug-layers {report.facts['bundle']}"
    elif report.culprit is None:
        yield "no part of it does so by itself"
    else:
        yield f"the worst part is {culprit(report.culprit)}"


def verdict(row: Row) -> str:
    if row.distance > row.bound.limit:
        return (
            f"{row.output} {row.distance:.3g} from {row.against}, more than {row.bound.limit:.3g}"
        )
    return f"{row.output} with NaN or infinity"


def culprit(found: Culprit) -> str:
    parts = [f"{found.place}: {found.after:.3g} with it"]
    if found.before is not None:
        parts.append(f"{found.before:.3g} without it")
    if found.alone is not None:
        parts.append(f"{found.alone:.3g} by it alone")
    return ", ".join(parts)


def document(report: Report) -> dict[str, Any]:
    broken = report.broken
    return {
        **report.facts,
        "passed": broken is None,
        "coverage": report.coverage,
        "rungs": [{**asdict(row), "passed": row.passed} for row in report.rows],
        "skipped": {skipped.rung: skipped.why for skipped in report.skipped},
        "first_broken": None if broken is None else f"{broken.rung}.{broken.output}",
        "culprit": None if report.culprit is None else asdict(report.culprit),
    }


def save(report: Report, path: Path) -> None:
    """It appears when it is complete."""
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    text = json.dumps(document(report), indent=2) + "\n"
    with derive.told(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
