"""Two clips from files: figures of known differences, refusals, pictures, memory."""

import json
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines import metrics, perceptual
from ltx_engines.metrics import Frames
from ltx_engines.perceptual import Lpips
from ltx_trt import cli, media
from ltx_trt.clips import open_clip
from ltx_trt.compare import GAP, beside, compare, overall, pair
from ltx_trt.media import Output

pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")


def moving(frames: int = 6, height: int = 32, width: int = 48, *, seed: int = 0) -> Frames:
    t, y, x = np.mgrid[:frames, :height, :width].astype(np.float64)
    waves = np.stack([np.sin(x / 5 + t), np.cos(y / 7 - t), np.sin((x + y) / 9)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 3 * seed, waves.shape)
    found: Frames = np.clip(np.rint(128 + 80 * waves + noise), 0, 255).astype(np.uint8)
    return found


def folder(path: Path, frames: Frames) -> Path:
    media.write(Output(path, "folder"), frames, 24)
    return path


def video(path: Path, frames: Frames, rate: float = 24) -> Path:
    media.write(Output(path, "mp4"), frames, rate)
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return folder(tmp_path / "a", moving())


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return folder(tmp_path / "b", moving(seed=1))


def run(*words: object) -> int:
    return cli.main(["compare", *map(str, words)])


def document(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert run(*words, "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_the_figures_are_those_of_the_whole_clips(
    a: Path, b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, a, b)
    wanted = metrics.measure(moving(), moving(seed=1))
    for name in ("psnr", "ssim", "ms_ssim", "flicker"):
        assert found["overall"][name] == pytest.approx(getattr(wanted, name), rel=1e-12)
    assert (found["frames"], found["height"], found["width"]) == (6, 32, 48)
    assert (found["a"], found["b"]) == (str(a), str(b))
    assert found["overall"]["lpips"] is None
    assert "not measured" in found["lpips"]


def test_each_frame_has_its_own_and_the_worst_is_named(
    tmp_path: Path, a: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = moving()
    spoilt[4] = 255 - spoilt[4]
    found = document(capsys, a, folder(tmp_path / "c", spoilt))
    psnr = [row["psnr"] for row in found["by_frame"]]
    assert [value == metrics.PSNR_CAP for value in psnr] == [True] * 4 + [False, True]
    for name in ("psnr", "ssim", "ms_ssim"):
        assert found["worst"][name]["frame"] == 4
        assert found["worst"][name]["value"] == found["by_frame"][4][name]
    assert found["worst"]["flicker"]["frame"] in (4, 5)
    assert found["by_frame"][0]["flicker"] is None


def test_a_clip_equals_itself_and_a_video_comes_near_its_frames(
    tmp_path: Path, a: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = document(capsys, a, a)["overall"]
    assert (same["psnr"], same["ssim"], same["flicker"]) == (metrics.PSNR_CAP, 1.0, 0.0)
    clip = video(tmp_path / "a.mp4", moving())
    assert document(capsys, a, clip)["overall"]["psnr"] > 30
    media.write(Output(tmp_path / "a.gif", "gif"), moving(), 24)
    gif = document(capsys, a, tmp_path / "a.gif")
    assert gif["frames"] == 6
    assert gif["overall"]["psnr"] > 25


def test_one_picture_is_a_clip_of_one_frame(
    tmp_path: Path, a: Path, b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, a / "0000.png", b / "0000.png")
    assert (found["frames"], found["overall"]["flicker"]) == (1, 0.0)
    assert run(a / "0000.png", b / "0000.png", "--plot", tmp_path / "p.png") == 0


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    frames = moving(11)
    for index, frame in enumerate(frames):
        media.write_image(tmp_path / "c" / f"frame_{index}.png", frame)
    found = np.stack([*open_clip(tmp_path / "c").pictures()])
    np.testing.assert_array_equal(found, frames)


def test_what_the_longer_one_has_beyond_is_left_out_if_that_is_wished(
    tmp_path: Path, a: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = folder(tmp_path / "longer", moving(9))
    assert run(a, longer) == 2
    said = capsys.readouterr().err
    assert "has 6 frames" in said
    assert "--common-frames to compare the first 6" in said
    for first, second in ((a, longer), (longer, a)):
        found = document(capsys, first, second, "--common-frames")
        assert (found["frames"], found["overall"]["psnr"]) == (6, metrics.PSNR_CAP)
        assert found["notes"] == [
            f"of {9 if first == longer else 6} and "
            f"{9 if second == longer else 6} frames, the first 6"
        ]


def test_other_frame_rates_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = (video(tmp_path / f"{rate}.mp4", moving(), rate) for rate in (12, 24))
    assert document(capsys, slow, fast)["notes"] == [
        "12 and 24 frames a second, compared one by one"
    ]


@pytest.mark.parametrize(
    ("other", "words", "said"),
    [
        ("small", (), "compare clips of one size"),
        ("longer", (), "add --common-frames"),
        ("nowhere", (), "there is no file"),
        ("empty", (), "has no PNG frames"),
        ("text.mp4", (), "is no image or video"),
        ("mixed", (), "a clip has one size"),
        ("b", ("--plot", "p.jpg"), "--plot is a .png file"),
        ("b", ("--out", "p.txt"), "--out is a .json file"),
        ("b", ("--side-by-side", "p.gif"), "--side-by-side is a .mp4 file"),
        ("b", ("--plot", "b/plot.png"), "would be a frame of"),
        ("b", ("--side-by-side", "v.mp4"), "is one of the clips"),
        ("b", ("--out", "no/p.json"), "there is no folder"),
        ("b", ("--frames", "3"), "No such option"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    other: str,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        folder(Path(name), moving())
    folder(Path("small"), moving(6, 32, 32))
    folder(Path("longer"), moving(7))
    folder(Path("mixed"), moving())
    media.write_image(Path("mixed/0003.png"), moving(1, 16, 16)[0])
    Path("empty").mkdir()
    Path("text.mp4").write_text("a clip")
    first = video(Path("v.mp4"), moving()) if "v.mp4" in words else Path("a")
    before = sorted(Path().rglob("*"))
    assert run(first, other, *words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(Path().rglob("*")) == before


def test_all_files_are_written_and_hold_what_was_found(
    tmp_path: Path, a: Path, b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video_, plot, out = (tmp_path / name for name in ("v.mp4", "p.png", "o.json"))
    words = ("--side-by-side", video_, "--plot", plot, "--out", out)
    found = document(capsys, a, b, *words)
    assert json.loads(out.read_text()) == found
    both = open_clip(video_)
    assert (both.frames, both.height, both.width) == (6, 32, 2 * 48 + GAP)
    frame = next(both.pictures()).astype(float)
    assert np.abs(frame[:, :48] - moving()[0]).mean() < 12
    assert np.abs(frame[:, 48 + GAP :] - moving(seed=1)[0]).mean() < 12
    assert frame[:, 50:54].mean() < 20
    with Image.open(plot) as image:
        assert len(image.getcolors(1 << 20)) > 3
    assert run(a, b) == 0
    table = capsys.readouterr().out
    for word in ("PSNR", "SSIM", "MS-SSIM", "flicker", "LPIPS", "not measured"):
        assert word in table


def test_both_clips_stand_side_by_side_and_none_of_them_twice() -> None:
    x, y = moving(1)[0], 255 - moving(1)[0]
    picture = beside(x, y, (32, 2 * 48 + GAP))
    np.testing.assert_array_equal(picture[:, :48], x)
    np.testing.assert_array_equal(picture[:, 48 : 48 + GAP], 0)
    np.testing.assert_array_equal(picture[:, 48 + GAP :], y)


def test_odd_sizes_are_filled_up_with_black_in_the_video(tmp_path: Path) -> None:
    one, other = (folder(tmp_path / name, moving(2, 33, 47)) for name in "xy")
    assert run(one, other, "--side-by-side", tmp_path / "v.mp4") == 0
    both = open_clip(tmp_path / "v.mp4")
    assert (both.height, both.width) == (34, 2 * 47 + GAP)


def test_a_comparison_that_breaks_off_leaves_no_video(
    tmp_path: Path, a: Path, b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> Iterator[object]:
        raise KeyboardInterrupt
        yield

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(metrics, "_similar", stop)
    assert run(a, b, "--side-by-side", tmp_path / "v.mp4") == 130
    assert sorted(tmp_path.rglob("*")) == before


def test_lpips_is_asked_for_each_frame_where_it_is_at_hand(
    a: Path, b: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = iter(np.arange(6) / 10)

    def distance(x: Frames, y: Frames) -> float:
        assert x.shape == y.shape == (1, 32, 48, 3)
        return float(next(levels))

    monkeypatch.setattr(perceptual, "find", lambda: Lpips("lpips 9.9, alex", distance))
    found = document(capsys, a, b)
    assert found["lpips"] == "lpips 9.9, alex"
    assert found["overall"]["lpips"] == pytest.approx(0.25)
    assert [row["lpips"] for row in found["by_frame"]] == [n / 10 for n in range(6)]
    assert found["worst"]["lpips"] == {"frame": 5, "value": 0.5}


def test_a_long_clip_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    clip = open_clip(folder(tmp_path / "c", moving(48, 64, 64)))
    peaks = []
    for frames in (12, 48):
        part = folder(tmp_path / str(frames), moving(frames, 64, 64))
        found = pair(open_clip(part), clip, common=True)
        tracemalloc.start()
        rows = list(compare(found, Lpips("not at hand")))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(rows) == frames
        assert overall(rows).psnr == metrics.PSNR_CAP
    assert peaks[1] < 1.1 * peaks[0]


def test_a_video_that_ends_before_it_says_so_is_not_taken_for_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ltx_trt import media_files

    one, other = video(tmp_path / "1.mp4", moving(6)), video(tmp_path / "2.mp4", moving(5))
    monkeypatch.setattr(media_files, "count", lambda _: 6)
    assert run(one, other) == 2
    assert "2.mp4 ends after 5 frames" in capsys.readouterr().err


def test_compare_is_there_without_torch_and_without_onnx_runtime(
    a: Path, b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "onnxruntime", "lpips", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(a, b) == 0
