"""Denoising steps of a bundle's engines on this machine's GPU, in a process of its own.

    python benchmarks/engine_gpu_step.py BUNDLE WIDTHxHEIGHTxFRAMES STEPS
                                         [--no-cuda-graphs] [--device-memory BYTES]

Called by engine_gpu.py. Everything is as in a run of `ltx-trt`, but that latents and prompt are
made up. A step's seconds are those between two of its ends, as the host sees them; copies between
host and GPU are counted at the driver. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np

from ltx_engines.shapes import VideoShape
from ltx_engines.targets import Flavour
from ltx_trt import sampler
from ltx_trt.backend import Choice
from ltx_trt.coordinates import token_coordinates
from ltx_trt.denoising import Denoises, Denoising, Text, on_the_host
from ltx_trt.guidance import StepGuidance
from ltx_trt.noise import Noise
from ltx_trt.passes import Pass
from ltx_trt.pipeline import Planned
from ltx_trt.session import Session
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.session.driver import Driver

WARM_UP = 3
"""The first step sets engines up, the second is captured."""
TEXT = 256
"""Of a prompt, where the bundle does not say."""
PLAIN = StepGuidance(guidance_scale=1.0, stg_scale=0.0, rescaling_scale=1.0)
COPIES = ("upload", "download")


class Counting:
    """A driver that counts the copies between host and GPU."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.copies: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._driver, name)
        if name not in COPIES:
            return found

        def counted(*given: Any) -> Any:
            self.copies[name] += 1
            return found(*given)

        return counted


def measure(stages: Stages, shape: VideoShape, steps: int, copies: Counter[str]) -> dict[str, Any]:
    """One branch, random latents. `stages` are open, and count into `copies`."""
    job = denoising(stages, shape, WARM_UP + steps)
    notes = stages.prepare(Planned((Pass(shape, job.table, job.guidance),)))
    start = time.perf_counter()
    with stages("transformer") as session:
        opened = time.perf_counter() - start
        ends, counts = [], []
        for _ in walk(session, job):
            ends.append(time.perf_counter())
            counts.append(sum(copies.values()))
        loop = isinstance(session, Denoises)
    seconds = np.diff(ends)[WARM_UP - 1 :]
    return {
        "notes": notes,
        "open_s": round(opened, 3),
        "on_the_gpu": loop,
        "step_s": round(float(median(seconds)), 6),
        "step_s_each": [round(float(second), 6) for second in seconds],
        "transfers_per_step": [int(count) for count in np.diff(counts)],
        "peak_memory": None if stages.watch is None else stages.watch.peak,
    }


def walk(session: Session, job: Denoising) -> Generator[None, None, Any]:
    return session.denoise(job) if isinstance(session, Denoises) else on_the_host(session, job)


def denoising(stages: Stages, shape: VideoShape, steps: int) -> Denoising:
    manifest, noise = stages.bundle.manifest, Noise(0)
    tensors = {tensor.name: tensor.axes for tensor in stages.bundle.stage("transformer").inputs}
    width = tensors["prompt_embeds"][-1]
    words = TEXT if manifest.tokenizer is None else manifest.tokenizer.max_length
    text = Text(noise.normal((1, words, int(width))), np.ones((1, words), np.float32))
    sigmas = np.linspace(1, 0, steps + 1).tolist()
    model = manifest.model
    return Denoising(
        latents=noise.normal((1, shape.tokens, model.latent_channels)),
        coordinates=token_coordinates(shape, 30.0, causal=model.causal_temporal_positioning),
        text=text,
        uncond=text,
        table=sampler.euler(sigmas),
        guidance=(PLAIN,) * steps,
        num_layers=model.num_layers,
        noise=noise,
    )


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("bundle", type=Path)
    words.add_argument("shape")
    words.add_argument("steps", type=int)
    words.add_argument("--no-cuda-graphs", action="store_true")
    words.add_argument("--device-memory", type=int, metavar="BYTES")
    asked = words.parse_args()
    width, height, frames = map(int, asked.shape.split("x"))
    choice = Choice(device_memory=asked.device_memory, cuda_graphs=not asked.no_cuda_graphs)
    drivers: list[Counting] = []

    def counted(flavour: Flavour) -> Device:
        from ltx_trt.session.cuda_driver import CudaDriver
        from ltx_trt.session.tensorrt_adapter import TensorRT

        drivers.append(Counting(CudaDriver()))
        driver = cast(Driver, drivers[-1])
        return Device.of(driver, TensorRT(flavour, driver))

    with open_stages(asked.bundle, choice, open_device=counted) as stages:
        if not drivers:
            raise SystemExit(f"{asked.bundle} has no engines: ltx-export build-engine")
        (driver,) = drivers
        found = measure(stages, VideoShape(frames, height, width), asked.steps, driver.copies)
    print(json.dumps({"cuda_graphs": not asked.no_cuda_graphs, **found}))


if __name__ == "__main__":
    main()
