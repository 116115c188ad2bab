"""What builds take of the machine, said in numbers before the first of them begins."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltx_engines import host
from ltx_engines.errors import UserError
from ltx_export.build_job import Built, Job

if TYPE_CHECKING:
    from onnx import ModelProto

QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear"})

BLOATED = 1.5
"""An engine of more than so many times its weights has something else in it."""
KERNELS = 64_000_000
"""Bytes of kernels that any engine may have beside that."""

GIVE_WAY = "--ignore-limits builds all the same"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Needs:
    """`weights` are those that the graph points to, `memory` is the most that the build takes
    beside their mapped files, `engine` is the file that it writes. All in bytes."""

    weights: int
    memory: int
    engine: int


def weight_bytes(graph: Path) -> int:
    """Of what the graph has in other files."""
    import onnx

    return _weight_bytes(onnx.load(graph, load_external_data=False))


def of(graph: Path) -> Needs:
    """By the factors of stage_plan.py, which were measured."""
    import onnx

    from ltx_export import stage_plan

    proto = onnx.load(graph, load_external_data=False)
    weights = _weight_bytes(proto)
    kind = _kind(proto)
    return Needs(
        weights,
        stage_plan.BUILD_BASE + int(weights * stage_plan.BUILD_FACTOR[kind]),
        weights + stage_plan.KERNEL_BYTES * len(proto.graph.node),
    )


def _kind(proto: "ModelProto") -> str:
    operators = {node.op_type for node in proto.graph.node}
    if "Conv" in operators:
        return "conv"
    if QUANTIZED & operators:
        return "small"
    return "text" if any(value.name == "input_ids" for value in proto.graph.input) else "float"


def _weight_bytes(proto: "ModelProto") -> int:
    from onnx import TensorProto

    return sum(
        int(entry.value)
        for tensor in proto.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "length"
    )


def check(jobs: Iterable[Job], *, ignored: bool) -> None:
    """They are built one after the other: the largest decides about memory, all about the disk.

    Raises:
        UserError: there is too little, and that is not to be ignored.
    """
    needs = {job.engine: of(job.graph) for job in jobs}
    if not needs:
        return
    for problem in _problems(needs):
        if not ignored:
            raise UserError(f"{problem}; {GIVE_WAY}")
        log.warning("%s", problem)


def _problems(needs: dict[Path, Needs]) -> Iterable[str]:
    largest = max(needs, key=lambda engine: needs[engine].memory)
    wanted, free = needs[largest].memory, host.free_memory()
    if free is not None and wanted > free:
        yield (
            f"{largest.name} takes {wanted:,} bytes of memory to build, {free:,} are free; end "
            "other programs, or give --split auto for a transformer"
        )
    engines, room = sum(one.engine for one in needs.values()), host.free_disk(largest.parent)
    if engines > room:
        yield f"the engines take {engines:,} bytes, {largest.parent.parent} has {room:,} left"


def warn_of_bloat(job: Job, built: Built) -> None:
    if built.bytes > BLOATED * job.weight_bytes + KERNELS:
        log.warning(
            "%s has %s bytes for weights of %s: a builder that writes activations into an engine "
            "does that (TensorRT 11.2.1, issue 4841); try another version of it",
            job.engine.name,
            f"{built.bytes:,}",
            f"{job.weight_bytes:,}",
        )
