"""A plan for people, as three tables, and for programs, as one JSON document."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ltx_engines.shapes import ENLARGES
from ltx_engines.targets import GIGA, TERA
from ltx_export.fitting import ARENA, RESERVED, Residency, Tiling, Verdict, needs
from ltx_export.graph_costs import INT32_MAX
from ltx_export.plan import Plan
from ltx_export.stage_plan import StagePlan

HOW: Mapping[Residency | None, str] = MappingProxyType(
    {"all resident": "at once", "staged": "in turn", None: "no"}
)
"""For the table: short."""
STAGED_NOTE = "one stage after another, each freed before the next"

KEPT = "stage"
"""A column of names, which are not folded."""
FOLDED, UNFOLDED = 80, 120
"""Columns that the tables need with words in two lines, and with none."""


def console() -> Console:
    """For stdout; a program that reads it gets one line for each row, whatever COLUMNS says."""
    own = Console()
    return Console(width=max(own.width, FOLDED if own.is_terminal else UNFOLDED))


def show(plan: Plan, console: Console) -> None:
    """Print it: tables with rules on a terminal, plain columns elsewhere."""
    question, shape = plan.question, plan.shape
    console.print(
        f"{shape.width}x{shape.height}x{shape.frames}: {shape.tokens:,} tokens, {question.steps} "
        f"steps of {question.branches} branch{'es' if question.branches > 1 else ''}"
        f"{_before(plan)}",
        highlight=False,
    )
    if plan.left_out:
        console.print(_left_out(plan), highlight=False, soft_wrap=True)
    for table in (_stages(plan, console), _memory(plan, console), _gpus(plan, console)):
        console.print(table)
    for verdict in plan.verdicts:
        console.print(_sentence(verdict, plan), highlight=False, soft_wrap=True)
    console.print(
        "Seconds are a bound from the GPU's rates, not a promise; loading engines is not in them.",
        highlight=False,
        soft_wrap=True,
    )


def _before(plan: Plan) -> str:
    if not (steps := plan.question.first_steps):
        return ""
    sides = plan.shape.width // ENLARGES, plan.shape.height // ENLARGES
    return f", after {steps} steps at {sides[0]}x{sides[1]}"


def _left_out(plan: Plan) -> str:
    stages_of: dict[str, list[str]] = {}
    for stage, reason in plan.left_out.items():
        stages_of.setdefault(reason, []).append(stage)
    return "; ".join(
        f"{', '.join(names)} not counted: {reason}" for reason, names in stages_of.items()
    )


def _table(title: str, columns: Mapping[str, bool], console: Console) -> Table:
    """Columns by name; True for what stands to the right. Only words are ever folded."""
    # The rules of a terminal leave a column free between two others.
    box, gap = (SIMPLE_HEAD, 1) if console.is_terminal else (None, 2)
    table = Table(title=title, title_justify="left", box=box, show_edge=False, pad_edge=False)
    table.padding = (0, gap, 0, 0)
    for name, right in columns.items():
        table.add_column(name, justify="right" if right else "left", no_wrap=right or name == KEPT)
    return table


def _stages(plan: Plan, console: Console) -> Table:
    names = ("parameters", "TFLOP/call", "TFLOP/step", "largest conv")
    columns = {"stage": False, "precision": False} | dict.fromkeys(names, True)
    table = _table("Stages", columns, console)
    for stage in plan.stages:
        flops = stage.costs.flops
        table.add_row(
            stage.name,
            _precision(stage),
            f"{stage.parameters / GIGA:.3f} G",
            f"{flops / _calls(stage, plan) / TERA:.1f}",
            f"{flops / TERA:.1f}" if stage.name == "transformer" else "",
            f"{stage.most_elements / INT32_MAX:.0%} of 2^31" if stage.most_elements else "",
        )
    return table


def _memory(plan: Plan, console: Console) -> Table:
    names = ("disk", "export", "build", "engine", "activations", "in/out")
    title = "Sizes in GB; host memory to export and to build"
    table = _table(title, {"stage": False} | dict.fromkeys(names, True), console)
    for stage in plan.stages:
        host = (stage.disk, stage.export_memory, stage.build_memory)
        device = (stage.engine, int(ARENA * stage.costs.activations), stage.costs.io)
        table.add_row(stage.name, *(_gb(size) for size in (*host, *device)))
    return table


def _calls(stage: StagePlan, plan: Plan) -> int:
    """How many clips one call counts for: the branches of a step are one batch."""
    return plan.question.branches if stage.name == "transformer" else 1


def _precision(stage: StagePlan) -> str:
    form = stage.number
    alone = form.computed != form.stored
    return f"{form.stored}, computed in {form.computed}" if alone else form.stored


def _gpus(plan: Plan, console: Console) -> Table:
    columns = {"GPU": False} | dict.fromkeys(("SM", "GB", "fits"), True)
    columns |= dict.fromkeys(("peak GB", "s/step", "s/clip", "VAE tiles"), True)
    table = _table("GPUs", columns, console)
    for verdict in plan.verdicts:
        target, seconds = verdict.target, plan.run_seconds(verdict)
        step = verdict.seconds.get("transformer")
        table.add_row(
            target.name,
            str(target.capability),
            f"{target.memory / GIGA:.1f}",
            HOW[verdict.residency],
            _gb(max(verdict.memory.values())),
            "" if step is None else f"{step:.2f}",
            "" if seconds is None else f"{seconds:.1f}",
            _tiles(verdict),
        )
    return table


def _tiles(verdict: Verdict) -> str:
    tiling = verdict.tilings.get("vae_decoder")
    if tiling is None:
        return ""
    return "1" if tiling.count == 1 else f"{tiling.count} of {tiling.pixels}"


def _gb(size: int) -> str:
    return f"{size / GIGA:.2f}"


def _sentence(verdict: Verdict, plan: Plan) -> str:
    if not verdict.fits:
        return f"{verdict.target.name}: no. {'; '.join(verdict.reasons)}"
    most = max(verdict.memory, key=lambda name: verdict.memory[name])
    free = verdict.target.memory - RESERVED
    together = "the counted stages at once" if plan.left_out else "all stages at once"
    how = together if verdict.residency == "all resident" else STAGED_NOTE
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
        "steps": plan.question.steps,
        "first_steps": plan.question.first_steps,
        "branches": plan.question.branches,
        "stages": {stage.name: _stage_document(stage, plan) for stage in plan.stages},
        "not_counted": dict(plan.left_out),
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
