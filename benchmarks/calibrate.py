"""Calibrate eight layers of the 13B transformer within 4 GB of memory, one block at a time.

    python benchmarks/calibrate.py [--layers 8] [--limit 4e9] [--work FOLDER]

The checkpoint has the true width and random weights in bfloat16 (8 layers: 4.7 GB, and a VAE that
is never read), the text encoder is a layer of T5-XXL. The kernel refuses the process more private
memory than the limit; all that it holds, mapped files too, is measured. Everything written is
removed. The last line is JSON, the exit code 1 when the limit is passed or a layer has no range.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from child import run
from report import Facts, machine

ROOT = Path(__file__).resolve().parents[1]
MAKE = ROOT / "tools/make_checkpoint.py"
PROMPTS = ROOT / "tools/tiny/prompts.txt"
LAYERS_OF_A_BLOCK = 10

COMMAND = "from ltx_export.cli import main; raise SystemExit(main())"
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--limit", type=float, default=4e9, help="Bytes.")
    parser.add_argument("--shape", default="64x64x9")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--work", type=Path, help="Where 8 GB are free.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="calibrate-") as name:
        facts = measure(Path(name), options)
    print(json.dumps({"machine": machine(), **facts}))
    good = facts["peak_rss"] <= options.limit and facts["ranges"] == facts["wanted"]
    return 0 if good else 1


def measure(folder: Path, options: argparse.Namespace) -> Facts:
    checkpoint, encoder = folder / "ltxv-13b.safetensors", folder / "t5"
    for model, layers, out in (("13b", options.layers, checkpoint), ("t5-xxl", 1, encoder)):
        print(f"making {out.name}", file=sys.stderr)
        run([sys.executable, MAKE, "--model", model, "--layers", str(layers), "--out", out])
    print("calibrating", file=sys.stderr)
    ranges = folder / "ranges.safetensors"
    limited: list[str | Path] = [
        sys.executable,
        "-c",
        LIMITED,
        str(int(options.limit)),
        "-c",
        COMMAND,
    ]
    order: list[str | Path] = [
        "calibrate",
        checkpoint,
        "--text-encoder",
        encoder,
        "--prompts",
        PROMPTS,
    ]
    shape = ["--shape", options.shape, "--steps", str(options.steps), "--first", "1"]
    cost, _ = run(
        [*limited, *order, *shape, "--out", ranges, "--device", "cpu", "--offload-blocks"]
    )
    header = head(ranges)
    return {
        "layers": options.layers,
        "blocks_bytes": blocks(head(checkpoint)),
        "limit": int(options.limit),
        **cost.row(),
        "ranges": len(header) - 1,
        "wanted": LAYERS_OF_A_BLOCK * options.layers,
    }


def head(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        table: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return table


def blocks(header: dict[str, Any]) -> int:
    """Bytes of the weights that are read again and again."""
    spans = [e["data_offsets"] for name, e in header.items() if ".transformer_blocks." in name]
    return sum(end - begin for begin, end in spans)


if __name__ == "__main__":
    sys.exit(main())
