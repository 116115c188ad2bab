"""A plan for people, as two tables, and for programs, as one JSON document."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ltx_engines.targets import GIGA, TERA
from ltx_export.fitting import ARENA, RESERVED, Tiling, Verdict, needs
from ltx_export.graph_costs import INT32_MAX
from ltx_export.plan import Plan
from ltx_export.stage_plan import StagePlan

STAGED_NOTE = "one stage after another, each freed before the next"

WIDTH = 140
"""Columns that the tables need; a narrower terminal folds them, which keeps every number."""


def console() -> Console:
    """For stdout, wide enough."""
    return Console(width=max(Console().width, WIDTH))


def show(plan: Plan, console: Console) -> None:
    """Print it: tables with rules on a terminal, plain columns elsewhere."""
    order, shape = plan.order, plan.shape
    console.print(
        f"{shape.width}x{shape.height}x{shape.frames}: {shape.tokens:,} tokens, {order.steps} "
        f"steps of {order.branches} branch{'es' if order.branches > 1 else ''}",
        highlight=False,
    )
    for table in (_stages(plan, console), _gpus(plan, console)):
        console.print(table)
    for verdict in plan.verdicts:
        console.print(_sentence(verdict), highlight=False, soft_wrap=True)
    console.print(
        "Seconds are a bound from the GPU's rates, not a promise; loading engines is not in them.",
        highlight=False,
        soft_wrap=True,
    )


def _table(title: str, columns: Mapping[str, bool], console: Console) -> Table:
    """Columns by name; True for numbers, which stand to the right."""
    box = SIMPLE_HEAD if console.is_terminal else None
    table = Table(title=title, title_justify="left", box=box, pad_edge=False)
    for name, right in columns.items():
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    return table


def _stages(plan: Plan, console: Console) -> Table:
    names = ("parameters", "disk", "export", "build", "engine", "activations", "in/out")
    columns = {"stage": False, "precision": False} | dict.fromkeys(names, True)
    columns |= {"TFLOP/call": True, "TFLOP/step": True, "largest conv": True}
    table = _table("Stages, in GB; export and build are host memory", columns, console)
    for stage in plan.stages:
        costs = stage.costs
        sizes = (stage.disk, stage.export_memory, stage.build_memory, stage.engine)
        table.add_row(
            stage.name,
            _precision(stage),
            f"{stage.parameters / GIGA:.3f} G",
            *(_gb(size) for size in (*sizes, int(ARENA * costs.activations), costs.io)),
            f"{costs.flops / _calls(stage, plan) / TERA:.1f}",
            f"{costs.flops / TERA:.1f}" if stage.name == "transformer" else "",
            f"{stage.most_elements / INT32_MAX:.0%} of 2^31" if stage.most_elements else "",
        )
    return table


def _calls(stage: StagePlan, plan: Plan) -> int:
    """How many clips one call counts for: the branches of a step are one batch."""
    return plan.order.branches if stage.name == "transformer" else 1


def _precision(stage: StagePlan) -> str:
    form = stage.number
    alone = form.computed != form.stored
    return f"{form.stored}, computed in {form.computed}" if alone else form.stored


def _gpus(plan: Plan, console: Console) -> Table:
    columns = {"GPU": False, "SM": True, "GB": True, "fits": False, "how": False}
    columns |= {"peak GB": True, "s/step": True, "s/clip": True, "VAE tiles": False}
    table = _table("GPUs", columns, console)
    for verdict in plan.verdicts:
        target, seconds = verdict.target, plan.run_seconds(verdict)
        step = verdict.seconds.get("transformer")
        table.add_row(
            target.name,
            str(target.capability),
            f"{target.memory / GIGA:.1f}",
            "yes" if verdict.fits else "no",
            verdict.residency or "",
            _gb(max(verdict.memory.values())),
            "" if step is None else f"{step:.2f}",
            "" if seconds is None else f"{seconds:.1f}",
            _tiles(verdict),
        )
    return table


def _tiles(verdict: Verdict) -> str:
    tiling = verdict.tilings.get("vae_decoder")
    return "" if tiling is None else f"{tiling.count} of {tiling.pixels}"


def _gb(size: int) -> str:
    return f"{size / GIGA:.2f}"


def _sentence(verdict: Verdict) -> str:
    if not verdict.fits:
        return f"{verdict.target.name}: no. {'; '.join(verdict.reasons)}"
    most = max(verdict.memory, key=lambda name: verdict.memory[name])
    free = verdict.target.memory - RESERVED
    how = "all stages at once" if verdict.residency == "all resident" else STAGED_NOTE
    return (
        f"{verdict.target.name}: yes, {how}; {most} takes the most, "
        f"{_gb(verdict.memory[most])} of {_gb(free)} GB"
    )


def document(plan: Plan) -> dict[str, Any]:
    """The whole plan; sizes in bytes, times in seconds."""
    shape = plan.shape
    return {
        "shape": {"width": shape.width, "height": shape.height, "frames": shape.frames},
        "tokens": shape.tokens,
        "steps": plan.order.steps,
        "branches": plan.order.branches,
        "stages": {stage.name: _stage_document(stage, plan) for stage in plan.stages},
        "gpus": [_verdict_document(verdict, plan) for verdict in plan.verdicts],
        "exit_code": plan.exit_code,
    }


def _stage_document(stage: StagePlan, plan: Plan) -> dict[str, Any]:
    return {
        "stored": stage.number.stored,
        "computed": stage.number.computed,
        "parameters": stage.parameters,
        "disk": stage.disk,
        "export_memory": stage.export_memory,
        "build_memory": stage.build_memory,
        "engine": stage.engine,
        "activations": stage.costs.activations,
        "io": stage.costs.io,
        "device_memory": needs(stage, stage.costs),
        "flops_per_call": stage.costs.flops // _calls(stage, plan),
        "flops_per_step": stage.costs.flops,
        "largest_convolution": stage.most_elements,
        "convolutions": {conv.name: conv.elements for conv in stage.costs.convolutions},
    }


def _verdict_document(verdict: Verdict, plan: Plan) -> dict[str, Any]:
    return {
        "name": verdict.target.name,
        "capability": verdict.target.capability,
        "flavours": list(verdict.target.flavours),
        "memory": verdict.target.memory,
        "fits": verdict.fits,
        "residency": verdict.residency,
        "reasons": list(verdict.reasons),
        "device_memory": dict(verdict.memory),
        "seconds": dict(verdict.seconds),
        "run_seconds": plan.run_seconds(verdict),
        "tiles": {name: _tiling_document(tiling) for name, tiling in verdict.tilings.items()},
        "source": verdict.target.source,
    }


def _tiling_document(tiling: Tiling) -> dict[str, Any]:
    return {"tile": tiling.pixels, "count": tiling.count}
