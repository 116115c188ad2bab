"""Steps of a bundle's transformer on this machine's GPU, in a process of its own.

Called by weight_inputs.py. The engines are built for the card that is here; the clock is the GPU's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

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

STAGE, TEXT, VELOCITY = "transformer", 256, "velocity"
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
            velocity = bind(device, bundle, runner, shape)
            seconds = [timed(device, runner) for _ in range(WARM_UP + STEPS)][WARM_UP:]
            captured = same_when_captured(device, runner, *velocity)
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
            "same_when_captured": captured,
        }


def opened(device: Device, bundle: Bundle) -> Runner:
    capability = device.driver.capability
    chain = engine_entry.choose(bundle.path, bundle.manifest, STAGE, capability, None)
    (plan,) = residency.plan([needed(bundle.manifest, chain)], device.driver.memory()[0])
    return Opening(bundle, device).runner(chain, plan)


def bind(device: Device, bundle: Bundle, runner: Runner, shape: str) -> tuple[Address, int]:
    """Small numbers everywhere: a kernel's time does not depend on them, nor overflow. Returns
    where the velocity is, and how many bytes."""
    width, height, frames = map(int, shape.split("x"))
    tokens = VideoShape(frames, height, width).tokens
    sizes = {"batch": 1, "tokens": tokens, "timesteps": 1, "text": TEXT}
    entry = bundle.stage(STAGE)
    shapes, bytes_of, addresses = {}, dict[str, int](), dict[str, Address]()
    for tensor in (*entry.inputs, *entry.outputs):
        found = tuple(a if isinstance(a, int) else sizes[a] for a in tensor.axes)
        size = prod(found) * stored(runner.tensors[tensor.name].dtype).itemsize
        addresses[tensor.name] = device.driver.allocate(size)
        device.driver.fill(addresses[tensor.name], 0x3C, size, device.stream)
        shapes[tensor.name], bytes_of[tensor.name] = found, size
    runner.bind({t.name: shapes[t.name] for t in entry.inputs}, addresses)
    return addresses[VELOCITY], bytes_of[VELOCITY]


def same_when_captured(device: Device, runner: Runner, at: Address, size: int) -> bool | None:
    """Whether a CUDA graph of a step gives the same bytes, None if it cannot be captured. An engine
    whose weights are inputs is in it once for each block, at other addresses each time."""
    if not runner.capturable:
        return None
    driver, stream = device.driver, device.stream

    def found(work: Callable[[], None]) -> bytes:
        driver.fill(at, 0, size, stream)
        work()
        driver.download(values := np.empty(size, np.uint8), at, stream)
        driver.synchronize(stream)
        return values.tobytes()

    wanted = found(lambda: runner.enqueue(stream))
    driver.begin_capture(stream)
    try:
        runner.enqueue(stream)
    finally:
        graph = driver.end_capture(stream)
    try:
        return found(lambda: driver.launch(graph, stream)) == wanted
    finally:
        driver.close_graph(graph)


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
