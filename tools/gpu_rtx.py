"""How TensorRT-RTX takes to this machine's card, in one way of telling it for which card to build.

    python tools/gpu_rtx.py "no list" | CURRENT | SM89 | portable

A product of two small matrices is built, deserialized and run. The last line is JSON: how far it
came, and the library's own words where it did not go on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ltx_engines.errors import UserError
from ltx_trt.session.device import Device
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.engine_api import EngineError

SIZE = 64


def build(way: str) -> tuple[bytes | None, list[str]]:
    """The plan, and the builder's complaints."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float16, (SIZE, SIZE))
    halves = np.full((SIZE, SIZE), 0.5, np.float16)
    weight = network.add_constant((SIZE, SIZE), trt.Weights(halves))
    plain = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(x, plain, weight.get_output(0), plain)
    product.get_output(0).name = "y"
    network.mark_output(product.get_output(0))
    config = builder.create_builder_config()
    chosen = capabilities(trt, way)
    if chosen:
        config.num_compute_capabilities = len(chosen)
    for index, capability in enumerate(chosen):
        config.set_compute_capability(capability, index)
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan), log.errors


def capabilities(trt: Any, way: str) -> list[Any]:
    """As the builder spells them; none for no list.

    Raises:
        AttributeError: it does not know this one.
    """
    known = trt.ComputeCapability
    if way == "no list":
        return []
    if way == "portable":
        return [getattr(known, name) for name in ("SM80", "SM86", "SM89", "SM120")]
    return [getattr(known, way)]


def run(plan: bytes) -> list[float]:
    """A corner of what comes out for ones, which should be SIZE / 2 everywhere."""
    with TemporaryDirectory() as folder, Device.open("tensorrt-rtx") as device:
        file = Path(folder) / "product.engine"
        file.write_bytes(plan)
        engine = device.library.load(file)
        driver, stream = device.driver, device.stream
        ones = np.ones((SIZE, SIZE), np.float16)
        ends = {name: driver.allocate(ones.nbytes) for name in ("x", "y")}
        driver.upload(ends["x"], ones, stream)
        context = engine.context(0)
        context.set_shape("x", ones.shape)
        if (size := context.memory()) > 0:
            context.set_memory(driver.allocate(size), size)
        for name, address in ends.items():
            context.set_address(name, address)
        context.enqueue(stream)
        found = np.zeros_like(ones)
        driver.download(found, ends["y"], stream)
        driver.synchronize(stream)
        context.close()
        engine.close()
    return [float(number) for number in found[0, :2]]


def main() -> None:
    way = sys.argv[1]
    facts: dict[str, Any] = {"built": False, "runs": False}
    try:
        plan, errors = build(way)
        facts |= {"built": plan is not None, "errors": errors}
        if plan is not None:
            facts |= {"bytes": len(plan), "found": run(plan)}
            facts["runs"] = facts["found"] == [SIZE / 2] * 2
    except (AttributeError, DeviceError, EngineError, UserError) as error:
        facts["refused"] = f"{type(error).__name__}: {error}"
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
