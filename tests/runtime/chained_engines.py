"""Four parts that are one model, as engines for the fake GPU, and a device to try them on.

shared = positions + text, h0 = latents W0 + shared, h1 = tanh(h0 W1 + shared),
h2 = tanh(h1 W2 + shared), velocity = h2 W3 + shared
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltx_engines.bundle import EngineEntry, TensorEntry
from ltx_engines.cache_key import EngineKey, Profile
from ltx_trt.session.chain_runner import ChainRunner, Link
from ltx_trt.session.engine_runner import EngineRunner
from ltx_trt.session.memory import Arena, Buffers
from ltx_trt.session.residency import Rotation
from ltx_trt.session.runner import Runner
from tests.runtime.engine_bundles import limits
from tests.runtime.fake_engines import FakeLibrary, Plan
from tests.runtime.fake_gpu import FakeGpu

CHANNELS, TOKENS, WEIGHTS = 8, (2, 5, 9), 1000
PARTS = 4
PROFILE: Profile = {"tokens": TOKENS}

Floats = NDArray[np.float32]
Rows = tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]]


def tensor(name: str, *axes: int | str, dtype: str = "float32") -> TensorEntry:
    return TensorEntry(name=name, dtype=dtype, axes=axes)


LATENTS, VELOCITY = tensor("latents", "tokens", CHANNELS), tensor("velocity", "tokens", CHANNELS)
TEXT, COORDS = tensor("text", 1, CHANNELS), tensor("coords", "tokens", 1)
SHARED = tensor("shared", "tokens", CHANNELS)
HIDDEN = [tensor(f"h{block}", "tokens", CHANNELS) for block in range(3)]

TABLE: list[Rows] = [
    ((LATENTS, TEXT, COORDS), (SHARED, HIDDEN[0])),
    ((HIDDEN[0], SHARED), (HIDDEN[1],)),
    ((HIDDEN[1], SHARED), (HIDDEN[2],)),
    ((HIDDEN[2], SHARED), (VELOCITY,)),
]


WHOLE: Rows = ((LATENTS, TEXT, COORDS), (VELOCITY,))


def entry(
    name: str, inputs: tuple[TensorEntry, ...], outputs: tuple[TensorEntry, ...]
) -> EngineEntry:
    key = EngineKey(
        stage="transformer",
        graph="0" * 64,
        weights={},
        profiles=(PROFILE,),
        flavour="tensorrt-rtx",
        version="1.7.1.116",
        targets=(89,),
    )
    file = f"{name}.engine"
    return EngineEntry(
        file=file, layers=name, key=key, inputs=inputs, outputs=outputs, activations=0
    )


ENTRIES = {f"part{n}": entry(f"part{n}", *row) for n, row in enumerate(TABLE)}
ENTRIES["whole"] = entry("whole", *WHOLE)


def write(folder: Path) -> dict[str, Path]:
    """Plans of the whole and of parts 0 to 3."""
    from onnx import helper

    node, dice = helper.make_node, np.random.default_rng(5)
    weights = {
        f"w{n}": dice.normal(size=(CHANNELS, CHANNELS)).astype(np.float32) for n in range(PARTS)
    }
    nodes = [
        [
            node("Add", ["coords", "text"], ["shared"]),
            node("MatMul", ["latents", "w0"], ["m0"]),
            node("Add", ["m0", "shared"], ["h0"]),
        ],
        *(
            [
                node("MatMul", [f"h{block - 1}", f"w{block}"], [f"m{block}"]),
                node("Add", [f"m{block}", "shared"], [f"a{block}"]),
                node("Tanh", [f"a{block}"], [f"h{block}"]),
            ]
            for block in (1, 2)
        ),
        [node("MatMul", ["h2", "w3"], ["m3"]), node("Add", ["m3", "shared"], ["velocity"])],
    ]
    graphs = {f"part{n}": (row, TABLE[n]) for n, row in enumerate(nodes)}
    graphs["whole"] = [n for row in nodes for n in row], WHOLE
    return {
        name: _plan(folder / f"{name}.onnx", row, rows, weights)
        for name, (row, rows) in graphs.items()
    }


def _plan(path: Path, nodes: list[Any], rows: Rows, weights: Mapping[str, Floats]) -> Path:
    from onnx import TensorProto, helper, numpy_helper

    read = {name for node in nodes for name in node.input}
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.axes) for t in row]
        for row in rows
    )
    held = [numpy_helper.from_array(v, name) for name, v in weights.items() if name in read]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    plan = Plan(path.stem, str(path), (limits(rows[0], PROFILE),), weights=WEIGHTS)
    return plan.write(path.with_suffix(".engine"))


class Bench:
    """A device with what goes into the model and what comes out."""

    def __init__(self, gpu: FakeGpu, plans: Mapping[str, Path]) -> None:
        self.gpu, self.plans, self.library = gpu, plans, FakeLibrary(gpu)
        self.stream = gpu.stream()
        self.arena, self.buffers = Arena(gpu, self.stream), Buffers(gpu, self.stream)
        self.hold: Callable[[str], object] = str
        self.swaps = False

    def load(self, name: str) -> EngineRunner:
        self.hold(name)
        engine = self.library.load(self.plans[name], swaps=self.swaps)
        return EngineRunner(engine, self.arena, ENTRIES[name])

    def links(self) -> list[Link]:
        return [
            Link(f"transformer, part {n + 1} of 4", *TABLE[n], partial(self.load, f"part{n}"))
            for n in range(PARTS)
        ]

    def chain(self, places: int, overlaps: bool = True) -> ChainRunner:
        overlaps = overlaps and 2 <= places < PARTS
        rotation = Rotation(PARTS, places, overlaps)
        return ChainRunner(self.gpu, self.links(), rotation)

    def bind(self, runner: Runner, tokens: int = 5) -> None:
        shapes = {"latents": (tokens, CHANNELS), "text": (1, CHANNELS), "coords": (tokens, 1)}
        size = 4 * TOKENS[-1] * CHANNELS
        names = [*shapes, "velocity"]
        runner.bind(shapes, {name: self.buffers.get(name, size) for name in names})

    def step(self, runner: Runner, seed: int, tokens: int = 5) -> bytes:
        """The velocity, after this one step."""
        dice = np.random.default_rng(seed)
        feeds = {"latents": (tokens, CHANNELS), "text": (1, CHANNELS), "coords": (tokens, 1)}
        for name, shape in feeds.items():
            values = dice.normal(size=shape).astype(np.float32)
            self.gpu.upload(self.buffers.get(name, 1), values, self.stream)
            self.gpu.synchronize(self.stream)
        runner.enqueue(self.stream)
        result = np.empty((tokens, CHANNELS), np.float32)
        self.gpu.download(result, self.buffers.get("velocity", 1), self.stream)
        self.gpu.synchronize(self.stream)
        return result.tobytes()

    def close(self) -> None:
        self.buffers.close()
        self.arena.close()
        self.gpu.close_stream(self.stream)
