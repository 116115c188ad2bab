"""Whether an engine's weights come to the GPU while another engine runs there.

    python tools/gpu_swaps.py BUNDLE

One engine of the bundle's transformer runs; a second one of the same plan sleeps, and is woken on
an idle GPU and beside the first. The numbers decide nothing: a chain whose parts take turns
(`chain_runner.py`) gives the same frames, but hides no more of its loads than `hidden` says. The
last line is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from math import ceil, prod
from pathlib import Path
from statistics import median
from typing import Any

from ltx_engines import engine_entry
from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.engine_entry import EngineEntry
from ltx_trt.session.device import Device
from ltx_trt.session.element_types import stored
from ltx_trt.session.engine_runner import EngineRunner
from ltx_trt.session.memory import Buffers
from ltx_trt.session.opening import Opening
from ltx_trt.session.runner import Runner

STAGE = "transformer"
TRIES = 3
MOST = 200
"""Runs at once."""


def measure(device: Device, bundle: Bundle) -> dict[str, Any]:
    """Seconds; `hidden` is the share of the load that costs nothing, 1 if it overlaps wholly."""
    capability, flavour = device.driver.capability, device.library.flavour
    entry = engine_entry.choose(bundle.path, bundle.manifest, STAGE, capability, flavour)[0]
    opening, driver, stream = Opening(bundle, device), device.driver, device.stream
    with ExitStack() as undo:
        runner = EngineRunner(opening.engine(entry), device.arena, entry)
        undo.callback(runner.close)
        sleeper = opening.engine(entry, swaps=True)
        undo.callback(sleeper.close)
        if not sleeper.sleep():
            return {"skipped": f"engines of {flavour} do not sleep"}
        sleeper.wake()
        bind(entry, runner, undo.enter_context(Buffers(driver, stream)))

        def work(times: int) -> None:
            for _ in range(times):
                runner.enqueue(stream)
            driver.synchronize(stream)

        def wake() -> float:
            sleeper.sleep()
            return seconds(sleeper.wake)

        def both() -> None:
            for _ in range(times):
                runner.enqueue(stream)
            sleeper.wake()
            beside.append(time.perf_counter() - start)
            driver.synchronize(stream)

        work(1)
        step, alone = seconds(lambda: work(TRIES)) / TRIES, median(wake() for _ in range(TRIES))
        times, beside = min(MOST, max(1, ceil(2 * alone / step))), list[float]()
        worked = seconds(lambda: work(times))
        sleeper.sleep()
        start = time.perf_counter()
        together = seconds(both)
    return {
        "runs": times,
        "wake_s": round(alone, 5),
        "work_s": round(worked, 5),
        "woken_after_s": round(beside[0], 5),
        "both_s": round(together, 5),
        "hidden": round((alone + worked - together) / alone, 3),
    }


def bind(entry: EngineEntry, runner: Runner, buffers: Buffers) -> None:
    """To the largest shapes. Whatever lies there: a kernel's time does not depend on it."""
    sizes = {axis: most for axis, (_, _, most) in entry.key.profiles[0].items()}
    shapes, addresses = {}, {}
    for tensor in (*entry.inputs, *entry.outputs):
        shape = tuple(a if isinstance(a, int) else sizes[a] for a in tensor.axes)
        size = prod(shape) * stored(tensor.dtype).itemsize
        shapes[tensor.name], addresses[tensor.name] = shape, buffers.get(tensor.name, size)
    runner.bind({tensor.name: shapes[tensor.name] for tensor in entry.inputs}, addresses)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    with Device.open("tensorrt-rtx") as device:
        found = measure(device, open_bundle(Path(sys.argv[1])))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
