"""Chains of block groups on ONNX Runtime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from ltx_engines import cpu
from ltx_engines.bundle import Bundle, StageEntry
from ltx_engines.cache_key import Part
from ltx_export import split
from ltx_export.block_groups import STAGE
from ltx_export.split import Group
from ltx_trt.session import onnxruntime_session as runtime

Arrays = dict[str, NDArray[Any]]

MASKED, KEPT = "prompt_mask", "skip_layer_mask"


def groups(bundle: Bundle, parts: Sequence[Part]) -> list[Group]:
    entry = bundle.stage(STAGE)
    return list(split.split(ir.load(bundle.file(entry.file)), entry, parts))


class Session:
    """As the runtime opens one."""

    def __init__(self, model: ir.Model, entry: StageEntry, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_mem_pattern = False
        formats = entry.quantization.layers if entry.quantization else ()
        for name, value in cpu.session_options(formats).items():
            options.add_session_config_entry(name, value)
        options.add_session_config_entry(runtime.FOLDER, str(folder))
        self.session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(),
            options,
            providers=[runtime.CPU],
            disabled_optimizers=[runtime.FOLDING],
        )

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        wanted = {node.name: feeds[node.name] for node in self.session.get_inputs()}
        names = [node.name for node in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, wanted), strict=True))


def feeds(entry: StageEntry, batch: int, tokens: int, *, per_token: bool) -> Arrays:
    """Text that ends in padding, and a block that is perturbed in the last branch."""
    source = np.random.default_rng(tokens)
    sizes = {"batch": batch, "tokens": tokens, "text": 9, "timesteps": tokens if per_token else 1}
    made = {
        tensor.name: source.random(
            [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.axes], np.float32
        )
        for tensor in entry.inputs
    }
    made[MASKED], made[KEPT] = np.ones_like(made[MASKED]), np.ones_like(made[KEPT])
    made[MASKED][-1, 5:] = 0
    made[KEPT][-1, -1] = 0
    return made


def run(chain: Sequence[Session], given: Arrays) -> NDArray[Any]:
    known = dict(given)
    for session in chain:
        known |= session(known)
    return known["velocity"]


def same_bits(bundle: Bundle, parts: Sequence[Part], given: Arrays) -> bool:
    """Whether the chain of these parts gives what the whole transformer does, and not nothing."""
    entry = bundle.stage(STAGE)
    whole = Session(ir.load(bundle.file(entry.file)), entry, bundle.path)
    wanted = whole(given)["velocity"]
    chain = [Session(group.model, entry, bundle.path) for group in groups(bundle, parts)]
    return bool(np.abs(wanted).max() > 0) and np.array_equal(run(chain, given), wanted)
