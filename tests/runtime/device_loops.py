"""A transformer of a few nodes and the sampler's step on the fake GPU, and its twin on the host.

velocity = tanh(latents + places / 10) + timestep * mean(prompt) * mean(skip mask) * latents
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ltx_engines import bundle, stages
from ltx_engines.bundle import EngineEntry, tensor_entries
from ltx_engines.cache_key import EngineKey, Range
from ltx_trt.cli import SHIPPED
from ltx_trt.denoising import Denoising, Text
from ltx_trt.guidance import StepGuidance
from ltx_trt.noise import Noise
from ltx_trt.sampler import table
from ltx_trt.session import Array, Feeds
from ltx_trt.session.device import Device
from ltx_trt.session.element_types import narrowed, widened
from ltx_trt.session.engine_runner import EngineRunner
from tests.runtime import engine_bundles
from tests.runtime.fake_engines import Plan, session

Floats = NDArray[np.float32]

WIDTH, LAYERS = 7, 3
STEPS = 6

ALONE = StepGuidance(1.0, 0.0, 1.0)
CFG = StepGuidance(3.0, 0.0, 1.0)
STAR = StepGuidance(3.0, 0.0, 0.7, cfg_star_rescale=True)
STG = StepGuidance(1.0, 2.0, 0.7, (1,))
ALL = StepGuidance(3.0, 2.0, 0.7, (0, 2))

GUIDANCE: dict[str, tuple[StepGuidance, ...]] = {
    "alone": (ALONE,) * STEPS,
    "cfg": (CFG,) * STEPS,
    "cfg-star": (STAR,) * STEPS,
    "stg": (STG,) * STEPS,
    "stg without blocks": (StepGuidance(1.0, 2.0, 0.7),) * STEPS,
    "all": (ALL,) * STEPS,
    "changing": (ALONE, ALL, StepGuidance(4.0, 1.0, 0.5, (1,), True), STAR, STG, ALONE),
}


def write_transformer(path: Path, channels: int) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node
    nodes = [
        node("Mul", ["coords", "tenth"], ["near"]),
        node("ReduceSum", ["near", "one"], ["place"], keepdims=0),
        node("Unsqueeze", ["place", "two"], ["places"]),
        node("Add", ["latents", "places"], ["placed"]),
        node("Tanh", ["placed"], ["bounded"]),
        node("Unsqueeze", ["prompt_mask", "two"], ["mask"]),
        node("Mul", ["prompt_embeds", "mask"], ["kept"]),
        node("ReduceMean", ["kept", "rest"], ["meaning"], keepdims=1),
        node("ReduceMean", ["skip_layer_mask", "zero"], ["share"], keepdims=0),
        node("Unsqueeze", ["share", "rest"], ["shares"]),
        node("Unsqueeze", ["timestep", "two"], ["sigma"]),
        node("Mul", ["meaning", "shares"], ["weighed"]),
        node("Mul", ["weighed", "sigma"], ["driven"]),
        node("Mul", ["driven", "latents"], ["pull"]),
        node("Add", ["bounded", "pull"], ["velocity"]),
    ]
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "two": np.array([2]),
        "rest": np.array([1, 2]),
        "tenth": np.float32(0.1),
    }
    inputs: dict[str, tuple[str | int, ...]] = {
        "latents": ("batch", "tokens", channels),
        "coords": ("batch", 3, "tokens"),
        "timestep": ("batch", "timesteps"),
        "prompt_embeds": ("batch", "text", WIDTH),
        "prompt_mask": ("batch", "text"),
        "skip_layer_mask": (LAYERS, "batch"),
    }
    border = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)
        for name, axes in {**inputs, "velocity": inputs["latents"]}.items()
    ]
    weights = [numpy_helper.from_array(np.array(value), n) for n, value in constants.items()]
    graph = helper.make_graph(nodes, "transformer", border[:-1], border[-1:], weights)
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@dataclass(frozen=True, slots=True)
class Graphs:
    """Files of both stages, and the sizes of the clip and of the model."""

    transformer: Path
    step: Path
    channels: int
    tokens: int = 6
    text: int = 5
    width: int = WIDTH
    layers: int = LAYERS


def write(folder: Path, channels: int) -> Graphs:
    transformer = write_transformer(folder / f"transformer_{channels}.onnx", channels)
    return Graphs(transformer, write_step(folder, channels), channels)


def write_step(folder: Path, channels: int) -> Path:
    from ltx_export import step_graph

    step = folder / f"step_{channels}.onnx"
    step.write_bytes(step_graph.model(channels, "float32", 20).SerializeToString())
    return step


def shipped(folder: Path) -> Graphs:
    """ltx-tiny, for a clip of 17 frames of 96 x 96."""
    manifest = bundle.read(SHIPPED)
    entry = manifest.stages["transformer"]
    axes = {tensor.name: tensor.axes for tensor in entry.inputs}
    channels, width = axes["latents"][2], axes["prompt_embeds"][2]
    if not isinstance(channels, int) or not isinstance(width, int):
        raise TypeError("ltx-tiny's sizes are fixed")
    graph, step = SHIPPED / entry.file, write_step(folder, channels)
    return Graphs(graph, step, channels, 27, 128, width, manifest.model.num_layers)


def table_of(stage: str, graphs: Graphs) -> stages.Stage:
    channels = graphs.channels
    if stage == stages.SAMPLER_STEP:
        return stages.sampler_step(channels)
    sizes = stages.Sizes(
        channels, channels, graphs.width, graphs.layers, channels, timestep_conditioning=False
    )
    return stages.ltx_video(sizes)[stage]


def sizes_of(graphs: Graphs) -> dict[str, Range]:
    fixed = {"tokens": graphs.tokens, "timesteps": 1, "text": graphs.text}
    return {"batch": (1, 3, 3)} | {axis: (size, size, size) for axis, size in fixed.items()}


def runner(
    device: Device, stage: str, graphs: Graphs, precision: Any = "float32", streamable: int = 0
) -> EngineRunner:
    """An engine of `precision` from a graph in float32; half of what may be is streamed."""
    table, sizes = table_of(stage, graphs), sizes_of(graphs)
    inputs, outputs = (tensor_entries(row, precision) for row in (table.inputs, table.outputs))
    names = {axis for t in inputs for axis in t.axes if isinstance(axis, str)}
    profile = {name: sizes[name] for name in sorted(names)}
    graph = graphs.step if stage == stages.SAMPLER_STEP else graphs.transformer
    plan = Plan(
        stage,
        str(graph),
        (engine_bundles.limits(inputs, profile),),
        {tensor.name: tensor.dtype for tensor in (*inputs, *outputs)},
        streamable=streamable,
    )
    key = EngineKey(
        stage=stage,
        graph="0" * 64,
        weights={},
        profiles=(profile,),
        flavour=plan.flavour,
        version=plan.version,
        targets=plan.targets,
    )
    name = f"{stage}.engine"
    entry = EngineEntry(
        file=name, layers="layers.json", key=key, inputs=inputs, outputs=outputs, activations=0
    )
    file = plan.write(graphs.step.with_name(name))
    engine = device.library.load(file, streams=bool(streamable))
    if streamable:
        engine.set_streaming_budget(streamable // 2)
    return EngineRunner(engine, device.arena, entry, streamed=bool(streamable))


def job(
    graphs: Graphs,
    sampler: str = "euler",
    guidance: tuple[StepGuidance, ...] = GUIDANCE["all"],
    seed: int = 3,
) -> Denoising:
    noise, dice = Noise(seed), np.random.default_rng(seed)
    sigmas = [*(1.0, 0.9, 0.7, 0.5, 0.3, 0.1)[: len(guidance)], 0.0]

    def text(meaning: float) -> Text:
        embeds = dice.normal(meaning, 1, (1, graphs.text, graphs.width)).astype(np.float32)
        return Text(embeds, (np.arange(graphs.text) < 4).astype(np.float32)[np.newaxis])

    return Denoising(
        latents=noise.normal((1, graphs.tokens, graphs.channels)),
        coordinates=dice.uniform(size=(1, 3, graphs.tokens)).astype(np.float32),
        text=text(0.5),
        uncond=text(-0.5),
        table=table(sampler, sigmas, eta=0.5),
        guidance=guidance,
        num_layers=graphs.layers,
        noise=noise,
    )


class Twin:
    """The transformer as a session on the host, with the engine's element type at its edges."""

    def __init__(self, graphs: Graphs, precision: Any = "float32") -> None:
        self.run: Any = session(str(graphs.transformer))
        rows = tensor_entries(table_of("transformer", graphs).tensors(), precision)
        self.types = {row.name: row.dtype for row in rows}

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        rounded = {name: self._rounded(name, values) for name, values in feeds.items()}
        (velocity,) = self.run.run(None, rounded)
        return {"velocity": self._rounded("velocity", velocity)}

    def _rounded(self, name: str, values: Array) -> Array:
        return widened(narrowed(values, self.types[name]), self.types[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.run = None
