"""A process with one ONNX Runtime session of a bundle's transformer, driven by lines on stdin.

`read` opens the bundle, `open` the session, `step` runs it once; each is answered by a line of JSON
with its seconds. `ours` is the runtime's own session, `default` is what a user writes first.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ltx_engines.bundle import Bundle, TensorEntry, open_bundle
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession

STAGE, CPU = "transformer", ["CPUExecutionProvider"]

Feeds = dict[str, np.ndarray[Any, Any]]
Step = Callable[[Feeds], Mapping[str, np.ndarray[Any, Any]]]


def ours(bundle: Bundle) -> Step:
    return OnnxRuntimeSession.open(bundle, STAGE, provider="cpu")


def default(bundle: Bundle) -> Step:
    import onnxruntime

    path = bundle.file(bundle.stage(STAGE).file)
    session = onnxruntime.InferenceSession(str(path), providers=CPU)
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def feeds(bundle: Bundle, tokens: int) -> Feeds:
    """One clip, one sigma, a full prompt. No number matters but that both sessions get the same."""
    sizes = {"batch": 1, "tokens": tokens, "timesteps": 1, "text": 256}
    source = np.random.default_rng(0)

    def feed(entry: TensorEntry) -> np.ndarray[Any, Any]:
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in entry.axes]
        ones = entry.name in ("prompt_mask", "skip_layer_mask")
        values = np.ones(shape) if ones else source.random(shape)
        return values.astype(entry.dtype)

    return {entry.name: feed(entry) for entry in bundle.stage(STAGE).inputs}


def main() -> None:
    import onnxruntime  # noqa: F401 - its import is not part of opening a session

    kind, folder, tokens = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    opener = {"ours": ours, "default": default}[kind]
    bundle = step = given = None
    for line in sys.stdin:
        start, answer = time.perf_counter(), {}
        match line.strip():
            case "read":
                bundle = open_bundle(folder)
                given = feeds(bundle, tokens)
            case "open" if bundle:
                step = opener(bundle)
            case "step" if step and given:
                (velocity,) = step(given).values()
                answer["sum"] = float(np.abs(velocity).sum(dtype=np.float64))
            case word:
                raise ValueError(f"cannot {word!r} now")
        print(json.dumps({"seconds": round(time.perf_counter() - start, 3), **answer}), flush=True)


if __name__ == "__main__":
    main()
