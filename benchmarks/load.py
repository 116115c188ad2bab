"""Cold start and steps of a large transformer: our ONNX Runtime session against the default one.

    python benchmarks/load.py [--layers 14] [--tokens 1024] [--rounds 6] [--work FOLDER]

A slice of the 2B transformer with random float32 weights (14 layers: 3.9 GB), exported by
ltx-export. Each session is opened in a process of its own, its weights dropped from the page cache
before; then both are open and step in turn. Everything written is removed. The last line is JSON,
the exit code 1 when an aim is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from child import AnonWatch, anonymous, run
from report import Facts, machine

ROOT = Path(__file__).resolve().parents[1]
MAKE, WORKER = ROOT / "tools/make_checkpoint.py", ROOT / "benchmarks/session_worker.py"
KINDS = ("ours", "default")

READY_S, PRIVATE = 1.5, 200_000_000
"""What is aimed at: seconds to a cold session, bytes of anonymous memory in it."""

SPREAD = 1.03
"""Two runs of the same step differ by this much on a quiet machine."""


class Worker:
    """A process with one session, that does what it is told, one line at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, word: str) -> Facts:
        """Its answer, with the process's anonymous memory after it and at most during it."""
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("the worker has pipes")
        with AnonWatch(self._process.pid) as watch:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            after = anonymous(self._process.pid)
        if not answer:
            raise RuntimeError(f"the worker ended at {word!r}; it said why above")
        return Facts(json.loads(answer)) | {"anon": after, "peak_anon": max(watch.peak, after)}


@contextmanager
def worker(kind: str, bundle: Path, tokens: int) -> Iterator[Worker]:
    command = [sys.executable, str(WORKER), kind, str(bundle), str(tokens)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()


def drop(files: Iterable[Path]) -> float:
    """Out of the page cache, as after a restart. The share of the bytes that stayed in it."""
    sizes, still = 0, 0.0
    for path in files:
        with path.open("rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(file.fileno()).st_size
            still += size * cached(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # looking reads ahead
            sizes += size
    return round(still / sizes, 4)


def cached(descriptor: int, looks: int = 200) -> float:
    """The share of the file that can be read without the disk, by a look here and there."""
    size = os.fstat(descriptor).st_size
    places = [size * look // looks for look in range(looks)]
    return sum(_readable(descriptor, place) for place in places) / looks


def _readable(descriptor: int, place: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def cold(kind: str, bundle: Path, tokens: int) -> Facts:
    """One session, opened and stepped once, with every byte still on the disk."""
    with worker(kind, bundle, tokens) as one:
        one.tell("read")
        still = drop(path for path in bundle.parent.rglob("*") if path.is_file())
        opened = one.tell("open")
        first, second = one.tell("step"), one.tell("step")
    return {
        "cached_before": still,
        "ready_s": opened["seconds"],
        "private": opened["anon"],
        "private_peak": opened["peak_anon"],
        "first_step_s": first["seconds"],
        "second_step_s": second["seconds"],
        "private_stepping": max(first["peak_anon"], second["peak_anon"]),
        "sum": first["sum"],
    }


def in_turn(bundle: Path, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of steps of both sessions, warm, alternating so that both meet the same machine."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        workers = {kind: stack.enter_context(worker(kind, bundle, tokens)) for kind in KINDS}
        for one in workers.values():
            for word in ("read", "open", "step"):
                one.tell(word)
        for turn in range(rounds):
            for kind in KINDS if turn % 2 == 0 else reversed(KINDS):
                seconds[kind].append(workers[kind].tell("step")["seconds"])
    return seconds


def benchmark(options: argparse.Namespace, work: Path) -> Facts:
    bundle = exported(work, options.layers)
    report: Facts = {"machine": machine(), "layers": options.layers, "tokens": options.tokens}
    for kind in KINDS:
        runs = [cold(kind, bundle, options.tokens) for _ in range(options.colds)]
        report[kind] = min(runs, key=lambda found: float(found["ready_s"])) | {
            "ready_s_each": [found["ready_s"] for found in runs]
        }
        print(f"{kind:<10}{said(report[kind])}", flush=True)
    seconds = in_turn(bundle, options.tokens, options.rounds)
    for kind, steps in seconds.items():
        report[kind] |= {"step_s": round(median(steps), 3), "step_s_each": steps}
        print(f"{kind:<10}{report[kind]['step_s']:8.2f} s a step, warm, in turn", flush=True)
    return report | judged(report["ours"], report["default"])


def exported(work: Path, layers: int) -> Path:
    """The first release's VAE: the smallest, because nothing here reads it."""
    checkpoint, bundle = work / "slice.safetensors", work / "bundle"
    sizes: list[str | Path] = ["--layers", str(layers), "--dtype", "f32", "--vae", "0.9"]
    run([sys.executable, MAKE, "--model", "2b", *sizes, "--out", checkpoint])
    options = ["--out", str(bundle), "--stages", "transformer", "--opset", "20"]
    run([sys.executable, "-m", "ltx_export.cli", "onnx", checkpoint, *options])
    return bundle


def judged(ours: Facts, default: Facts) -> Facts:
    """How many times as long and as large the default is, and whether the aims are met.

    Steps are compared turn by turn: whatever else the machine does slows both of a turn.
    """
    turns = zip(ours["step_s_each"], default["step_s_each"], strict=True)
    slower = median(mine / theirs for mine, theirs in turns)
    keys = ("ready_s", "private", "private_peak", "first_step_s")
    return {
        "ratios": {key: round(default[key] / ours[key], 2) for key in keys}
        | {"step_s": round(1 / slower, 3)},
        "relative_difference": abs(ours["sum"] - default["sum"]) / abs(default["sum"]),
        "met": {
            "ready": ours["ready_s"] <= READY_S,
            "private": ours["private_peak"] <= PRIVATE,
            "step": slower <= SPREAD,
        },
    }


def said(row: Facts) -> str:
    return (
        f"{row['ready_s']:8.2f} s to a cold session, {row['private'] / 1e6:6.0f} MB private "
        f"({row['private_peak'] / 1e6:.0f} at most), first step {row['first_step_s']:.1f} s, "
        f"second {row['second_step_s']:.1f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--colds", type=int, default=2, help="cold starts of each session")
    parser.add_argument("--rounds", type=int, default=6, help="warm steps of each session")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="a folder with 6 GB left")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-load-") as work:
        os.environ["XDG_CACHE_HOME"] = f"{work}/cache"  # the run leaves no memory
        report: dict[str, Any] = benchmark(options, Path(work))
    print(json.dumps(report))
    return 0 if all(report["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
