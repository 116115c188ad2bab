"""The VAE's decoder a few latent frames at a time, or in tiles: memory of long clips, decibels from
the untiled decode, clips of one colour.

    python benchmarks/vae_tiles.py [--random BUNDLE ...] [--out FILE]

Memory is the largest anonymous memory of a process that decodes random latents of ltx-tiny and
writes the frames to an MP4 as they come. `--random` bundles have a decoder of true widths and
random weights (tools/make_checkpoint.py --model 2b --layers 1 --vae 0.9.5 --dtype f32; ltx-export
onnx --stages vae_decoder,vae_decoder_stream): their latents are white noise and their weights
spread it further than trained ones do, so that their decibels are a lower bound. A stream has all
the aims; tiles have them as far as they share enough. Last line: JSON; exit code 1 if an aim is
missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from child import Cost, run
from report import Facts, machine

HERE = Path(__file__).parent
TINY = HERE.parent / "runtime/ltx_trt/ltx_tiny"

GROWTH, DECIBELS, LEVEL = 1.3, 45.0, 1.0
"""Aims: memory of 257 frames in that of 33, PSNR, and deviation in a clip of one colour."""

SHORT, LONG = 33, 257
SIDES, BUDGET = "384x512", 300_000_000
CASES = {
    "stream": "stream",
    "auto in 300 MB": str(BUDGET),
    "33-frame tiles": f"{SIDES}x33",
}

OVERLAP = 12
"""Latent cells, as tiles.OVERLAP."""

SIDE, FRAMES = 384, 65
"""From these sizes on, tiles share enough for the aims. Smaller ones are chosen only where there is
no memory for a stream, and that is said."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--random", type=Path, nargs="*", default=[], help="Bundles.")
    parser.add_argument("--out", type=Path, help="Also there, indented.")
    options = parser.parse_args()
    memory = dict(_memory())
    clip, colours = _rows("clip", TINY), _rows("colours", TINY)
    weights = {bundle.name: _rows("random", bundle) for bundle in options.random}
    missed = [
        *(f"{case}: {memory[case]['growth']}" for case in CASES if _grows(memory[case])),
        *(f"clip {row['tile']}" for row in clip if row["psnr"] < DECIBELS),
        *(f"colour {row['tile']}" for row in colours if _shares(row) and _seen(row)),
        *(f"{name} {row['tile']}" for name in weights for row in weights[name] if _far(row)),
    ]
    aims = {"growth": GROWTH, "psnr": DECIBELS, "levels": LEVEL}
    facts: Facts = {"aims": aims, "memory": memory, "clip": clip, "colours": colours}
    facts |= {"random": weights, "missed": missed, "machine": machine()}
    if options.out is not None:
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))
    return bool(missed)


def _memory() -> Iterator[tuple[str, Facts]]:
    """Whole clips show what would be; they have no aim."""
    for what, tile in (*CASES.items(), ("whole", "off")):
        row: Facts = {}
        for frames in (SHORT, LONG):
            cost, said = _decoded(f"{SIDES}x{frames}", tile)
            row |= {f"{key}_{frames}": value for key, value in cost.row().items()}
            row[f"tile_{frames}"] = json.loads(said)["tile"]
        row["growth"] = round(row[f"peak_anon_{LONG}"] / row[f"peak_anon_{SHORT}"], 3)
        print(f"{what}: {row['growth']} times the memory of {SHORT} frames", flush=True)
        yield what, row


def _grows(row: Facts) -> bool:
    return bool(row["growth"] > GROWTH)


def _shares(row: Facts) -> bool:
    if row["tile"].startswith("stream"):
        return True
    _, width, frames = map(int, row["tile"].split("x"))
    return width >= SIDE and frames >= FRAMES


def _seen(row: Facts) -> bool:
    return bool(row["deviation"] > LEVEL or row["step"] > row["untiled_step"] + LEVEL)


def _far(row: Facts) -> bool:
    """Of random weights, only tiles that share the most are near."""
    return bool(row["psnr"] < DECIBELS and row.get("overlap", OVERLAP) >= OVERLAP)


def _decoded(size: str, tile: str) -> tuple[Cost, str]:
    with TemporaryDirectory() as folder:
        script, out = HERE / "vae_tiles_once.py", Path(folder) / "clip.mp4"
        return run([sys.executable, script, TINY, size, tile, out])


def _rows(kind: str, bundle: Path) -> list[Facts]:
    _, said = run([sys.executable, HERE / "vae_tiles_quality.py", kind, bundle])
    rows = [json.loads(line) for line in said.splitlines()]
    print(f"{bundle.name}, {kind}: {min(row['psnr'] for row in rows)} dB at least", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
