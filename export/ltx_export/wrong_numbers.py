"""Which part of an engine gives other numbers than ONNX Runtime: its inner values, side by side.

An engine shows inner values when they are outputs of its graph. All blocks are marked in one build;
then the layers of the block where the error grows most. What is marked is not fused with what
follows it, so an error that only a fusion makes may go away: the sentence says when it did.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ltx_engines.bundle import open_bundle
from ltx_engines.cache_key import Profile
from ltx_export import build_process, engine_profiles, ladder, onnx_bundle, polygraphy_engine
from ltx_export.bisection import steepest
from ltx_export.graph_following import linear_layers
from ltx_export.onnx_transformer import VELOCITY, Graph, OnnxTransformer
from ltx_export.polygraphy_engine import Link, RunnerTransformer
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video.model import skeleton
from ltx_ref.quantized import BLOCKS

if TYPE_CHECKING:
    from ltx_export.debug_layers import Target

Values = Generator[str, None, dict[str, Tensor]]
Run = Callable[[Sequence[str]], Values]
"""Values of a graph, by their names in it."""


@dataclass(frozen=True, slots=True)
class Side:
    graph: Graph
    run: Run


@dataclass(frozen=True, slots=True)
class Found:
    """`velocity` is the distance of the whole, `after` and `before` those of the culprit."""

    velocity: float
    limit: float
    culprit: str | None = None
    after: float = 0.0
    before: float = 0.0

    def sentence(self) -> str:
        whole = f"the engine's velocity is {self.velocity:.3g} from ONNX Runtime's"
        if self.culprit is None:
            return f"{whole}, within {self.limit:.3g}"
        grown = f"{self.before:.3g} in front of it, {self.after:.3g} behind it"
        marked = "" if self.after > self.limit else "; with inner values marked it is within bounds"
        return f"{whole}, more than {self.limit:.3g}; worst is {self.culprit}: {grown}{marked}"


def find(target: "Target", scratch: Path) -> Generator[str, None, Found]:
    """The engine is built and run here, on the GPU; the twin on the CPU."""
    graph = Graph(target.bundle)
    twin = graph
    if graph.refusal() is not None:
        twin = yield from _twin(target, scratch)
    feeds = inputs(graph, target.profile)
    header = read_header(target.bundle.file(target.bundle.manifest.checkpoint))
    layers = linear_layers(skeleton(header).transformer)

    def of_engine(names: Sequence[str]) -> Values:
        yield f"building: with {len(names)} outputs"
        return (yield from _engine(target, graph, names, scratch, feeds))

    formats = () if graph.entry.quantization is None else tuple(graph.entry.quantization.layers)
    bounds = ladder.bounds(formats, engine=target.bundle.manifest.precision)
    limit = bounds[f"engine.{VELOCITY}"].limit
    own, other = Side(graph, of_engine), Side(twin, by_onnxruntime(twin, feeds))
    return (yield from compare(own, other, layers, limit))


def compare(
    engine: Side, twin: Side, layers: Sequence[str], limit: float
) -> Generator[str, None, Found]:
    """`layers` are the paths of all linear layers of the model."""
    blocks = sorted({int(p.split(".")[1]) for p in layers if p.startswith(f"{BLOCKS}.")})
    names = {f"{BLOCKS}.{index}": index for index in blocks}
    whole = yield from _distances(engine, twin, {VELOCITY: (VELOCITY, VELOCITY)})
    if (velocity := whole[VELOCITY]) <= limit:
        return Found(velocity, limit)
    pairs = {
        path: (engine.graph.block_output(index), twin.graph.block_output(index))
        for path, index in names.items()
    }
    at = yield from _steepest("blocks", engine, twin, pairs | {"proj_out": (VELOCITY, VELOCITY)})
    if not at[0].startswith(f"{BLOCKS}."):
        return Found(velocity, limit, *at)
    inner = [path for path in layers if path.startswith(f"{at[0]}.")]
    marked = {p: (engine.graph.layer_output(p), twin.graph.layer_output(p)) for p in inner}
    found = yield from _distances(engine, twin, marked)
    first = next((path for path in inner if found[path] > max(at[2] * 2, limit / 2)), None)
    if first is None:
        return Found(velocity, limit, *at)
    return Found(velocity, limit, first, found[first], at[2])


def _steepest(
    what: str, engine: Side, twin: Side, pairs: Mapping[str, tuple[str, str]]
) -> Generator[str, None, tuple[str, float, float]]:
    """The part in which the error grows most: its name, the error behind it and in front of it."""
    errors = yield from _distances(engine, twin, pairs)
    grown = [0.0, *errors.values()]
    place = yield from steepest(what, len(pairs), grown.__getitem__)
    return list(pairs)[place - 1], grown[place], grown[place - 1]


def _distances(
    engine: Side, twin: Side, pairs: Mapping[str, tuple[str, str]]
) -> Generator[str, None, dict[str, float]]:
    found = yield from engine.run([own for own, _ in pairs.values()])
    wanted = yield from twin.run([other for _, other in pairs.values()])
    return {
        path: ladder.distance(found[own].numpy(), wanted[other].numpy())
        for path, (own, other) in pairs.items()
    }


def by_onnxruntime(graph: Graph, feeds: Mapping[str, Tensor]) -> Run:
    """By polygraphy's runner, on the CPU."""

    def run(names: Sequence[str]) -> Values:
        from polygraphy.backend.onnxrt import OnnxrtRunner

        yield f"ONNX Runtime: {len(names)} outputs"
        model = OnnxTransformer(graph, names)
        with polygraphy_engine.told(str(graph.path)), OnnxrtRunner(model.session) as runner:
            return RunnerTransformer([Link(runner, model.dtypes)]).run(feeds)

    return run


def _engine(
    target: "Target", graph: Graph, names: Sequence[str], scratch: Path, feeds: Mapping[str, Tensor]
) -> Values:
    file = scratch / "marked.onnx"
    file.write_bytes(graph.with_outputs(names))
    shapes = engine_profiles.shapes(graph.entry, target.profile)
    for _ in (steps := build_process.run(target.job(file, (shapes,)), "marked")):
        yield f"building: with {len(names)} outputs"
    steps.close()
    backend = polygraphy_engine.load(target.flavour)
    plan = file.with_suffix(".engine")
    types = {t.name: getattr(torch, t.dtype) for t in graph.entry.inputs}
    own = polygraphy_engine.runner_of(backend, plan, 0)
    with polygraphy_engine.told(str(plan)), own as runner:
        return RunnerTransformer([Link(runner, types)]).run(feeds)


def _twin(target: "Target", scratch: Path) -> Generator[str, None, Graph]:
    """The same model in float32, for ONNX Runtime."""
    manifest = target.bundle.manifest
    order = onnx_bundle.Order(
        target.bundle.file(manifest.checkpoint),
        scratch / "twin",
        stages=(target.stage,),
        stg_mode=manifest.model.stg_mode,
        precision="float32",
        opset=20,
        weights="refer",
    )
    for step in onnx_bundle.write(order):
        yield f"exporting: {step}"
    return Graph(open_bundle(scratch / "twin"))


def inputs(graph: Graph, profile: Profile) -> dict[str, Tensor]:
    """Noise at the sizes that the profile is tuned for: a step in the middle of a run, every word
    of the prompt there, no block perturbed."""
    rng = np.random.default_rng(0)
    found = {}
    for tensor in graph.entry.inputs:
        shape = tuple(a if isinstance(a, int) else profile[a][1] for a in tensor.axes)
        values = rng.standard_normal(shape, np.float32)
        if tensor.name.endswith("_mask"):
            values = np.ones(shape, np.float32)
        elif tensor.name == "timestep":
            values = np.full(shape, 0.7, np.float32)
        found[tensor.name] = torch.from_numpy(values)
    return found
