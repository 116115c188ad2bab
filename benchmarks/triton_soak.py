"""Many requests of all kinds against a real Triton server: answers, memory, leftovers.

    python benchmarks/triton_soak.py --requests 300 --concurrency 4 --out soak.json

Clips of ltx-tiny of random shapes and seeds, some of them given up by their client, some of them
wrong, all drawn from one seed. Every clip must be the one that the pipeline makes alone, byte for
byte; every wrong request must get its own line.
Wants `make triton`. The default is a short run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the server and the client of the tests

from ltx_trt.cli import SHIPPED  # noqa: E402
from report import machine  # noqa: E402
from tests.triton.asking import Outcome, Question, ask  # noqa: E402
from tests.triton.server import Server, missing  # noqa: E402

PROMPTS = (
    "a red circle moves right on a blue background",
    "a green diamond moves up on a black background",
)
SHAPES = ((64, 64, 9), (96, 64, 9), (64, 96, 17), (128, 128, 9))
"""Width, height, frames."""

SEEDS, STEPS = 3, (2, 4)

WRONG: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "no frames": ({"num_frames": 0}, {}, "num_frames must be from 1"),
    "no prompt": ({"prompt": " "}, {}, "the prompt is empty"),
    "odd width": ({"width": 63}, {}, "even width"),
    "no steps": ({"num_inference_steps": 0}, {}, "num_inference_steps must be from"),
    "a wrong type": ({}, {"seed": "INT32"}, "data-type is 'INT32'"),
    "a format of others": ({"format": "gif"}, {}, "unknown format"),
}
"""What is changed, what is sent as another type, what the client reads."""

INTERVAL = 0.2
"""Seconds between two looks at the memory."""

LIMIT = 1.05
"""Of the mean memory in the last third to that in the middle third."""


@dataclass(frozen=True)
class Ask:
    """`kind` is clip, cancelled or the name of what is wrong."""

    kind: str
    question: Question

    @property
    def clip(self) -> str:
        return json.dumps(self.question.wishes, sort_keys=True)


@dataclass
class Memory:
    """Bytes of the server and of its stubs, with the seconds from the start."""

    rows: list[tuple[float, int]] = field(default_factory=list)

    def thirds(self) -> list[float]:
        """Mean bytes of each third of the time."""
        end = self.rows[-1][0]
        parts: list[list[int]] = [[], [], []]
        for seconds, size in self.rows:
            parts[min(2, int(3 * seconds / end))].append(size)
        return [statistics.fmean(part) for part in parts]


def drawn(count: int, seed: int) -> list[Ask]:
    """The same requests for the same seed."""
    dice = random.Random(seed)
    return [_one(dice) for _ in range(count)]


def _one(dice: random.Random) -> Ask:
    width, height, frames = dice.choice(SHAPES)
    wishes: dict[str, Any] = {
        "prompt": dice.choice(PROMPTS),
        "seed": dice.randrange(SEEDS),
        "num_inference_steps": dice.choice(STEPS),
        "width": width,
        "height": height,
        "num_frames": frames,
    }
    fate = dice.random()
    if fate < 0.15:
        wishes["num_inference_steps"] = 40
        return Ask("cancelled", Question(wishes, leave_after=dice.randrange(3, 20)))
    if fate < 0.30:
        kind = dice.choice(sorted(WRONG))
        change, types, _ = WRONG[kind]
        return Ask(kind, Question({**wishes, **change}, types))
    return Ask("clip", Question(wishes))


@dataclass(frozen=True)
class Clip:
    """As the pipeline makes it alone; `frames` is a hash."""

    frames: str
    video: bytes


def expected(asks: Iterable[Ask]) -> dict[str, Clip]:
    """Each clip that was asked for, by what was asked."""
    from ltx_trt import media
    from ltx_trt.backend import Choice
    from ltx_trt.pipeline import frames_of, generate
    from ltx_trt.request import Wishes, resolve
    from ltx_trt.session.choice import open_stages

    found = {}
    with open_stages(SHIPPED, Choice()) as stages:
        for clip in sorted({one.clip for one in asks if one.kind == "clip"}):
            request, _ = resolve(Wishes(**json.loads(clip)), stages.bundle)
            with closing(generate(request, stages.bundle, stages)) as events:
                frames = frames_of(events)
            video = media.video_bytes(frames, request.frame_rate)
            found[clip] = Clip(sha256(frames.tobytes()).hexdigest(), video)
    return found


LOST = "lost"


def judged(one: Ask, seen: Outcome, clips: Mapping[str, Clip]) -> str:
    """LOST, what else is wrong with an answer, or an empty string."""
    if seen.status == "DEADLINE_EXCEEDED":
        return LOST
    if one.kind == "cancelled":
        return "" if seen.status == "CANCELLED" else f"cancelled, but {seen.status}: {seen.text}"
    if one.kind != "clip":
        line = WRONG[one.kind][2]
        fits = line in seen.text and seen.status != "OK" and not seen.events
        return "" if fits else f"{one.kind}, but {seen.status}: {seen.text}"
    if seen.status != "OK":
        return f"no clip, but {seen.status}: {seen.text}"
    if seen.steps != list(range(1, one.question.wishes["num_inference_steps"] + 1)):
        return f"steps {seen.steps}"
    wanted = clips[one.clip]
    same = (seen.report["sha256"], seen.video) == (wanted.frames, wanted.video)
    return "" if same else "another clip"


class Watched(Server):
    """Remembers what it left in shared memory when it ended by itself."""

    left: tuple[str, ...] = ()

    def _stop(self) -> None:
        if hasattr(self, "process") and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)
            self.left = tuple(self.leftovers())
        super()._stop()


def resident(pids: Sequence[int]) -> int:
    """Private and shared memory; pages of files, such as mapped weights, are not counted."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        kinds = ("RssAnon:", "RssShmem:")
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))
    return total


def soak(server: Watched, asks: list[Ask], concurrency: int) -> tuple[list[Outcome], Memory]:
    memory, over, start = Memory(), threading.Event(), time.perf_counter()

    def watch() -> None:
        while not over.wait(INTERVAL):
            pids = [server.process.pid, *server.stubs()]
            memory.rows.append((time.perf_counter() - start, resident(pids)))

    address = f"127.0.0.1:{server.grpc}"
    put: Callable[[Ask], Outcome] = lambda one: ask(address, one.question, 120)  # noqa: E731
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with ThreadPoolExecutor(concurrency) as pool:
            outcomes = list(pool.map(put, asks))
    finally:
        over.set()
        thread.join()
    return outcomes, memory


def measured(asks: list[Ask], layout: str, concurrency: int) -> dict[str, Any]:
    from ltx_engines.triton_settings import Settings
    from ltx_export.triton import repository

    clips = expected(asks)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "repository"
        settings = Settings(layout=layout, at_once=concurrency)  # type: ignore[arg-type] # a word
        repository.write(SHIPPED, place, repository.Order(settings))
        with Watched(place, "--model-config-name=cpu") as server:
            start = time.perf_counter()
            outcomes, memory = soak(server, asks, concurrency)
            seconds = time.perf_counter() - start
            figures = server.figures()
    return summed(asks, outcomes, clips, memory) | {
        "layout": layout,
        "concurrency": concurrency,
        "wall_s": round(seconds, 1),
        "leftovers": len(server.left),
        "counted": {
            name: n for name, n in sorted(figures.items()) if name.startswith("ltx_requests")
        },
    }


def summed(
    asks: list[Ask],
    outcomes: list[Outcome],
    clips: Mapping[str, Clip],
    memory: Memory,
) -> dict[str, Any]:
    problems = [judged(one, seen, clips) for one, seen in zip(asks, outcomes, strict=True)]
    waited = [o.seconds for a, o in zip(asks, outcomes, strict=True) if a.kind == "clip"]
    first, middle, last = memory.thirds()
    return {
        "requests": len(asks),
        "kinds": dict(Counter(one.kind for one in asks)),
        "different_clips": len(clips),
        "lost": problems.count(LOST),
        "wrong": sum(problem not in ("", LOST) for problem in problems),
        "problems": dict(Counter(problem for problem in problems if problem).most_common(5)),
        "clip_median_s": round(statistics.median(waited), 3),
        "memory_thirds": [round(mean) for mean in (first, middle, last)],
        "growth": round(last / middle, 4),
    }


def met(row: dict[str, Any]) -> bool:
    return not (row["lost"] or row["wrong"] or row["leftovers"]) and row["growth"] <= LIMIT


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--layout", choices=("single", "stages"), default="single")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--out", type=Path, help="a .json file")
    chosen = parser.parse_args(arguments)
    if reason := missing():
        print(f"triton_soak: {reason}", file=sys.stderr)
        return 2
    row = measured(drawn(chosen.requests, chosen.seed), chosen.layout, chosen.concurrency)
    for name, value in row.items():
        print(f"{name:<18}{value}")
    result = {"soak": row, "met": met(row), "machine": machine()}
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
