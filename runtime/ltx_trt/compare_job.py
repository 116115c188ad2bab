"""One comparison of the command line: checks first, then measures, then files."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from ltx_engines import perceptual
from ltx_engines.errors import UserError
from ltx_trt import compare_report, media
from ltx_trt.clips import open_clip
from ltx_trt.compare import Pair, Row, compare, pair
from ltx_trt.media_files import Picture
from ltx_trt.voice import Voice

RATE = 24.0
"""Frames a second of the video side by side, where neither clip says its own."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Files, each of them only if it is wished."""

    json: Path | None = None
    plot: Path | None = None
    video: Path | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """`common`: what the longer one has beyond the other is left out."""

    a: Path
    b: Path
    outputs: Outputs
    common: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """`lpips` says by what that was measured, or why it was not."""

    pair: Pair
    rows: list[Row]
    lpips: str

    def document(self) -> dict[str, Any]:
        return compare_report.document(self.pair, self.rows, self.lpips)


def execute(order: Order, voice: Voice) -> Found:
    clips = pair(open_clip(order.a), open_clip(order.b), common=order.common)
    _check_outputs(order)
    lpips = perceptual.find()
    voice.say(*clips.notes)
    with ExitStack() as held:
        show = held.enter_context(_side_by_side(order.outputs.video, clips))
        tick = held.enter_context(_counted(voice, clips.frames))
        rows = []
        for row in held.enter_context(closing(compare(clips, lpips, show))):
            rows.append(row)
            tick()
    found = Found(clips, rows, lpips.words)
    if order.outputs.plot is not None:
        compare_report.write_plot(order.outputs.plot, rows)
    if order.outputs.json is not None:
        compare_report.write_json(order.outputs.json, found.document())
    return found


def _check_outputs(order: Order) -> None:
    """Before any work, also that nothing is written over what is read."""
    outputs = order.outputs
    wished = {"--out": outputs.json, "--plot": outputs.plot, "--side-by-side": outputs.video}
    endings = {"--out": ".json", "--plot": ".png", "--side-by-side": ".mp4"}
    seen = {path.resolve(): f"one of the clips, {path}" for path in (order.a, order.b)}
    for option, path in wished.items():
        if path is None:
            continue
        if path.suffix.lower() != endings[option]:
            raise UserError(f"{option} is a {endings[option]} file, not {path}")
        if (other := seen.setdefault(path.resolve(), option)) is not option:
            raise UserError(f"{option} {path} is {other}; name it otherwise")
        if option == "--plot" and path.absolute().parent.resolve() in seen:
            raise UserError(f"{option} {path} would be a frame of {path.parent}; name it otherwise")
        media.check_file(path)


@contextmanager
def _side_by_side(path: Path | None, clips: Pair) -> Iterator[Callable[[Picture], None] | None]:
    """What takes the pictures of the video; it is there when the last of them is."""
    if path is None:
        yield None
        return
    rate = clips.a.frame_rate or clips.b.frame_rate or RATE
    with media.Writer(media.Output(path, "mp4"), rate) as writer:
        yield lambda picture: writer.write(picture[None])


@contextmanager
def _counted(voice: Voice, total: int) -> Iterator[Callable[[], None]]:
    """A bar where somebody looks; call it for each frame."""
    columns = (TextColumn("frames"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    seen = voice.console.is_terminal
    with Progress(*columns, console=voice.console, transient=True, disable=not seen) as progress:
        task = progress.add_task("frames", total=total)
        yield lambda: progress.advance(task)
