"""One engine from one graph, by TensorRT or TensorRT-RTX: the only file that imports a builder.

    python -m ltx_export.build < JOB        what build_process.py runs, one process for each engine

The process reads a job (`build_job.py`) from the first line of its input and writes one JSON object
in each line of its output: {"phase": ..., "of": ..., "done": ...} while it builds, {"note": ...}
for what a person should know, and at last {"built": ...} or {"failed": ...}. It ends when its input
does, so a parent that dies takes it along.
"""

import ctypes
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from typing import IO, Any

from ltx_engines import libraries
from ltx_engines.errors import UserError
from ltx_engines.libraries import COMMANDS as COMMANDS
from ltx_engines.libraries import MODULES as MODULES
from ltx_engines.targets import Flavour
from ltx_export import card as cards
from ltx_export import layer_table, text_products, timing_cache
from ltx_export.build_job import BuildError as BuildError
from ltx_export.build_job import Built as Built
from ltx_export.build_job import Job as Job
from ltx_export.build_job import Shapes as Shapes
from ltx_export.build_job import from_json
from ltx_export.card import Card
from ltx_export.mapped_weights import MappedWeights

WORKSPACE_SHARE = 0.8
"""Of the memory that is free beside the weights, unless the user says. TensorRT would take all."""

Tell = Callable[[dict[str, object]], None]


def version(flavour: Flavour) -> str:
    """Of the builder that is installed, without loading it.

    Raises:
        UserError: there is none.
    """
    if (found := libraries.version(flavour)) is None:
        raise UserError(
            f"{MODULES[flavour]} is not installed, which builds for {flavour}; {COMMANDS[flavour]}"
        )
    return found


def build(job: Job, tell: Tell) -> Built:
    """Write engine and table to the job's files, which are the caller's to remove on failure.

    Raises:
        BuildError: the builder refuses.
        UserError: the job is for another machine.
    """
    trt = import_module(MODULES[job.flavour])
    if (loaded := libraries.released(str(trt.__version__))) != job.version:
        raise UserError(
            f"{job.flavour} {loaded} was loaded, {job.version} is installed; "
            f"repair it: {COMMANDS[job.flavour]}"
        )
    at_hand = check_card(job.targets) if job.flavour == "tensorrt" else None
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    mapped = MappedWeights(job.weights)  # to be read until the engine is written
    _parse(trt.OnnxParser(network, log), job, mapped, log)
    _check_types(trt, network, job)
    _mark(network, job)
    # Only where the builder's memory is known to gain; TensorRT measures what is faster.
    apart = text_products.keep_apart(trt, network) if job.flavour == "tensorrt-rtx" else []
    config = _config(trt, builder, job)
    if at_hand is not None:
        _config_for(trt, config, job, at_hand, tell)
    config.progress_monitor = _monitor(trt, tell)
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, ends in shapes.items():
            profile.set_shape(name, *ends)
        config.add_optimization_profile(profile)
    with job.engine.open("wb") as file:
        writer = _writer(trt, file)
        if not builder.build_serialized_network_to_stream(network, config, writer):
            raise BuildError(_complaint(log))
        file.flush()
        os.fsync(file.fileno())
    del apart  # the network's constants, until here
    if at_hand is not None:
        timing_cache.save(config, timing_cache.place(job.version, at_hand.name))
    table = tuple(layer_table.layers("\n".join(log.tables)))
    job.layers.write_text(layer_table.to_json(table), encoding="utf-8")
    return Built(writer.bytes, writer.digest.hexdigest(), log.activations)


def _strongly_typed(trt: Any) -> int:
    """TensorRT 11 knows nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _config(trt: Any, builder: Any, job: Job) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.flavour == "tensorrt-rtx":
        config.num_compute_capabilities = len(job.targets)
        for index, target in enumerate(job.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{target}"), index)
        # Else memory may come from the driver while it runs, which no CUDA graph can hold. Streamed
        # weights do so by nature, and RTX refuses to build both.
        flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if flag is not None and not job.weight_streaming:
            config.set_flag(flag)
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    if job.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if job.refittable:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)  # REFIT would be all weights, and slower
    return config


def _config_for(trt: Any, config: Any, job: Job, at_hand: Card, tell: Tell) -> None:
    """What depends on the GPU on which TensorRT measures."""
    if job.workspace is None:
        limit = int(max(at_hand.free - job.weight_bytes, 0) * WORKSPACE_SHARE)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
        tell(
            {
                "note": f"workspace of {limit:,} bytes, of {at_hand.free:,} that are free on "
                f"{at_hand.name}"
            }
        )
    timing_cache.use(config, timing_cache.place(job.version, at_hand.name))


def _mark(network: Any, job: Job) -> None:
    for name in job.refittable:
        if not network.mark_weights_refittable(name):
            raise BuildError(f"{name} cannot be refitted: it is no weight of the network")


def _parse(parser: Any, job: Job, mapped: MappedWeights, log: Any) -> None:
    if not job.weights:
        read = parser.parse_from_file(str(job.graph))
    else:  # a parser follows relative paths only
        read = parser.load_model_proto(job.graph.read_bytes())
        for name, address, size in mapped.initializers(job.graph):
            read = read and parser.load_initializer(name, address, size)
        read = read and parser.parse_model_proto()
    if not read:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [f"{error.node_name()}: {error.desc()}" for error in errors]
        raise BuildError(said[0] if said else _complaint(log))


def _check_types(trt: Any, network: Any, job: Job) -> None:
    """A scale of another type than its activations changes an output's type without a word."""
    words = {trt.DataType.BF16: "bfloat16", trt.DataType.HALF: "float16"}
    words |= {trt.DataType.FLOAT: "float32", trt.DataType.INT64: "int64"}
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    tensors += [network.get_output(index) for index in range(network.num_outputs)]
    found = {tensor.name: words.get(tensor.dtype, str(tensor.dtype)) for tensor in tensors}
    for name, wanted in job.types.items():
        if found.get(name) != wanted:
            raise BuildError(f"{name} is {found.get(name, 'not there')}, the table says {wanted}")


def _complaint(log: Any) -> str:
    return log.errors[0] if log.errors else "it gave no reason"


def _log(trt: Any) -> Any:
    """Keeps the complaints, and what of a verbose log is worth it: a 2B model's has 20 MB."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.tables: list[str] = []
            self.activations = 0

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))
            elif message.startswith(ACTIVATIONS):
                size = int(message.removeprefix(ACTIVATIONS).split()[0])
                self.activations = max(self.activations, size)  # a line for each profile
            elif layer_table.is_table(message):
                self.tables.append(message)

    return Log()


ACTIVATIONS = "Total Activation Memory: "


def _writer(trt: Any, file: IO[bytes]) -> Any:
    """The engine goes to the disk piece by piece, and is hashed on the way."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.digest = hashlib.sha256()
            self.bytes = 0

        def write(self, data: bytes) -> int:
            self.digest.update(data)
            self.bytes += file.write(data)
            return len(data)

    return Writer()


def _monitor(trt: Any, tell: Callable[[dict[str, object]], None]) -> Any:
    """Tells of the outermost phase that has steps."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, _: str | None, steps: int) -> None:
            self.steps[phase] = steps
            tell({"phase": phase, "done": 0, "of": steps})

        def step_complete(self, phase: str, step: int) -> bool:
            tell({"phase": phase, "done": step + 1, "of": self.steps.get(phase, 0)})
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def check_card(targets: tuple[int, ...]) -> Card:
    """TensorRT measures kernels on the card that it builds for."""
    found = cards.at_hand()
    if found is None:
        raise UserError(
            "TensorRT builds on the GPU that it builds for, and there is none here; build where "
            "it is, or for a consumer card anywhere with --backend tensorrt-rtx"
        )
    if targets != (found.capability,):
        wanted = ", ".join(f"SM{target}" for target in targets)
        raise UserError(
            f"TensorRT builds for the GPU at hand, which is SM{found.capability}, not for {wanted};"
            f" give --gpu sm{found.capability} alone"
        )
    return found


def card() -> int | None:
    """The compute capability of the first visible GPU; None if there is none."""
    found = cards.at_hand()
    return None if found is None else found.capability


def main() -> int:
    """What the builder prints goes to stderr, so that stdout stays a protocol."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)

        def tell(message: dict[str, object]) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        if not (line := sys.stdin.readline()):
            return 1  # whoever asked was stopped before saying what for
        job = from_json(line)
        threading.Thread(target=_end_with_input, daemon=True).start()
        threading.Thread(target=give_back, daemon=True).start()
        try:
            built = build(job, tell)
        except (BuildError, UserError, OSError) as error:
            kinds = {"mendable": UserError, "refused": BuildError}
            said = {word: isinstance(error, kind) for word, kind in kinds.items()}
            tell({"failed": str(error), **said})
            return 2
        tell({"built": asdict(built)})
        channel.flush()
        os._exit(0)  # a builder's own end may take seconds, and may crash


TRIM_INTERVAL = 0.25
"""Seconds."""


def give_back() -> None:
    """What the builder has freed goes back to the system at once. Between its largest pieces glibc
    would keep it: 0.4 of 5.6 GB for the 2B transformer (TensorRT-RTX 1.7.1, 2026-11)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:  # other C libraries have none
        time.sleep(TRIM_INTERVAL)
        trim(0)


def _end_with_input() -> None:
    # The descriptor, since a thread in sys.stdin would hold its lock at exit.
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
