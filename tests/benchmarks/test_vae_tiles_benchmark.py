"""The benchmark of the VAE's tiles: what its aims say of rows, without decoding any."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vae_tiles
import vae_tiles_quality
from child import Cost

CLIP = {"tile": "256x384x65", "psnr": 60.0}
COLOUR = {"tile": "128x384x65", "psnr": 99.0, "deviation": 0.1, "step": 3.0, "untiled_step": 2.5}
RANDOM = {"tile": "64x768x1", "psnr": 50.0, "overlap": 12}


class Runs:
    """Children that say what they are told to say."""

    def __init__(self) -> None:
        self.rows = {"clip": CLIP, "colours": COLOUR, "random": RANDOM}
        self.peaks = {"33": 100, "257": 120}

    def __call__(self, command: list[Any]) -> tuple[Cost, str]:
        _, _, *words = map(str, command)
        if (row := self.rows.get(words[0])) is not None:
            return Cost(1, 1, 1, 1), json.dumps(row) + "\n"
        peak = self.peaks[words[1].split("x")[2]]
        return Cost(1, 1, peak, peak * (3 if words[2] == "off" else 1)), '{"tile": [5, 8, 12]}'


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(vae_tiles, "run", runs)
    return runs


def code(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vae_tiles.py", *words])
    return vae_tiles.main()


def test_rows_that_meet_the_aims_end_with_0_and_one_line_of_json(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out.json"
    assert code(monkeypatch, "--random", "0.9.5", "--out", str(out)) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["missed"] == []
    assert last["memory"]["33-frame tiles"]["growth"] == pytest.approx(1.2)
    assert last["random"] == {"0.9.5": [RANDOM]}
    assert json.loads(out.read_text()) == last


@pytest.mark.parametrize(
    ("kind", "change", "missed"),
    [
        ("clip", {"psnr": 44.9}, "clip 256x384x65"),
        ("colours", {"deviation": 1.1}, "colour 128x384x65"),
        ("colours", {"step": 3.6}, "colour 128x384x65"),
        ("random", {"psnr": 44.0}, "0.9.5 64x768x1"),
    ],
)
def test_a_row_that_misses_its_aim_is_named(
    runs: Runs,
    kind: str,
    change: dict[str, Any],
    missed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    runs.rows[kind] = {**runs.rows[kind], **change}
    assert code(monkeypatch, "--random", "0.9.5") == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["missed"] == [missed]


def test_memory_that_grows_with_the_clip_misses_the_aim_but_where_it_is_whole(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    runs.peaks["257"] = 131
    assert code(monkeypatch) == 1
    missed = json.loads(capsys.readouterr().out.splitlines()[-1])["missed"]
    assert missed == ["stream: 1.31", "auto in 300 MB: 1.31", "33-frame tiles: 1.31"]


def test_small_tiles_of_one_colour_are_shown_and_not_held_to_the_aim(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.rows["colours"] = {**COLOUR, "tile": "128x256x65", "deviation": 2.0}
    assert code(monkeypatch) == 0


def test_a_difference_is_measured_in_decibels_and_in_levels() -> None:
    full = np.zeros((1, 3, 2, 4, 4), np.float32)
    tiled = full.copy()
    tiled[..., 0] = 2 / 127.5
    row = vae_tiles_quality.compared(tiled, full)
    assert (row["deviation"], row["levels"]) == (2.0, 2)
    assert row["psnr"] == pytest.approx(10 * np.log10(4 / ((2 / 127.5) ** 2 / 4)), abs=0.1)
    assert vae_tiles_quality.compared(full, full)["psnr"] > 140
