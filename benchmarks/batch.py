"""`ltx-trt batch` that is killed again and again: is each clip made, right, and made once?

    python benchmarks/batch.py --out benchmarks/results/cpu-batch.json

Small clips of ltx-tiny in three shapes. Several rounds, each in a folder of its own:

    group     SIGKILL to the command with all that it has started, at random moments, and again;
              without workers and with two
    workers   two workers, of whom one gets SIGKILL at random moments
    ray       the same with a worker of a Ray cluster (pip install 'ltx-trt[ray]'), and once the
              command that has started the cluster

Somebody looks at the folder all the time: a report that is there and is replaced, or is there
without its clip, counts as a failure. At the end a sample of the clips is made by `ltx-trt run`.
The last line is JSON; the exit code is 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from report import Facts, machine

PROMPTS = (
    "a red circle moves right on a blue background",
    "a green diamond moves up on a black background",
)
SHAPES = ((64, 64, 9), (96, 64, 9), (64, 96, 17))
"""Width, height, frames."""

LTX_TRT = (sys.executable, "-m", "ltx_trt.cli")

LONGEST = 600.0
"""Seconds of one command."""


def jobs(count: int) -> list[dict[str, Any]]:
    """Shapes take turns, so that they have to be grouped."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        width, height, frames = SHAPES[index % len(SHAPES)]
        rows.append(
            {
                "name": f"clip-{index:02d}",
                "prompt": PROMPTS[index % len(PROMPTS)],
                "seed": index,
                "width": width,
                "height": height,
                "num_frames": frames,
                "num_inference_steps": 4,
            }
        )
    return rows


@dataclass
class Watch:
    """What has been seen in the folder of a round."""

    folder: Path
    reports: dict[str, tuple[int, int]] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    without_clip: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        for path in self.folder.glob("*.json"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                seen = (stat.st_ino, stat.st_mtime_ns)
                if self.reports.setdefault(path.stem, seen) != seen:
                    self.replaced.append(path.stem)
                clip = path.with_suffix(".mp4")
                if (
                    not clip.is_file()
                    or clip.stat().st_size != json.loads(path.read_text())["bytes"]
                ):
                    self.without_clip.append(path.stem)

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.look()
        self.look()


@contextmanager
def watching(folder: Path) -> Iterator[Watch]:
    watch = Watch(folder)
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        yield watch
    finally:
        watch.ended.set()
        thread.join()


@dataclass
class Round:
    """`kills`: who was killed, when (clips that were finished), and what lay half-made then."""

    folder: Path
    file: Path
    words: tuple[str, ...]
    watch: Watch
    dice: random.Random
    said: list[dict[str, Any]] = field(default_factory=list)
    kills: list[Facts] = field(default_factory=list)

    def start(self) -> subprocess.Popen[str]:
        command = [*LTX_TRT, "batch", str(self.file), "--out", str(self.folder), "--json"]
        return subprocess.Popen(
            [*command, *self.words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def hear(self, process: subprocess.Popen[str]) -> int:
        """What it says to its end; the exit code."""
        out, err = process.communicate(timeout=LONGEST)
        for line in out.splitlines():
            with suppress(ValueError):  # the last one may be cut off
                self.said.append(json.loads(line))
        if process.returncode not in (0, -signal.SIGKILL):
            print(err, file=sys.stderr)
        return process.returncode

    def await_moment(self, process: subprocess.Popen[str], share: int) -> bool:
        """After some more clips, and any part of the next; whether it is still at work."""
        wanted = len(self.watch.reports) + self.dice.randrange(1, share)
        while len(self.watch.reports) < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(self.dice.uniform(0, 0.15))
        return process.poll() is None

    def note(self, whom: str) -> None:
        partial = sorted(path.name for path in self.folder.glob(".*.partial"))
        self.kills.append({"whom": whom, "finished": len(self.watch.reports), "partial": partial})

    def kill_worker(self) -> None:
        """One that is at a clip just now."""
        for _ in range(2000):
            for file in self.folder.glob(".*.partial/tries"):
                with suppress(OSError, IndexError):
                    process = int(file.read_text().split()[2])
                    os.kill(process, signal.SIGKILL)
                    self.note("worker")
                    return
            time.sleep(0.002)
        raise RuntimeError("nobody is at a clip")


def kill_groups(one: Round, count: int, jobs: int) -> int:
    """Each time all of it, and again; the exit code of the last."""
    for _ in range(count):
        process = one.start()
        if one.await_moment(process, jobs // (count + 1)):
            os.killpg(process.pid, signal.SIGKILL)
            one.note("group")
        one.hear(process)
    return one.hear(one.start())


def kill_workers(one: Round, count: int, jobs: int) -> int:
    """Of one command, which goes on."""
    process = one.start()
    for _ in range(count):
        if one.await_moment(process, jobs // (count + 1)):
            one.kill_worker()
    return one.hear(process)


@dataclass(frozen=True)
class Plan:
    """A way to be killed, so many times."""

    name: str
    words: tuple[str, ...]
    play: Callable[[Round, int, int], int]
    kills: int


PLANS = (
    Plan("group", (), kill_groups, 3),
    Plan("group-of-workers", ("--workers", "2"), kill_groups, 3),
    Plan("workers", ("--workers", "2"), kill_workers, 3),
    Plan("ray", ("--ray", "--workers", "2"), kill_workers, 3),
    Plan("ray-driver", ("--ray", "--workers", "2"), kill_groups, 1),
)


def play(plan: Plan, rows: Sequence[dict[str, Any]], home: Path, dice: random.Random) -> Facts:
    file, folder = home / "jobs.jsonl", home / plan.name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = time.perf_counter()
    with watching(folder) as watch:
        one = Round(folder, file, plan.words, watch, dice)
        code = plan.play(one, plan.kills, len(rows))
    seconds = time.perf_counter() - started
    made = Counter(row["name"] for row in one.said if row["state"] == "made")
    wanted = {f"{row['name']}.{end}" for row in rows for end in ("mp4", "json")}
    there = {path.name for path in folder.iterdir()}
    facts = {
        "jobs": len(rows),
        "exit_code": code,
        "kills": one.kills,
        "seconds": round(seconds, 1),
        "missing": sorted(wanted - there),
        "left_behind": sorted(there - wanted),
        "made_twice": sorted({*watch.replaced, *(n for n, count in made.items() if count > 1)}),
        "report_without_clip": sorted(set(watch.without_clip)),
    }
    wrong = ("missing", "left_behind", "made_twice", "report_without_clip")
    good = code == 0 and len(one.kills) == plan.kills and not any(facts[key] for key in wrong)
    print(f"{plan.name:<18}{len(rows)} jobs, {len(one.kills)} kills, {seconds:.1f} s: {good}")
    return {**facts, "good": good}


def hashes(folder: Path) -> dict[str, str]:
    """Of all frames, as the reports have them."""
    return {
        path.stem: json.loads(path.read_text())["report"]["sha256"]
        for path in folder.glob("*.json")
    }


def single(row: dict[str, Any], home: Path) -> tuple[str, bytes]:
    """The hash of the frames and the file that `ltx-trt run` makes."""
    output = home / "single.mp4"
    words = [*LTX_TRT, "run", "--output", str(output), "--json"]
    for key, value in row.items():
        if key != "name":
            words += [f"--{key.replace('_', '-')}", str(value)]
    found = subprocess.run(words, check=True, capture_output=True, text=True)
    return str(json.loads(found.stdout)["sha256"]), output.read_bytes()


def compare(rows: Sequence[dict[str, Any]], folders: Sequence[Path], home: Path) -> Facts:
    """The sampled clips of each round against those of single runs."""
    differ = []
    for row in rows:
        sha256, file = single(row, home)
        for folder in folders:
            name = str(row["name"])
            if hashes(folder).get(name) != sha256 or (folder / f"{name}.mp4").read_bytes() != file:
                differ.append(f"{folder.name}/{name}")
    return {"clips": len(rows) * len(folders), "differ": differ, "good": not differ}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--seed", type=int, default=7, help="of the moments")
    parser.add_argument("--rounds", default=",".join(plan.name for plan in PLANS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    rows = jobs(arguments.jobs)
    found: Facts = {"benchmark": "batch", "machine": machine(), "rounds": {}}
    plans = [plan for plan in PLANS if plan.name in arguments.rounds.split(",")]
    if any("--ray" in plan.words for plan in plans) and find_spec("ray") is None:
        without = ",".join(plan.name for plan in PLANS if "--ray" not in plan.words)
        parser.error(f"Ray is not installed; pip install 'ltx-trt[ray]', or --rounds {without}")
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        for plan in plans:
            found["rounds"][plan.name] = play(plan, rows, home, dice)
        folders = [home / plan.name for plan in plans]
        first = hashes(folders[0])
        found["same_in_all_rounds"] = all(hashes(folder) == first for folder in folders)
        sampled = dice.sample(rows, min(arguments.samples, len(rows)))
        found["against_single_runs"] = compare(sampled, folders, home)
    checks = [*found["rounds"].values(), found["against_single_runs"]]
    found["good"] = found["same_in_all_rounds"] and all(check["good"] for check in checks)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
