"""ltx-tiny with engines for the fake GPU whose transformer takes its weights as inputs."""

import shutil
from pathlib import Path

import onnx_ir as ir

from ltx_engines import bundle
from ltx_engines.cache_key import Part
from ltx_engines.engine_entry import EngineEntry
from ltx_engines.stages import SAMPLER_STEP
from ltx_export import step_graph, weight_inputs
from ltx_trt.cli import SHIPPED
from tests.runtime import engine_bundles
from tests.runtime.engine_bundles import Engines, file_entry, limits
from tests.runtime.fake_engines import Plan
from tests.runtime.split_engines import CLIP
from tests.runtime.test_weight_inputs_runner import entry as piece_entry

STAGE = "transformer"


def make(folder: Path) -> None:
    shutil.copytree(SHIPPED, folder)
    step_graph.add(bundle.open_bundle(folder, cache=folder.parent / "cache"))
    others = Engines((CLIP,), ("text_encoder", "vae_decoder", SAMPLER_STEP))
    engine_bundles.add(folder, others)
    manifest = bundle.read(folder)
    stage = manifest.stages[STAGE]
    profile = engine_bundles._profile(manifest, stage, CLIP, others.branches)
    key = engine_bundles._key(manifest, STAGE, [profile], others)
    pieces = weight_inputs.cut(ir.load(folder / stage.file))
    found = []
    for index, piece in enumerate(pieces):
        part = Part(index=index, of=len(pieces), first=index, end=index + 1)
        own = piece_entry(piece).model_copy(
            update={"key": key.model_copy(update={"weights": {}, "part": part})}
        )
        ir.save(piece.model, folder / f"{piece.name}.onnx")
        plan = Plan(piece.name, str(folder / f"{piece.name}.onnx"), (limits(own.inputs, profile),))
        found.append(_written(folder, own, plan))
    added = {name: file_entry(folder / name) for e in found for name in (e.file, e.layers)}
    files = {**manifest.files, **added}
    engines = (*manifest.engines, *found)
    bundle.update(folder, manifest.model_copy(update={"engines": engines, "files": files}))


def _written(folder: Path, own: EngineEntry, plan: Plan) -> EngineEntry:
    plan.write(folder / own.file)
    (folder / own.layers).write_text("[]\n", encoding="utf-8")
    return own
