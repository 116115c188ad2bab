"""One stage of a bundle in our runtime's ONNX Runtime session: seconds and memory, as JSON.

python benchmarks/load_once.py BUNDLE STAGE
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from child import anonymous
from ltx_engines.bundle import open_bundle
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession


def main() -> None:
    import onnxruntime  # so that its import is not in the session's seconds

    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        bundle = open_bundle(Path(sys.argv[1]), cache=Path(cache))
        verified = time.perf_counter()
    before = anonymous(os.getpid())
    opened = time.perf_counter()
    with OnnxRuntimeSession.open(bundle, sys.argv[2], provider="cpu"):
        ready = time.perf_counter()
        private = anonymous(os.getpid())
    print(
        json.dumps(
            {
                "onnxruntime": onnxruntime.__version__,
                "verify_s": round(verified - start, 2),
                "ready_s": round(ready - opened, 3),
                "private": private,
                "private_before": before,
            }
        )
    )


if __name__ == "__main__":
    main()
