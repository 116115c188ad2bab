"""What `--memory` and the prompt cache are worth: peaks of memory, and seconds, of whole runs.

    python benchmarks/memory_policy.py [--layers 1] [--text-layers 1] [--work FOLDER]

A slice of the 2B release with its whole VAE and a slice of T5-XXL, all of random float32 weights,
exported by ltx-export; or a bundle that is named with --bundle. Each run is a process of its own,
watched from outside, and so is one that makes two clips. Everything written is removed. The last
line is JSON, the exit code 1 when an aim is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from child import run
from report import Facts, machine

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("a red fox walks through fresh snow", "a paper boat on a pond")

NEAR = 0.1
"""How far a run's own word of its peak may be from what is seen from outside."""

FOUND_S = 0.1
"""What two texts may take that were encoded before."""

SHAPE = ("--width", "128", "--height", "96", "--num-frames", "9", "--num-inference-steps", "2")
PLAIN = ("--guidance-scale", "2", "--stg-scale", "0")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--text-layers", type=int, default=1)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        home = Path(work)
        bundle = options.bundle or export(home, options.layers, options.text_layers)
        found = measure(bundle.resolve(), home)
    facts: Facts = {"machine": machine(), "layers": options.layers, **found, "aims": aims(found)}
    print(json.dumps(facts))
    return 0 if all(facts["aims"].values()) else 1


def export(home: Path, layers: int, text_layers: int) -> Path:
    checkpoint, encoder, bundle = home / "model.safetensors", home / "t5", home / "bundle"
    for model, count, out in (("2b", layers, checkpoint), ("t5-xxl", text_layers, encoder)):
        words = ["--model", model, "--layers", str(count), "--dtype", "f32", "--out", str(out)]
        vae = ["--vae", "0.9"] if model == "2b" else []
        run([sys.executable, ROOT / "tools/make_checkpoint.py", *words, *vae])
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "ltx_export.cli",
        "onnx",
        checkpoint,
        "--out",
        bundle,
    ]
    run([*command, "--text-encoder", encoder])
    return bundle


def measure(bundle: Path, home: Path) -> dict[str, Any]:
    """By name: runs in order, of which the first of each pair finds no text and the second all."""
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    found: dict[str, Any] = {}
    for name, words in {
        "staged": ["--memory", "staged", "--no-prompt-cache"],
        "resident": ["--memory", "resident", "--no-prompt-cache"],
        "auto": ["--memory", "auto", "--no-prompt-cache"],
        "new text": ["--memory", "staged"],
        "seen text": ["--memory", "staged"],
    }.items():
        found[name] = one(bundle, home, words)
        print(f"{name:<12}{said(found[name])}", flush=True)
    for name, memory in (("batch staged", "staged"), ("batch resident", "resident")):
        found[name] = several(bundle, home, memory)
        print(f"{name:<12}{found[name]['wall_s']:8.1f} s", flush=True)
    return {"bytes": sum(path.stat().st_size for path in weights(bundle)), "runs": found}


def weights(bundle: Path) -> list[Path]:
    return [path for path in bundle.rglob("*") if path.is_file()]


def one(bundle: Path, home: Path, words: list[str]) -> Facts:
    clip = home / "clip.gif"
    command: list[str | Path] = [sys.executable, "-m", "ltx_trt.cli", "run", "--json"]
    command += ["--bundle", bundle]
    cost, out = run([*command, "--prompt", PROMPTS[0], "-o", clip, *SHAPE, *PLAIN, *words])
    report = json.loads(out.splitlines()[-1])
    kept = ("sha256", "host_memory", "host_anonymous", "cached_prompts", "seconds")
    return {**cost.row(), **{key: report[key] for key in kept}}


def several(bundle: Path, home: Path, memory: str) -> Facts:
    """Two clips in one process: the seconds of the second one's opening are what is saved."""
    prompts = home / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    out = home / f"out-{memory}"
    command: list[str | Path] = [sys.executable, "-m", "ltx_trt.cli", "batch", "--json"]
    command += [
        "--bundle",
        bundle,
        "--prompts",
        prompts,
        "--output",
        out,
        "--format",
        "gif",
        "--memory",
        memory,
    ]
    cost, text = run([*command, *SHAPE, "--no-prompt-cache"])
    reports = [json.loads(line) for line in text.splitlines()]
    opened = sum(s for name, s in reports[-1]["seconds"].items() if name.endswith("_open"))
    return {**cost.row(), "second_opens_s": round(opened, 4), "clips": len(reports)}


def aims(found: dict[str, Any]) -> dict[str, bool]:
    runs = found["runs"]
    single = [runs[name] for name in ("staged", "resident", "auto", "new text", "seen text")]
    seen = runs["seen text"]
    return {
        "the same clip": len({row["sha256"] for row in single}) == 1,
        "staged takes less": runs["staged"]["peak_rss"] < runs["resident"]["peak_rss"],
        "its own word is true": all(map(honest, single)),
        "texts are found": seen["cached_prompts"] == 2
        and seen["seconds"]["text_encoder"] < FOUND_S,
        "a resident stage is there": (
            runs["batch resident"]["second_opens_s"] < runs["batch staged"]["second_opens_s"]
        ),
    }


def honest(row: Facts) -> bool:
    pairs = (("host_memory", "peak_rss"), ("host_anonymous", "peak_anon"))
    return all(abs(row[own] - row[seen]) <= NEAR * row[seen] for own, seen in pairs)


def said(row: Facts) -> str:
    return (
        f"{row['wall_s']:8.1f} s {row['peak_rss'] / 1e6:8.0f} MB peak, "
        f"{row['peak_anon'] / 1e6:.0f} MB its own, {row['cached_prompts']} texts found"
    )


if __name__ == "__main__":
    sys.exit(main())
