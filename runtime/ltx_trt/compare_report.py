"""What a comparison found: a table for people, JSON for scripts, and a picture of every frame."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ltx_trt import media
from ltx_trt.compare import Pair, Row, overall

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from rich.table import Table

TITLES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "flicker": "flicker (levels)",
    "lpips": "LPIPS",
}
"""Of the measures, in order. PSNR ends at 60 dB, flicker is in levels of 255."""

HIGHER_IS_BETTER = ("psnr", "ssim", "ms_ssim")

DIGITS = {"psnr": 2, "flicker": 3}
"""After the point; of the others 5."""

WIDTH, PANEL, LEFT, MARGIN, TEXT = 900, 140, 70, 30, 13
"""Pixels of the picture: of a panel, of the numbers at its left, between two, of a letter."""

BLACK, GREY, BLUE = (0, 0, 0), (200, 200, 200), (31, 90, 180)


def document(pair: Pair, rows: list[Row], lpips: str) -> dict[str, Any]:
    """Every figure; `lpips` says by what that was measured, or why it was not."""
    return {
        "a": str(pair.a.path),
        "b": str(pair.b.path),
        "frames": len(rows),
        "height": pair.a.height,
        "width": pair.a.width,
        "notes": pair.notes,
        "lpips": lpips,
        "overall": asdict(overall(rows)),
        "worst": {name: _worst(name, rows) for name in TITLES if _measured(name, rows)},
        "by_frame": [{"frame": row.index, **_values(row)} for row in rows],
    }


def table(pair: Pair, rows: list[Row], lpips: str) -> "Table":
    from rich.table import Table

    size = f"{len(rows)} frames of {pair.a.width} x {pair.a.height}"
    title = f"{pair.a.path} and {pair.b.path}: {size}"
    found = Table(title=title, title_justify="left", caption=f"LPIPS: {lpips}")
    for column in ("", "all", "median frame", "worst frame"):
        found.add_column(column, justify="left" if not column else "right")
    whole = asdict(overall(rows))
    for name, word in TITLES.items():
        if not _measured(name, rows):
            found.add_row(word, "-", "-", "-")
            continue
        values = [value for row in rows if (value := _values(row)[name]) is not None]
        worst = _worst(name, rows)
        said = f"{_said(name, worst['value'])} in {worst['frame']}"
        found.add_row(word, _said(name, whole[name]), _said(name, np.median(values)), said)
    return found


def as_json(found: dict[str, Any]) -> str:
    return json.dumps(found)


def write_json(path: Path, found: dict[str, Any]) -> None:
    with media.replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_plot(path: Path, rows: list[Row]) -> None:
    """A panel for each measure, frames from left to right."""
    from PIL import Image, ImageDraw

    names = [name for name in TITLES if _measured(name, rows)]
    height = MARGIN + len(names) * (PANEL + 2 * MARGIN)
    image = Image.new("RGB", (WIDTH, height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for number, name in enumerate(names):
        top = MARGIN + number * (PANEL + 2 * MARGIN)
        points = [(row.index, _values(row)[name]) for row in rows]
        _panel(draw, top, TITLES[name], [(i, v) for i, v in points if v is not None])
    draw.text((LEFT, height - MARGIN), f"frame 0 to {rows[-1].index}", BLACK, font_size=TEXT)
    media.write_image(path, np.asarray(image))


def _panel(draw: "ImageDraw", top: int, title: str, points: Sequence[tuple[int, float]]) -> None:
    """From the least value to the largest; a line that does not move is in the middle."""
    low, high = (end(value for _, value in points) for end in (min, max))
    room = (high - low) or 1.0
    base = low if high > low else low - 0.5
    last = max(1, points[-1][0])

    def place(index: int, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - MARGIN) * index / last
        return x, top + PANEL * (1 - (value - base) / room)

    draw.rectangle((LEFT, top, WIDTH - MARGIN, top + PANEL), outline=GREY)
    draw.text((LEFT, top - TEXT - 6), title, BLACK, font_size=TEXT)
    for value in {low, high}:
        draw.text((4, place(0, value)[1] - TEXT / 2), f"{value:.5g}", BLACK, font_size=TEXT)
    line = [place(*point) for point in points]
    if len(line) > 1:
        draw.line(line, BLUE, width=2)
    else:
        draw.circle(line[0], 3, fill=BLUE)


def _values(row: Row) -> dict[str, float | None]:
    found = row.measures
    return {
        "psnr": found.psnr,
        "ssim": found.ssim,
        "ms_ssim": found.ms_ssim,
        "flicker": found.flicker,
        "lpips": row.lpips,
    }


def _measured(name: str, rows: list[Row]) -> bool:
    return any(_values(row)[name] is not None for row in rows)


def _worst(name: str, rows: list[Row]) -> dict[str, Any]:
    known = [(v, row.index) for row in rows if (v := _values(row)[name]) is not None]
    choose = min if name in HIGHER_IS_BETTER else max
    value, frame = choose(known, key=lambda one: one[0])
    return {"frame": frame, "value": value}


def _said(name: str, value: float) -> str:
    return f"{value:.{DIGITS.get(name, 5)}f}"
