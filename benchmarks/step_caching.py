"""What step caching gains and costs on ltx-tiny at 40 steps: hits, speed-up, PSNR and SSIM.

    python benchmarks/step_caching.py [--clips 8] [--calibration 16] [--out FILE]

Each method is measured at three thresholds against the clips of the same prompts and seeds without
a cache; magcache and teacache are calibrated first, with other prompts. `fewer` is the SSIM of what
costs the same without a cache: a clip of so many steps as were computed. One thread; each cached
clip is made beside one without a cache, whose time is its measure. The last line is JSON, the exit
code 1 when a method at its own threshold is below FLOORS.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from time import process_time

import numpy as np
from numpy.typing import NDArray

from ltx_engines import metrics
from ltx_engines.bundle import Bundle
from ltx_engines.prompts import read
from ltx_trt.backend import Choice
from ltx_trt.cache_calibration import Calibration, calibrate
from ltx_trt.cache_table import CacheTable
from ltx_trt.pipeline import Decoded, StageOpened, StepDone, generate
from ltx_trt.request import Request, Wishes, resolve
from ltx_trt.session import OpenSession
from ltx_trt.session.choice import open_stages
from ltx_trt.step_caching import THRESHOLDS, Caching, Method
from report import Facts, machine

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "runtime/ltx_trt/ltx_tiny"
PROMPTS = ROOT / "tools/tiny/prompts.txt"

STEPS = 40
WIDTH, HEIGHT, FRAMES = 128, 128, 25
SEED = 40
"""Of the first clip; those of the calibration are others."""

GRID: dict[Method, tuple[float, ...]] = {
    Method.magcache: (0.06, 0.12, 0.24),
    Method.easycache: (0.02, 0.05, 0.1),
    Method.teacache: (0.02, 0.05, 0.1),
}

FLOORS = {"hit_rate": 0.25, "speed_up": 1.2, "ssim": 0.97}
"""At the method's own threshold, means over clips."""

Frames = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Seconds are the transformer's steps', of the processor."""

    frames: Frames
    reused: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """Means over clips but `worst_ssim`; `speed_up` is of the transformer."""

    method: str
    threshold: float
    computed: float
    hit_rate: float
    speed_up: float
    psnr: float
    ssim: float
    worst_ssim: float
    fewer_steps: int
    fewer_psnr: float
    fewer_ssim: float

    def said(self) -> str:
        return (
            f"{f'{self.method}:{self.threshold:g}':<16}{self.computed:9.1f}{self.hit_rate:9.0%}"
            f"{self.speed_up:10.2f}{self.psnr:8.1f}{self.ssim:9.4f}{self.worst_ssim:9.4f}"
            f"{self.fewer_ssim:9.4f}"
        )


HEAD = (
    f"{'':<16}{'computed':>9}{'reused':>9}{'speed-up':>10}{'PSNR':>8}{'SSIM':>9}{'worst':>9}"
    f"{'fewer':>9}"
)


def make(request: Request, bundle: Bundle, stages: OpenSession) -> Clip:
    reused, frames, seconds = 0, [], 0.0
    with closing(generate(request, bundle, stages)) as events:
        for event in events:
            if isinstance(event, StageOpened) and event.stage == "transformer":
                seconds = -process_time()
            elif isinstance(event, StepDone):
                reused += event.reused
                seconds += process_time() if event.index == event.total else 0.0
            elif isinstance(event, Decoded):
                frames.append(event.frames)
    return Clip(np.concatenate(frames), reused, seconds)


def row(caching: Caching, requests: Sequence[Request], bundle: Bundle, stages: OpenSession) -> Row:
    cached, plain = [], []
    for request in requests:
        cached.append(make(replace(request, caching=caching), bundle, stages))
        plain.append(make(request, bundle, stages))
    reused = mean(clip.reused for clip in cached)
    count = round(STEPS - reused)
    fewer = [replace(r, steps=replace(r.steps, num_inference_steps=count)) for r in requests]
    psnr, ssim = likeness(cached, plain)
    fewer_psnr, fewer_ssim = likeness([make(r, bundle, stages) for r in fewer], plain)
    return Row(
        method=caching.method.value,
        threshold=caching.threshold,
        computed=round(STEPS - reused, 2),
        hit_rate=round(reused / STEPS, 4),
        speed_up=round(sum(c.seconds for c in plain) / sum(c.seconds for c in cached), 3),
        psnr=round(mean(psnr), 2),
        ssim=round(mean(ssim), 5),
        worst_ssim=round(min(ssim), 5),
        fewer_steps=count,
        fewer_psnr=round(mean(fewer_psnr), 2),
        fewer_ssim=round(mean(fewer_ssim), 5),
    )


def likeness(clips: Sequence[Clip], plain: Sequence[Clip]) -> tuple[list[float], list[float]]:
    """PSNR and SSIM of each."""
    pairs = [(a.frames, b.frames) for a, b in zip(clips, plain, strict=True)]
    return [metrics.psnr(*pair) for pair in pairs], [metrics.similarity(*p).ssim for p in pairs]


def measure(
    requests: Sequence[Request], table: CacheTable, bundle: Bundle, stages: OpenSession
) -> Iterator[Row]:
    for method, thresholds in GRID.items():
        needed = None if method is Method.easycache else table
        for threshold in thresholds:
            yield row(Caching(method, threshold, table=needed), requests, bundle, stages)


def calibrated(order: Calibration, bundle: Bundle, stages: OpenSession) -> CacheTable:
    steps = calibrate(order, bundle, stages)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            table: CacheTable = end.value
            return table


def benchmark(clips: int, calibration: int) -> Facts:
    prompts = read(PROMPTS)
    if clips + calibration > len(prompts):
        raise SystemExit(f"{PROMPTS} has {len(prompts)} prompts, not {clips + calibration}")
    with open_stages(TINY, Choice(threads=1)) as stages:
        wishes = Wishes(
            prompts[0],
            width=WIDTH,
            height=HEIGHT,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            seed=SEED,
        )
        first, _ = resolve(wishes, stages.bundle, None)
        requests = [
            replace(first, prompt=prompt, seed=SEED + number)
            for number, prompt in enumerate(prompts[calibration : calibration + clips])
        ]
        order = Calibration(first, prompts[:calibration], (1, 2))
        table = calibrated(order, stages.bundle, stages)
        fit = {"pearson": table.teacache.pearson, "r2": table.teacache.r2}
        print(f"calibrated with {calibration} prompts, 2 seeds: {fit}\n\n{HEAD}", flush=True)
        rows = []
        for found in measure(requests, table, stages.bundle, stages):
            print(found.said(), flush=True)
            rows.append(found)
    return {
        "machine": machine(),
        "steps": STEPS,
        "clips": clips,
        "size": [first.width, first.height, first.num_frames],
        "calibration": {"prompts": calibration, "seeds": 2, **fit},
        "ratios": [round(ratio, 4) for ratio in table.magcache.ratios],
        "rows": [asdict(found) for found in rows],
        "met": {method.value: met(method, rows) for method in Method},
    }


def met(method: Method, rows: Sequence[Row]) -> bool:
    own = [r for r in rows if (r.method, r.threshold) == (method.value, THRESHOLDS[method])]
    return bool(own) and all(getattr(own[0], name) >= floor for name, floor in FLOORS.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=16, help="prompts, of two seeds each")
    parser.add_argument("--out", type=Path, help="also the JSON, in a file")
    options = parser.parse_args(arguments)
    facts = benchmark(options.clips, options.calibration)
    text = json.dumps(facts)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(facts["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
