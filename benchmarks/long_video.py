"""Forty seconds of ltx-tiny, made in chunks of one: does each second show what was asked for, and
do the chunks meet without a jump?

    python benchmarks/long_video.py [--clips 6] [--seconds 40] [--no-peer] [--sheet FILE.png]

In this little world a shape that moves one way for 40 seconds would leave the picture, so each
second has a text of its own and the shape turns: right, left, right, ... The detector, which is no
model, must find in every second colour, background and that second's direction. A join is the step
from the last frame of a chunk to the first of the next; it may differ (mean absolute difference of
all pixels) at most twice as much as two frames within a chunk do on average.

The other way to go on, for comparison: each chunk is a clip of its own whose first frames are the
last of the one before, encoded anew, as in the original's video extension. The last line is JSON,
the exit code 1 when the chunks of ltx-trt do not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from ltx_trt import media
from ltx_trt.backend import Choice
from ltx_trt.conditioning import Item
from ltx_trt.pipeline import Frames, Planned, frames_of, generate
from ltx_trt.request import Wishes, resolve
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages
from report import Facts, machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

from tiny import clips  # noqa: E402 - in a folder of tools
from tiny.detector import detect  # noqa: E402

BUNDLE = ROOT / "runtime/ltx_trt/ltx_tiny"
RATE, CHUNK, TAIL = 24, 25, 9
LIMIT = 2.0
BACK = {"right": "left", "left": "right", "up": "down", "down": "up"}


@dataclass(frozen=True, slots=True)
class Turning:
    """A scene whose shape turns each second."""

    colour: str
    background: str
    direction: str

    def heading(self, second: int) -> str:
        return BACK[self.direction] if second % 2 else self.direction

    def prompt(self, second: int) -> str:
        way = self.heading(second)
        return f"a {self.colour} circle moves {way} on a {self.background} background"


@dataclass(frozen=True, slots=True)
class Made:
    """`joins`: index of the first frame of each chunk but the first."""

    frames: Frames
    joins: tuple[int, ...]
    seconds: float


def scenes(count: int) -> list[Turning]:
    """Of combinations that training never showed, as far apart as they lie in the list."""
    held_out = [s for s in clips.scenes() if s.held_out and s.shape == "circle"]
    chosen = [held_out[index] for index in np.linspace(0, len(held_out) - 1, count).astype(int)]
    return [Turning(s.colour, s.background, s.direction) for s in chosen]


def in_latents(scene: Turning, seconds: int, stages: Stages, seed: int) -> Made:
    """What `ltx-trt run --chunk` makes."""
    wishes = Wishes(
        scene.prompt(0),
        num_frames=seconds * RATE + 1,
        seed=seed,
        chunk=CHUNK / RATE,
        prompt_at=tuple(f"{second}:{scene.prompt(second)}" for second in range(1, seconds)),
    )
    request, _ = resolve(wishes, stages.bundle)
    started = perf_counter()
    events = list(generate(request, stages.bundle, stages))
    windows = next(event for event in events if isinstance(event, Planned)).windows
    joins = tuple(part.first_new_frame for part in windows[1:])
    return Made(frames_of(events), joins, perf_counter() - started)


def through_pixels(scene: Turning, seconds: int, stages: Stages, seed: int) -> Made:
    """Each chunk begins with the last frames of the one before."""
    parts: list[Frames] = []
    joins: list[int] = []
    count, started = 0, perf_counter()
    while count <= seconds * RATE:
        prompt = scene.prompt(count // RATE)
        wishes = Wishes(prompt, num_frames=CHUNK, seed=seed + len(parts))
        request, _ = resolve(wishes, stages.bundle)
        if parts:
            tail = parts[-1][-TAIL:].transpose(3, 0, 1, 2)[None].astype(np.float32)
            held = Item(tail / np.float32(127.5) - 1)
            request = replace(request, conditioning=(held,))
            joins.append(count)
        made = frames_of(generate(request, stages.bundle, stages))
        parts.append(made[TAIL:] if parts else made)
        count += len(parts[-1])
    frames = np.concatenate(parts)[: seconds * RATE + 1]
    return Made(frames, tuple(j for j in joins if j < len(frames)), perf_counter() - started)


def seen(frames: Frames, scene: Turning, seconds: int) -> list[str]:
    """What is wrong in each second that is not as asked for."""
    wrong = []
    for second in range(seconds):
        found = detect(frames[second * RATE : (second + 1) * RATE + 1])
        wanted = (scene.colour, scene.background, scene.heading(second))
        if (found.colour, found.background, found.direction) != wanted:
            wrong.append(f"{second}: {found.colour} on {found.background}, {found.direction}")
    return wrong


def jumps(made: Made) -> list[float]:
    """Of each join, in units of the average step within chunks."""
    steps = np.array(
        [
            np.abs(after.astype(np.int16) - before).mean()
            for before, after in zip(made.frames[:-1], made.frames[1:], strict=True)
        ]
    )
    at = np.array(made.joins) - 1
    return [float(step) for step in steps[at] / np.delete(steps, at).mean()]


Maker = Callable[[Turning, int, Stages, int], Made]


def measure(make: Maker, scene: Turning, seconds: int, seed: int) -> tuple[Facts, Frames]:
    with open_stages(BUNDLE, Choice(threads=1)) as stages:
        made = make(scene, seconds, stages, seed)
    ratios, wrong = jumps(made), seen(made.frames, scene, seconds)
    facts = {
        "scene": scene.prompt(0),
        "seconds_right": seconds - len(wrong),
        "wrong": wrong,
        "joins": len(ratios),
        "join_worst": round(max(ratios), 2),
        "join_mean": round(float(np.mean(ratios)), 2),
        "wall_s": round(made.seconds, 1),
    }
    print(
        f"{make.__name__:<16}{facts['seconds_right']:4}/{seconds} seconds right, joins "
        f"{facts['join_mean']} on average, {facts['join_worst']} at worst: {facts['scene']}",
        flush=True,
    )
    return facts, made.frames


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=6, help="scenes, each a clip")
    parser.add_argument("--seconds", type=int, default=40, help="of each clip")
    parser.add_argument("--no-peer", action="store_true", help="only ours")
    parser.add_argument("--sheet", type=Path, help="an image: a row for each second of the first")
    args = parser.parse_args()
    rows: dict[str, list[Facts]] = {}
    for make in (in_latents, through_pixels)[: 1 if args.no_peer else 2]:
        rows[make.__name__] = []
        for seed, scene in enumerate(scenes(args.clips)):
            facts, frames = measure(make, scene, args.seconds, seed)
            rows[make.__name__].append(facts)
            if args.sheet is not None and make is in_latents and seed == 0:
                parts = [frames[s * RATE : (s + 1) * RATE] for s in range(args.seconds)]
                media.write_image(args.sheet, media.contact_sheet(parts, columns=8))
    ours = rows["in_latents"]
    passed = all(not row["wrong"] and row["join_worst"] <= LIMIT for row in ours)
    facts = {"machine": machine(), "seconds": args.seconds, "chunk_frames": CHUNK, "limit": LIMIT}
    print(json.dumps({**facts, **rows, "passed": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
