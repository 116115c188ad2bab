"""What Triton costs a step, and what batching gives: the shipped ltx-tiny on a real server.

    python benchmarks/triton_server.py [--rounds 5] [--requests 8] [--steps 30]

`make triton` first, and nothing else on the machine. Each round asks `ltx-trt run` and the server
in turn for the same clip, then for eight clips one by one and at once. A step of `run` is what its
transformer takes longer for a step more, one of the server what passes between two steps as its
client hears of them. The last line is JSON; the exit code is 1 when a clip is not that of `run`, a
step costs more than 3 ms or eight at once are not 1.3 times as fast.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ltx_engines.triton_settings import LAYOUTS, Layout, Settings  # noqa: E402
from ltx_trt.cli import SHIPPED  # noqa: E402
from report import machine  # noqa: E402
from tests.triton.server import Server, missing  # noqa: E402
from tests.triton.stream import PROMPTS, Heard, ask  # noqa: E402

MOST_STEP_COST, LEAST_GAIN = 0.003, 1.3

Wishes = dict[str, Any]


def alone(wishes: Wishes, folder: Path) -> tuple[float, str]:
    """Seconds of a step of `ltx-trt run`, and its frames' hash. From the difference of a clip and
    one of twice as many steps: the first step of a process takes longer, and the server's is over.
    """
    steps = wishes["num_inference_steps"]
    longer, _ = transformer({**wishes, "num_inference_steps": 2 * steps}, folder)
    shorter, hashed = transformer(wishes, folder)
    return (longer - shorter) / steps, hashed


def transformer(wishes: Wishes, folder: Path) -> tuple[float, str]:
    """The seconds of all steps, and the frames' hash."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in wishes.items()]
    out = folder / "clip.mp4"
    done = subprocess.run(
        [sys.executable, "-m", "ltx_trt.cli", "run", "--json", "-o", str(out), *words],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    return report["seconds"]["transformer"], report["sha256"]


def step_seconds(heard: Heard) -> float:
    """Between two steps, in the client's time."""
    rows = zip(heard.times, heard.events, strict=True)
    times = [at for at, event in rows if event["event"] == "step"]
    return (times[-1] - times[0]) / (len(times) - 1)


def clock(port: int, wishes: Sequence[Wishes], at_once: int) -> tuple[float, list[str]]:
    """Seconds for all of them, and their frames' hashes."""
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        heard = list(pool.map(lambda wish: ask(port, **wish), wishes))
    return time.perf_counter() - started, [found.report["sha256"] for found in heard]


def passed(server: Server) -> dict[str, float]:
    """How many requests had passes of the transformer, and how many passes there were."""
    figures = server.figures()
    series = 'ltx_pass_requests_{}{{model="ltx_video"}}'
    return {end: figures[series.format(end)] for end in ("sum", "count")}


def measured(layout: Layout, arguments: argparse.Namespace) -> dict[str, Any]:
    from ltx_export.triton import repository

    count, steps = arguments.requests, arguments.steps
    wishes: list[Wishes] = [
        {"prompt": PROMPTS[i % 4], "seed": i, "num_inference_steps": steps} for i in range(count)
    ]
    rows: dict[str, list[float]] = {"run": [], "server": [], "one_by_one": [], "at_once": []}
    wrong, passes = 0, {"sum": 0.0, "count": 0.0}
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        repo = Path(folder, "repository")
        repository.write(SHIPPED, repo, repository.Order(Settings(layout=layout, at_once=count)))
        with Server(repo) as server:
            clock(server.grpc, wishes, count)  # nobody times the first of anything
            for _ in range(arguments.rounds):
                seconds, wanted = alone(wishes[0], Path(folder))
                heard = ask(server.grpc, **wishes[0])
                rows["run"].append(seconds)
                rows["server"].append(step_seconds(heard))
                single, hashes = clock(server.grpc, wishes, 1)
                before = passed(server)
                together, same = clock(server.grpc, wishes, count)
                passes = {end: passes[end] + passed(server)[end] - before[end] for end in passes}
                rows["one_by_one"].append(single)
                rows["at_once"].append(together)
                wrong += (heard.report["sha256"] != wanted) + (hashes != same)
    found = {name: round(median(row), 7) for name, row in rows.items()}
    gains = [a / b for a, b in zip(rows["one_by_one"], rows["at_once"], strict=True)]
    return {
        "layout": layout,
        **found,
        "step_cost": round(found["server"] - found["run"], 5),
        "gain": round(median(gains), 2),
        "requests_a_pass": round(passes["sum"] / passes["count"], 2),
        "wrong": wrong,
    }


def met(row: dict[str, Any]) -> bool:
    """The cost is promised for the single layout."""
    cheap = row["layout"] != "single" or row["step_cost"] <= MOST_STEP_COST
    return bool(cheap and row["gain"] >= LEAST_GAIN and not row["wrong"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    given = parser.parse_args(arguments)
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    rows = []
    for layout in given.layout or LAYOUTS:
        rows.append(row := measured(layout, given))
        print(
            f"{layout:8} step {row['server'] * 1e3:6.2f} ms, of run {row['run'] * 1e3:6.2f} ms; "
            f"{given.requests} clips {row['one_by_one']:.2f} s one by one, {row['at_once']:.2f} s "
            f"at once: x{row['gain']}, {row['requests_a_pass']} requests a pass",
            flush=True,
        )
    print(json.dumps({"machine": machine(), "rows": rows}))
    return 0 if all(map(met, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
