"""What a builder is told for each engine that a bundle lacks: a graph, or a part of one."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ltx_engines.bundle import Bundle, StageEntry
from ltx_export import engine_needs, engine_profiles, refittable
from ltx_export.build_job import Job
from ltx_export.engine_order import Order
from ltx_export.engine_work import AS_INPUTS, Work


@dataclass(frozen=True, slots=True)
class Piece:
    """A graph and its own tables. `weights` are the files that it points into when it cannot be
    parsed where it lies: its words for them, and where they are. `bound` are weights that are
    inputs, `blocks` those that it computes (`EngineEntry`)."""

    graph: Path
    entry: StageEntry
    weights: Mapping[str, str]
    bound: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[int, ...] = ()


def pieces(opened: Bundle, works: Sequence[Work], folder: Path) -> dict[str, Piece]:
    """By the names of the work; the graphs of parts are written into the folder."""
    found: dict[str, Piece] = {}
    for work in works:
        if work.key.part is None:
            entry = opened.stage(work.key.stage)
            elsewhere = {Path(name).name: name for name in entry.weights if os.path.isabs(name)}
            found[work.name] = Piece(opened.file(entry.file), entry, elsewhere)
    for stage in dict.fromkeys(work.key.stage for work in works if work.key.part):
        ours = [w for w in works if w.key.stage == stage and w.key.part]
        if AS_INPUTS in ours[0].key.options:
            from ltx_export import weight_input_engines

            found |= weight_input_engines.pieces(opened, ours, folder)
        else:
            found |= _parts(opened, ours, folder)
    return found


def _parts(opened: Bundle, works: Sequence[Work], folder: Path) -> dict[str, Piece]:
    import onnx_ir as ir

    from ltx_export import split  # both late: an answer that all is up to date needs neither

    entry = opened.stage(works[0].key.stage)
    model = ir.load(opened.file(entry.file))
    weights = {
        Path(name).name if os.path.isabs(name) else name: str(opened.file(name).resolve())
        for name in entry.weights
    }
    found = {}
    parts = [work.key.part for work in works if work.key.part]
    for work, group in zip(works, split.split(model, entry, parts), strict=True):
        graph = folder / f"{work.name}.onnx"
        graph.write_bytes(ir.to_proto(group.model).SerializeToString())
        own = entry.model_copy(update={"inputs": group.inputs, "outputs": group.outputs})
        found[work.name] = Piece(graph, own, weights)
    return found


def job(work: Work, piece: Piece, order: Order, folder: Path) -> Job:
    key, entry = work.key, piece.entry
    return Job(
        graph=piece.graph,
        engine=folder / f"{work.name}.engine",
        layers=folder / f"{work.name}.layers.json",
        flavour=key.flavour,
        version=key.version,
        targets=key.targets,
        profiles=tuple(engine_profiles.shapes(entry, profile) for profile in key.profiles),
        types={
            tensor.name: tensor.dtype
            for tensor in (*entry.inputs, *entry.outputs)
            if tensor.name not in piece.bound
        },
        weights=dict(piece.weights),
        weight_bytes=engine_needs.weight_bytes(piece.graph),
        optimization_level=order.optimization_level,
        workspace=order.workspace,
        weight_streaming=order.weight_streaming,
        refittable=refittable.names(piece.graph) if refittable.OPTION in key.options else (),
    )
