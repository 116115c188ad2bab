"""A decoder made by hand that goes on: two frames late, of which two levels keep the last two.

h0 = past_0, latents      without its first and last frame: a frame late
h1 = past_1, h0 with each cell twice along both sides; a frame late again
pixels = tanh of that, as the whole decoder's (`conftest.py`)
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ltx_engines import bundle
from ltx_engines.bundle import StageEntry, tensor_entries
from ltx_engines.stages import STREAM, Kept, Stage, ltx_video
from tests.runtime.conftest import CHANNELS, SIZES
from tests.runtime.engine_bundles import file_entry

FILE = f"{STREAM}.onnx"
KEPT = (Kept(CHANNELS, 1), Kept(3, 2))
DELAY = 8 * 2 + 7
"""Frames: two of the latents', and those that a whole clip lacks before its first."""


def add(folder: Path) -> None:
    """To a bundle of `make_bundle`."""
    manifest = bundle.read(folder)
    stage = ltx_video(replace(SIZES, kept=KEPT))[STREAM]
    inputs, outputs = (tensor_entries(t, "float32") for t in (stage.inputs, stage.outputs))
    entry = StageEntry(file=FILE, inputs=inputs, outputs=outputs, weights=())
    (folder / FILE).write_bytes(_graph(stage))
    changes = {
        "files": {**manifest.files, FILE: file_entry(folder / FILE)},
        "stages": {**manifest.stages, STREAM: entry},
        "model": manifest.model.model_copy(update={"stream_delay": DELAY}),
    }
    bundle.update(folder, manifest.model_copy(update=changes))


def _graph(stage: Stage) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    types = {"float": TensorProto.FLOAT, "float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, types[t.dtype], t.axes) for t in tensors]
        for tensors in (stage.inputs, stage.outputs)
    )
    node = helper.make_node
    nodes = [
        node("Concat", ["past_0", "latents"], ["h0"], axis=2),
        node("Slice", ["h0", "minus_two", "end", "two"], ["next_0"]),
        node("Slice", ["h0", "one", "minus_one", "two"], ["late"]),
        node("Slice", ["late", "zero", "three", "one"], ["rgb"]),
        node("Resize", ["rgb", "", "finer"], ["fine"], mode="nearest"),
        node("Concat", ["past_1", "fine"], ["h1"], axis=2),
        node("Slice", ["h1", "minus_two", "end", "two"], ["next_1"]),
        node("Slice", ["h1", "one", "minus_one", "two"], ["later"]),
        node("Tanh", ["later"], ["bounded"]),
        node("Resize", ["bounded", "", "scales"], ["large"], mode="nearest"),
        node("ReduceMean", ["noise_1"], ["mean_noise"], keepdims=0),
        node("ReduceSum", ["timestep"], ["time"], keepdims=0),
        node("ReduceSum", ["place"], ["where"], keepdims=0),
        node("Cast", ["where"], ["somewhere"], to=TensorProto.FLOAT),
        node("Sum", ["mean_noise", "time", "somewhere"], ["sum"]),
        node("Mul", ["sum", "nothing"], ["nil"]),
        node("Add", ["large", "nil"], ["pixels"]),
    ]
    constants = {
        **{"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])},
        **{"three": np.array([3]), "minus_one": np.array([-1]), "minus_two": np.array([-2])},
        "end": np.array([2**31]),
        "finer": np.array([1, 1, 1, 2, 2], np.float32),
        "scales": np.array([1, 1, 8, 16, 16], np.float32),
        "nothing": np.float32(0),
    }
    weights = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, STREAM, inputs, outputs, weights)
    opset = helper.make_opsetid("", 18)
    data: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()
    return data
