"""ltx-tiny with engines for the fake GPU whose transformer is a chain, each as large as it says."""

import shutil
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ltx_engines import bundle
from ltx_engines.bundle import EngineEntry, Manifest
from ltx_engines.shapes import VideoShape
from ltx_engines.stages import SAMPLER_STEP
from ltx_export import split, step_graph
from ltx_export.block_groups import STAGE, evenly
from ltx_trt.cli import SHIPPED
from ltx_trt.session.needs import STREAMING
from tests.runtime import engine_bundles
from tests.runtime.engine_bundles import Engines, file_entry, limits
from tests.runtime.fake_engines import Plan

CLIP = VideoShape(9, 64, 96)
WEIGHTS, SMALL = 3_000_000, 20_000
"""Bytes of each engine of the transformer and of another one, in its file and on the GPU."""

STREAMABLE = 2_500_000
"""Of the engine of a whole transformer."""

ACTIVATIONS = 90_000


def make(folder: Path, parts: int, conditioning: int | None = None) -> None:
    """A bundle; its transformer is not split if it is in one part, but streams its weights.
    `conditioning` is of one in parts."""
    shutil.copytree(SHIPPED, folder)
    step_graph.add(bundle.open_bundle(folder, cache=folder.parent / "cache"))
    others = Engines((CLIP,), ("text_encoder", "vae_decoder", SAMPLER_STEP), weights=SMALL)
    engine_bundles.add(folder, others)
    if parts == 1:
        engine_bundles.add(
            folder, replace(others, stages=(STAGE,), weights=WEIGHTS, streamable=STREAMABLE)
        )
    manifest = bundle.read(folder)
    if parts > 1:
        engines = Engines((CLIP,), weights=WEIGHTS, conditioning=conditioning)
        manifest = _add_chain(folder, manifest, engines, parts)
    entries = tuple(map(_described, manifest.engines))
    files = {**manifest.files, **{e.file: _padded(folder / e.file) for e in entries}}
    bundle.update(folder, manifest.model_copy(update={"engines": entries, "files": files}))


def _described(entry: EngineEntry) -> EngineEntry:
    streams = entry.key.stage == STAGE and entry.key.part is None
    options = {STREAMING: 1} if streams else {}
    key = entry.key.model_copy(update={"options": options})
    return entry.model_copy(update={"activations": ACTIVATIONS, "key": key})


def _padded(plan: Path) -> bundle.FileEntry:
    plan.write_bytes(plan.read_bytes().ljust(WEIGHTS if STAGE in plan.name else SMALL))
    return file_entry(plan)


def _add_chain(folder: Path, manifest: Manifest, engines: Engines, parts: int) -> Manifest:
    entry = manifest.stages[STAGE]
    profiles = [*engine_bundles._profiles(manifest, entry, CLIP, engines)]
    key = engine_bundles._key(manifest, STAGE, profiles, engines)
    model = ir.load(folder / entry.file)
    found = []
    for group in split.split(model, entry, evenly(manifest.model.num_layers, parts)):
        name = f"{STAGE}.part{group.part.index}"
        graph = folder / f"{name}.onnx"
        ir.save(group.model, graph)
        shapes = tuple(limits(group.inputs, profile) for profile in profiles)
        plan = Plan(name, str(graph), shapes, weights=WEIGHTS)
        found.append(
            EngineEntry(
                file=plan.write(folder / f"{name}.engine").name,
                layers=f"{name}.layers.json",
                key=key.model_copy(update={"part": group.part}),
                inputs=group.inputs,
                outputs=group.outputs,
                activations=0,
            )
        )
        (folder / found[-1].layers).write_text("[]\n", encoding="utf-8")
    added = {name: file_entry(folder / name) for e in found for name in (e.file, e.layers)}
    files = {**manifest.files, **added}
    return manifest.model_copy(update={"engines": (*manifest.engines, *found), "files": files})
