"""Everything that only a GPU can show, in one command that installs nothing.

    python tools/gpu_check.py --out gpu-check.json [--only clips,steps] [--list]

Each part is a process of its own: one that fails or crashes does not stop the others, one that
cannot run here says why. FILE is written anew after each part, so that a stopped run keeps what it
has; send it to us, or commit it under benchmarks/results/. The exit code is 1 if a part failed,
0 if all passed or were skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, Any

import typer

import gpu_machine
from ltx_engines.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[1]
TOOLS, BENCHMARKS = ROOT / "tools", ROOT / "benchmarks"

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """`needs` are `gpu`, `torch`, `builder` or a package; `after` is a part whose files it reads.
    `{work}` and `{gpu}` in `words` become the folder of all parts and smXX."""

    name: str
    what: str
    script: Path
    words: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("gpu",)
    after: str | None = None
    hours: float = 1.0


def _own(name: str, what: str, *needs: str, after: str | None = "tiny") -> Part:
    words = (name, "--work", "{work}", "--gpu", "{gpu}")
    return Part(name, what, TOOLS / "gpu_parts.py", words, ("gpu", *needs), after)


PARTS = (
    Part("kernels", "quantized layers of torch", TOOLS / "gpu_kernels.py", needs=("gpu", "torch")),
    _own("rtx", "how TensorRT-RTX takes to this card", "tensorrt_rtx", after=None),
    _own("tiny", "ltx-tiny's engines: all stages, refittable", "builder", "onnx", after=None),
    _own("layers", "the engines' own inspector and the builder's table", "polygraphy"),
    _own("ladder", "ltx-export verify, up to the engine", "polygraphy"),
    _own("clips", "an engine's clip beside ONNX Runtime's", "onnxruntime"),
    _own(
        "stream",
        "a clip decoded a few frames at a time beside the whole",
        "builder",
        "onnx",
        after=None,
    ),
    _own("provider", "ONNX Runtime's CUDA beside its CPU", "onnxruntime", after=None),
    _own("lora", "a LoRA by refit beside one that is fused", "onnxruntime"),
    _own("memory", "peak memory, and the same clip with less of it", "onnxruntime"),
    _own("warm", "the second start beside the first"),
    _own("slices", "true-width 2B: bf16, fp8, int8, and what they run", "builder", after=None),
    _own("swaps", "weights that come while another engine runs", "tensorrt_rtx", after="slices"),
    Part(
        "steps",
        "ms a step of 2B by engines: roofline, graphs, transfers, torch, diffusers",
        BENCHMARKS / "engine_gpu.py",
        ("--peers",),
        ("gpu", "builder"),
        hours=3,
    ),
    Part(
        "weight_inputs",
        "engines whose weights are inputs beside embedded ones",
        BENCHMARKS / "weight_inputs.py",
        ("--gpu",),
        ("gpu", "builder"),
    ),
    Part(
        "quantized",
        "torch and diffusers at true size: memory and steps",
        BENCHMARKS / "quantized_gpu.py",
        needs=("gpu", "torch"),
        hours=3,
    ),
)


def main(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Its JSON.")] = Path("gpu-check.json"),
    only: Annotated[str, typer.Option(help="Some parts, with commas; else all.")] = "",
    listing: Annotated[bool, typer.Option("--list", help="Say which parts there are.")] = False,
) -> None:
    """Run each part; the last line is JSON."""
    if listing:
        for part in PARTS:
            print(f"{part.name:<14} {part.what} (needs {', '.join(part.needs)})")
        return
    try:
        chosen = choose(only)
        check_place(out)
        found = check(chosen, out)
    except UserError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    verdicts = {name: verdict(facts) for name, facts in found["parts"].items()}
    print(json.dumps(verdicts))
    if any(word == "failed" for word in verdicts.values()):
        raise typer.Exit(1)


def choose(words: str) -> tuple[Part, ...]:
    """In the order of the table, with those that they come after.

    Raises:
        UserError: there is no such part.
    """
    known = {part.name: part for part in PARTS}
    if not words:
        return PARTS
    wanted = {word.strip() for word in words.split(",")}
    for word in sorted(wanted - known.keys()):
        raise UserError(f"no part {word!r}{nearest(word, known)}; parts are {', '.join(known)}")
    wanted |= {after for name in wanted if (after := known[name].after) is not None}
    return tuple(part for part in PARTS if part.name in wanted)


def check_place(out: Path) -> None:
    """Before hours of work that nobody could read: FILE can be written.

    Raises:
        UserError: it cannot.
    """
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written: {error.strerror or error}; give another file"
        ) from None


def check(chosen: Sequence[Part], out: Path, look: Callable[[], Facts] = gpu_machine.look) -> Facts:
    """All parts, one after the other. `out` is there after each of them."""
    machine = look()
    print(seen(machine), flush=True)
    found: Facts = {"machine": machine, "flavour": gpu_machine.flavour(machine), "parts": {}}
    parts = found["parts"]
    with TemporaryDirectory(prefix="gpu-check-") as work:
        for part in chosen:
            if (reason := missing(part, machine, parts)) is not None:
                parts[part.name] = {"skipped": reason}
            else:
                parts[part.name] = run(part, Path(work), machine)
            print(f"{part.name:<14} {said(parts[part.name])}", flush=True)
            write(found, out)
    return found


def seen(machine: Mapping[str, Any]) -> str:
    card = machine["card"]
    gpu = "no NVIDIA GPU" if card is None else f"{card['name']} (SM{card['capability']})"
    words = [name for name in machine["packages"] if gpu_machine.imports(machine, name)]
    return f"{gpu}; {', '.join(words) or 'nothing of what engines need'}"


def missing(part: Part, machine: Mapping[str, Any], before: Mapping[str, Facts]) -> str | None:
    """Why a part cannot run here."""
    for need in part.needs:
        if (reason := lacking(need, machine)) is not None:
            return reason
    earlier = before.get(part.after or "")
    if earlier is not None and verdict(earlier) != "passed":
        return f"{part.after} is not there: {said(earlier)}"
    return None


def lacking(need: str, machine: Mapping[str, Any]) -> str | None:
    card, packages = machine["card"], machine["packages"]
    if need == "gpu":
        return None if card else "no NVIDIA GPU is here; run it on a machine that has one"
    if need == "torch":
        torch = packages["torch"]
        if not torch["imports"]:
            return f"torch: {torch['why']}"
        return None if torch["found"][2] else f"torch {torch['found'][0]} sees no CUDA device"
    if need == "builder":
        if gpu_machine.flavour(machine) is not None:
            return None
        whys = ", ".join(
            f"{name}: {packages[name].get('why', 'not for this card')}"
            for name in ("tensorrt_rtx", "tensorrt")
        )
        return f"no builder for SM{card['capability']} imports ({whys})"
    return None if packages[need]["imports"] else f"{need}: {packages[need]['why']}"


def run(part: Part, work: Path, machine: Mapping[str, Any]) -> Facts:
    """What its last line says, or how it ended. What it prints goes on to the terminal."""
    given = {"work": str(work), "gpu": f"sm{machine['card']['capability']}"}
    command = [sys.executable, str(part.script), *(word.format(**given) for word in part.words)]
    path = os.pathsep.join([str(BENCHMARKS), str(TOOLS), os.environ.get("PYTHONPATH", "")])
    start = time.perf_counter()
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                command,
                stdout=output,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": path},
                check=False,
                timeout=3600 * part.hours,
            )
            ended = None if done.returncode in (0, 1) else f"it ended with {done.returncode}"
            code = done.returncode
        except subprocess.TimeoutExpired:
            ended, code = f"it took more than {part.hours:g} hours", 1
        lines, complaint = (_text(file) for file in (output, errors))
    for line in lines[:-1]:
        print(f"    {line}", flush=True)
    facts = _facts(lines)
    seconds = round(time.perf_counter() - start, 1)
    if facts is None or ended is not None:
        why = ended or f"its last line is no JSON, it ended with {code}"
        return {"passed": False, "failed": why, "said": complaint[-20:], "seconds": seconds}
    return {"passed": code == 0, **facts, "seconds": seconds}


def _text(file: Any) -> list[str]:
    file.seek(0)
    return [line for line in file.read().splitlines() if line.strip()]


def _facts(lines: Sequence[str]) -> Facts | None:
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def verdict(facts: Mapping[str, Any]) -> str:
    if "skipped" in facts:
        return "skipped"
    return "passed" if facts["passed"] else "failed"


def said(facts: Mapping[str, Any]) -> str:
    if "skipped" in facts:
        return f"skipped: {facts['skipped']}"
    if facts["passed"]:
        return f"passed in {facts['seconds']} s"
    return f"failed: {facts.get('failed', 'see its figures')}"


def write(found: Facts, out: Path) -> None:
    """In one rename."""
    partial = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    typer.run(main)
