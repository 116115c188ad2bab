"""Steps of a bundle's transformer on this machine's GPU, in a process of its own.

Called by weight_inputs.py. The engines are built for the card that is here; the clock is the GPU's.
"""

from __future__ import annotations

import time
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from child import run
from ltx_engines import engine_entry
from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.shapes import VideoShape
from ltx_trt.session import residency
from ltx_trt.session.device import Device
from ltx_trt.session.driver import Address
from ltx_trt.session.element_types import stored
from ltx_trt.session.opening import Opening, needed
from ltx_trt.session.runner import Runner
from quantized_slice import EXPORT

STAGE, TEXT = "transformer", 256
WARM_UP, STEPS = 3, 10


def step(folder: Path, weights: str, shape: str) -> dict[str, Any]:
    with Device.open("tensorrt-rtx") as device:
        options = ["--gpu", f"sm{device.driver.capability}", "--shape", shape, "--branches", "1"]
        start = time.perf_counter()
        run(
            [
                *EXPORT,
                "build-engine",
                folder,
                "--stages",
                STAGE,
                *options,
                "--engine-weights",
                weights,
            ]
        )
        built = time.perf_counter() - start
        start, bundle = time.perf_counter(), open_bundle(folder)
        runner = opened(device, bundle)
        try:
            ready = time.perf_counter() - start
            bind(device, bundle, runner, shape)
            seconds = [timed(device, runner) for _ in range(WARM_UP + STEPS)][WARM_UP:]
        finally:
            runner.close()
        free, total = device.driver.memory()
        return {
            "device": device.driver.name,
            "weights": weights,
            "build_s": round(built, 2),
            "open_s": round(ready, 2),
            "step_s": round(median(seconds), 5),
            "step_s_each": [round(second, 5) for second in seconds],
            "memory": total - free,
        }


def opened(device: Device, bundle: Bundle) -> Runner:
    capability = device.driver.capability
    chain = engine_entry.choose(bundle.path, bundle.manifest, STAGE, capability, None)
    (plan,) = residency.plan([needed(bundle.manifest, chain)], device.driver.memory()[0])
    return Opening(bundle, device).runner(chain, plan)


def bind(device: Device, bundle: Bundle, runner: Runner, shape: str) -> None:
    """Small numbers everywhere: a kernel's time does not depend on them, nor overflow."""
    width, height, frames = map(int, shape.split("x"))
    tokens = VideoShape(frames, height, width).tokens
    sizes = {"batch": 1, "tokens": tokens, "timesteps": 1, "text": TEXT}
    entry = bundle.stage(STAGE)
    shapes, addresses = {}, dict[str, Address]()
    for tensor in (*entry.inputs, *entry.outputs):
        found = tuple(a if isinstance(a, int) else sizes[a] for a in tensor.axes)
        size = prod(found) * stored(runner.tensors[tensor.name].dtype).itemsize
        addresses[tensor.name] = device.driver.allocate(size)
        device.driver.fill(addresses[tensor.name], 0x3C, size, device.stream)
        shapes[tensor.name] = found
    runner.bind({t.name: shapes[t.name] for t in entry.inputs}, addresses)


def timed(device: Device, runner: Runner) -> float:
    driver, stream = device.driver, device.stream
    begin, end = driver.event(), driver.event()
    driver.record(begin, stream)
    runner.enqueue(stream)
    driver.record(end, stream)
    driver.synchronize(stream)
    seconds = driver.elapsed(begin, end)
    for event in (begin, end):
        driver.close_event(event)
    return seconds
