"""Ask ltx-tiny for clips it was never trained on, and measure whether they are what was asked for.

    python tools/eval_tiny.py --bundle BUNDLE

Every prompt describes a held-out combination of shape, colours and direction. The clips come out of
the runtime as a user would get them, and `tiny.detector`, which is no model, says what they show.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ltx_engines import pipeline_config
from ltx_engines.bundle import Bundle, open_bundle
from ltx_trt import media
from ltx_trt.pipeline import Frames, frames_of, generate
from ltx_trt.request import Request, Wishes, resolve
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from tiny import captions, clips
from tiny.clips import Scene
from tiny.detector import Seen, detect

ROOT = Path(__file__).resolve().parents[1]
MUST_OBEY = ("colour", "background", "direction")
console = Console(stderr=True)


def main(
    bundle: Annotated[Path, typer.Option(help="The exported bundle.")] = ROOT
    / "runtime/ltx_trt/ltx_tiny",
    config: Annotated[Path | None, typer.Option(help="A pipeline config in YAML.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many clips.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the choice of prompts; clips count from it.")] = 0,
    min_accuracy: Annotated[float, typer.Option(help="Exit 1 below this share.")] = 0.95,
    sheet: Annotated[Path | None, typer.Option(help="A PNG with all the clips.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the processor.")] = None,
) -> None:
    """Generate, detect, count; the last line is JSON."""
    opened = open_bundle(bundle)
    chosen = None if config is None else pipeline_config.load(config)
    asked = held_out(prompts, seed)
    started, seen, made = perf_counter(), [], []
    for number, (_, prompt) in enumerate(track(asked, "generating", console=console)):
        request, _ = resolve(Wishes(prompt, seed=seed + number), opened, chosen)
        frames = clip(request, opened, threads)
        made.append(frames)
        seen.append(detect(frames))
    seconds = perf_counter() - started
    if sheet is not None:
        media.write_image(sheet, media.contact_sheet(made))
    scenes = [scene for scene, _ in asked]
    for attribute in ("shape", *MUST_OBEY):
        console.print(confusion(attribute, scenes, seen))
    for (scene, prompt), found in zip(asked, seen, strict=True):
        if wrong := missed(scene, found):
            console.print(f"[red]{prompt}[/red] shows {found}; wrong: {', '.join(wrong)}")
    report = figures(scenes, seen) | {"prompts": prompts, "seconds": round(seconds, 1)}
    print(json.dumps(report))
    if report["accuracy"] < min_accuracy:
        raise typer.Exit(1)


def held_out(count: int, seed: int) -> list[tuple[Scene, str]]:
    """Scenes that training never shows, each with a caption; none twice before all came once."""
    rng = np.random.default_rng(seed)
    known = [scene for scene in clips.scenes() if scene.held_out]
    order = np.concatenate([rng.permutation(len(known)) for _ in range(count // len(known) + 1)])
    return [(known[index], captions.describe(known[index], rng)) for index in order[:count]]


def clip(request: Request, bundle: Bundle, threads: int | None) -> Frames:
    opener = partial(OnnxRuntimeSession.open, bundle, threads=threads)
    return frames_of(generate(request, bundle, opener))


def missed(scene: Scene, seen: Seen) -> list[str]:
    return [name for name in MUST_OBEY if getattr(scene, name) != getattr(seen, name)]


def figures(scenes: list[Scene], seen: list[Seen]) -> dict[str, float]:
    """Shares of the clips: `accuracy` obey in colours and direction at once."""
    pairs = list(zip(scenes, seen, strict=True))
    report = {"accuracy": sum(not missed(*pair) for pair in pairs) / len(pairs)}
    for name in ("shape", *MUST_OBEY):
        right = sum(getattr(scene, name) == getattr(found, name) for scene, found in pairs)
        report[name] = right / len(pairs)
    return {name: round(share, 4) for name, share in report.items()}


def confusion(attribute: str, scenes: list[Scene], seen: list[Seen]) -> Table:
    """Rows: asked for; columns: seen; the diagonal is right."""
    counts = Counter(
        (getattr(scene, attribute), getattr(found, attribute))
        for scene, found in zip(scenes, seen, strict=True)
    )
    names = {"shape": clips.SHAPES, "direction": clips.DIRECTIONS}.get(attribute, clips.PALETTE)
    strays = sorted({found for _, found in counts} - set(names))
    table = Table(title=f"{attribute}: asked for (rows), seen (columns)")
    table.add_column("")
    for name in (*names, *strays):
        table.add_column(name, justify="right")
    for asked in names:
        row = []
        for found in (*names, *strays):
            number, style = counts[asked, found], "green" if asked == found else "red"
            row.append(f"[{style}]{number}[/{style}]" if number else "")
        table.add_row(asked, *row)
    return table


if __name__ == "__main__":
    typer.run(main)
