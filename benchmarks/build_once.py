"""One TensorRT-RTX build in a process of its own, for a GPU that need not be there.

    python benchmarks/build_once.py MODEL.onnx ENGINE '{"batch": [1, 2], "tokens": [256, 16384]}'

An axis is its smallest and its largest size; the engine is tuned for the largest. The last line is
JSON.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

from ltx_export import text_products
from ltx_export.build import give_back

CAPABILITY = trt.ComputeCapability.SM89
FACTS = re.compile(r"Total (Activation|Weights) Memory: (\d+)")


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps the complaints, and what the builder says of memory."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.memory: dict[str, int] = {}

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)
        self.memory |= {name.lower(): int(size) for name, size in FACTS.findall(message)}


class File(trt.IStreamWriter):  # type: ignore[misc]
    """The engine goes to the disk piece by piece."""

    def __init__(self, path: Path) -> None:
        trt.IStreamWriter.__init__(self)
        self.file = path.open("wb")
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.bytes += self.file.write(data)
        return len(data)


def profile(builder: Any, network: Any, axes: dict[str, tuple[int, int]]) -> Any:
    found = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        ends = [
            tuple(
                size if size > 0 else axes[tensor.get_dimension_name(axis)][end]
                for axis, size in enumerate(tensor.shape)
            )
            for end in (0, 1)
        ]
        found.set_shape(tensor.name, ends[0], ends[1], ends[1])
    return found


def build(model: Path, engine: Path, axes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    log, start = Log(), time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        raise SystemExit(f"{model} was not parsed: {log.errors[:1]}")
    parsed = time.perf_counter()
    apart = text_products.keep_apart(trt, network)  # as the product does, like give_back
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(CAPABILITY, 0)
    config.add_optimization_profile(profile(builder, network, axes))
    writer = File(engine)
    if not builder.build_serialized_network_to_stream(network, config, writer):
        raise SystemExit(f"{model} was not built: {log.errors[:1]}")
    del apart
    return {
        "parse_s": round(parsed - start, 2),
        "build_s": round(time.perf_counter() - parsed, 2),
        "engine": writer.bytes,
        "activations": log.memory["activation"],
        "weights": log.memory["weights"],
    }


if __name__ == "__main__":
    arguments = sys.argv[1:]
    threading.Thread(target=give_back, daemon=True).start()
    sizes = {axis: tuple(ends) for axis, ends in json.loads(arguments[2]).items()}
    print(json.dumps(build(Path(arguments[0]), Path(arguments[1]), sizes)))
