"""A file of prompts becomes numbered clips, the very ones that single runs make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_trt import cli
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession

pytest.importorskip("onnxruntime")

MakeBundle = Callable[..., Path]


@pytest.fixture
def folder(make_bundle: MakeBundle) -> Path:
    return make_bundle()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("# two\nw5 w9\nw7\n")
    return file


def ltx_trt(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_batch_makes_what_single_runs_make_with_seeds_that_count_up(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--bundle", folder, "--num-inference-steps", 2, "--json")
    assert ltx_trt("batch", "--prompts", prompts, "-o", out, "--seed", 7, *words) == 0
    made = rows(capsys)
    assert [row["output"] for row in made] == [str(out / "0000.mp4"), str(out / "0001.mp4")]
    for row, (prompt, seed) in zip(made, (("w5 w9", 7), ("w7", 8)), strict=True):
        single = tmp_path / f"{seed}.mp4"
        assert ltx_trt("run", "--prompt", prompt, "-o", single, "--seed", seed, *words) == 0
        (alone,) = rows(capsys)
        assert (row["seed"], row["sha256"]) == (seed, alone["sha256"])
        assert Path(row["output"]).read_bytes() == single.read_bytes()
    assert made[0]["sha256"] != made[1]["sha256"]


def test_lossless_frames_are_the_frames_of_the_hash(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hashlib import sha256

    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "out"
    words = ("--bundle", folder, "--format", "png", "--num-frames", 9, "--json")
    assert ltx_trt("batch", "--prompts", prompts, "-o", out, *words) == 0
    for row in rows(capsys):
        paths = sorted(Path(row["output"]).iterdir())
        frames = np.stack([np.asarray(image.open(path)) for path in paths])
        assert len(frames) == 9
        assert row["sha256"] == sha256(frames.tobytes()).hexdigest()


def test_a_note_that_is_true_of_each_clip_is_said_once(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--bundle", folder, "--width", 50, "--format", "gif")
    assert ltx_trt("batch", "--prompts", prompts, "-o", tmp_path / "out", *words) == 0
    captured = capsys.readouterr()
    assert captured.err.count("are cut out of") == 1
    assert captured.out.count("frames of 50 x 32") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--width", "33"), "mp4 needs an even width"),
        (("--prompts", "none.txt"), "none.txt: No such file"),
        (("--seed", str(2**64 - 1)), "seed must be from 0 to 2^64 - 1"),
        (("--pipeline-config", "none.yaml"), "none.yaml"),
        (("-o", "prompts.txt"), "prompts.txt is there and not an empty folder"),
        (("-o", "bundle"), "bundle is there and not an empty folder"),
        (("-o", "nowhere/out"), "there is no folder"),
        (("--format", "avi"), "--format"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_nothing_is_written(
    folder: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("batch", "--bundle", folder, "--prompts", prompts, "-o", "out", *words)
    assert ltx_trt(*arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert said in captured.err
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "prompts.txt"}


def test_what_is_finished_stays_when_a_later_clip_is_interrupted(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three stages a clip: the fourth that opens is of the second."""
    opened = OnnxRuntimeSession.open
    stages: list[Any] = []

    def stop_at_the_second(*arguments: Any, **options: Any) -> OnnxRuntimeSession:
        if len(stages) == 3:
            raise KeyboardInterrupt
        stages.append(arguments)
        return opened(*arguments, **options)

    monkeypatch.setattr(OnnxRuntimeSession, "open", stop_at_the_second)
    out = tmp_path / "out"
    assert ltx_trt("batch", "--bundle", folder, "--prompts", prompts, "-o", out) == 130
    assert [path.name for path in out.iterdir()] == ["0000.mp4"]
    assert ltx_trt("batch", "--bundle", folder, "--prompts", prompts, "-o", tmp_path / "b") == 130
    assert not (tmp_path / "b").exists()
