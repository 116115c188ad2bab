"""How long a user waits for the first sign of life: help, and the first denoise step.

Each row is the wall time of whole processes, from their start: `python tools/bench_start.py`.
The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median

FIRST_STEP = """
from functools import partial

from ltx_engines.bundle import open_bundle
from ltx_trt.cli import SHIPPED
from ltx_trt.pipeline import StepDone, generate
from ltx_trt.request import Wishes, resolve
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession

bundle = open_bundle(SHIPPED)
request, _ = resolve(Wishes(prompt="a red circle moves right on a blue background"), bundle)
for event in generate(request, bundle, partial(OnnxRuntimeSession.open, bundle)):
    if isinstance(event, StepDone):
        break
"""

ROWS = {
    "empty python": ["-c", "pass"],
    "ltx-trt --help": ["-m", "ltx_trt.cli", "--help"],
    "ltx-trt run --help": ["-m", "ltx_trt.cli", "run", "--help"],
    "ltx-tiny, to the first step": ["-c", FIRST_STEP],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    result = {}
    for name, arguments in ROWS.items():
        times = sorted(seconds(arguments) for _ in range(runs + 1))[:-1]  # the cold one goes
        result[name] = {"median": median(times), "worst": times[-1], "runs": runs}
        print(f"{name:<30}{median(times):8.2f} s  (worst {times[-1]:.2f})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
