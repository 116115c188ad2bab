"""Bundles measured against each other, through the runtime's own process, and the report on it."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines import perceptual
from ltx_engines.bundle import SchedulerFacts, create, seal
from ltx_engines.errors import UserError
from ltx_engines.metrics import PSNR_CAP, Frames, Measures
from ltx_export import cli, quality, quality_report, runtime_process
from ltx_export.quality import Clip, Comparison, Minima, Order, Quality, Scorer
from ltx_export.runtime_process import Batch, Terms
from tests.runtime.conftest import DEFAULTS, manifest, write_files

pytest.importorskip("onnxruntime")

GOOD, BETTER = np.float32(2.0).tobytes(), np.float32(2.3).tobytes()
"""The one weight of the models that are made here."""

CONFIG = "num_inference_steps: 2\nguidance_scale: 2\nstg_scale: 0\n"


def make_bundle(folder: Path, *, other_weight: bool = False, **changes: Any) -> Path:
    with create(folder) as temporary:
        write_files(temporary)
        if other_weight:
            file = temporary / "by-hand.safetensors"
            file.write_bytes(file.read_bytes().replace(GOOD, BETTER))
        seal(temporary, manifest(**changes))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference, a bundle with another weight, prompts."""
    folder = tmp_path_factory.mktemp("quality")
    make_bundle(folder / "reference")
    make_bundle(folder / "other", other_weight=True)
    (folder / "prompts.txt").write_text("w5 w90\nw17 w80 w50\n")
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def order(home: Path, *bundles: Path, **changes: Any) -> Order:
    facts: dict[str, Any] = {
        "bundles": bundles or (home / "other",),
        "reference": home / "reference",
        "prompts": home / "prompts.txt",
        "pipeline_config": home / "config.yaml",
        "scratch": home,
    }
    return Order(**facts | changes)


def finish(steps: Iterator[str]) -> tuple[list[str], Any]:
    """What a generator says, and what it returns."""
    said = []
    while True:
        try:
            said.append(next(steps))
        except StopIteration as end:
            return said, end.value


def refused(order: Order) -> str:
    with pytest.raises(UserError) as caught:
        finish(quality.run(order))
    return str(caught.value)


def ltx_export(home: Path, *words: object) -> int:
    common = ["--reference", home / "reference", "--prompts", home / "prompts.txt"]
    common += ["--pipeline-config", home / "config.yaml"]
    return cli.main([str(word) for word in ("quality", *words, *common)])


def test_an_equal_bundle_is_equal_and_another_is_not(home: Path) -> None:
    same = make_bundle(home / "same")
    right = Scorer("seen", lambda prompt, clip: float(len(prompt) > 6 and clip.shape[0] == 9))
    said, found = finish(quality.run(order(home, same, home / "other", seed=3), right))
    equal, other = found.comparisons
    assert (equal.name, other.name, found.reference) == ("same", "other", "reference")
    for clip in equal.clips:
        assert clip.measures == Measures(PSNR_CAP, ssim=1.0, ms_ssim=1.0, flicker=0.0)
    assert 0 < other.mean("ssim") < 1
    assert max(other.values("psnr")) < 40
    assert [clip.seed for clip in other.clips] == [3, 4]
    assert [clip.prompt for clip in other.clips] == ["w5 w90", "w17 w80 w50"]
    assert (found.judge, found.reference_score, other.score) == ("seen", 0.5, 0.5)
    assert said[0] == "reference reference: 0 of 2 clips"
    assert said[-1] == "other: 2 of 2 clips"
    assert not list(home.glob("ltx-quality-*")), "the reference's clips stayed"


def test_the_command_reports_and_a_missed_minimum_is_exit_code_1(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    limits = ("--min-ssim", 0.9999, "--min-psnr", 1, "--out", out)
    assert ltx_export(home, home / "other", *limits) == 1
    captured = capsys.readouterr()
    assert "other: SSIM is 0." in captured.err
    assert "PSNR is" not in captured.err
    assert {path.name for path in out.iterdir()} == set(quality_report.FILES)
    read = json.loads((out / "report.json").read_text())
    clips = read["bundles"]["other"]["clips"]
    assert [clip["prompt"] for clip in clips] == ["w5 w90", "w17 w80 w50"]
    means = read["bundles"]["other"]["means"]
    assert means["ssim"] == pytest.approx(np.mean([clip["ssim"] for clip in clips]))
    page = (out / "report.md").read_text()
    assert f"| other | {means['ssim']:.4f} (" in page
    assert read["command"] in page
    assert "9 frames of 64 x 32" in page
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert ltx_export(home, home / "other", "--out", out) == 2
    assert "add --overwrite" in capsys.readouterr().err


def test_without_a_missed_minimum_the_exit_code_is_0(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ltx_export(home, home / "other", "--min-psnr", 1) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("| bundle | SSIM | PSNR dB | MS-SSIM | flicker |\n")
    assert "1 measured on 2 clips" in captured.out


def test_bundles_that_do_other_things_by_themselves_are_refused_before_any_work(
    home: Path, tmp_path: Path
) -> None:
    guided = make_bundle(tmp_path / "guided", defaults=DEFAULTS.model_copy(update={"stg_scale": 9}))
    assert "guided has stg_scale 9.0, the reference 1.0" in refused(
        order(home, guided, pipeline_config=None)
    )


def test_what_the_config_decides_may_differ_in_the_bundles(home: Path, tmp_path: Path) -> None:
    guided = make_bundle(tmp_path / "guided", defaults=DEFAULTS.model_copy(update={"stg_scale": 9}))
    _, found = finish(quality.run(order(home, guided)))
    assert found.comparisons[0].mean("ssim") == 1


def test_another_schedule_is_refused(home: Path, tmp_path: Path) -> None:
    uniform = make_bundle(tmp_path / "uniform", scheduler=SchedulerFacts(sampler="Uniform"))
    message = refused(order(home, uniform))
    assert "another schedule; give both one --pipeline-config" in message
    assert not list(home.glob("ltx-quality-*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bundles": ("reference",)}, "is the reference itself"),
        ({"bundles": ("other", "other")}, "is named twice"),
        ({"bundles": ("nothing",)}, "nothing"),
        ({"reference": "nothing"}, "nothing"),
        ({"prompts": "config-none.txt"}, "config-none.txt"),
        ({"pipeline_config": "prompts.txt"}, "prompts.txt"),
    ],
)
def test_what_the_user_can_mend_is_said_before_any_work(
    home: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(runtime_process, "clips", None)
    paths = {
        key: tuple(map(Path, value)) if isinstance(value, tuple) else Path(value)
        for key, value in changes.items()
    }
    with pytest.raises((UserError, FileNotFoundError), match=words):
        finish(quality.run(order(home, **paths)))


def test_frames_smaller_than_the_window_are_refused(home: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(CONFIG + "width: 10\n")
    assert "frames of 10 x 32 are smaller than SSIM's window of 11" in refused(
        order(home, pipeline_config=small)
    )


def test_without_the_runtime_the_install_command_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_process, "RUNTIME", "ltx_trt_that_is_not_there")
    assert "pip install 'ltx-trt[onnxruntime]'" in refused(order(home))


def batch(home: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """A runtime that runs this script instead."""
    monkeypatch.setattr(Batch, "command", lambda *_: [sys.executable, "-c", script])
    return Batch(home / "other", home / "prompts.txt")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("raise SystemExit('ltx-trt: the disk is full')", r"other: the disk is full \(.*code 1\)"),
        ("import os; os.kill(os.getpid(), 9)", r"other: it said nothing \(it ended with code -9\)"),
        (
            "import sys; print('note', file=sys.stderr); print('ltx-trt: no', file=sys.stderr); "
            "sys.exit(2)",
            r"other: no$",
        ),
        ("""print('{"state": "failed", "reason": "too hot"}')""", "other: too hot$"),
    ],
)
def test_the_runtimes_last_word_is_passed_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        list(runtime_process.clips(batch(home, script, monkeypatch), tmp_path / "clips"))


def test_an_interrupted_runtime_interrupts(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(runtime_process.clips(batch(home, "raise SystemExit(130)", monkeypatch), tmp_path))


def test_closing_the_generator_ends_the_runtime(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would sleep for longer than the test may take, and then leave a file."""
    left = tmp_path / "left"
    line = json.dumps({"output": "x", **dict.fromkeys(Terms.__slots__, 0), "sigmas": [1, 0]})
    script = (
        f"import time, pathlib; print({line!r}, flush=True); time.sleep(60); "
        f"pathlib.Path({str(left)!r}).touch()"
    )
    making = runtime_process.clips(batch(home, script, monkeypatch), tmp_path)
    assert next(making).terms.sigmas == (1, 0)
    making.close()
    assert not left.exists()


def test_equal_names_are_told_apart_by_their_paths() -> None:
    paths = [Path("/a/bundle"), Path("/b/bundle"), Path("/b/int8")]
    assert quality._names(paths) == ["/a/bundle", "/b/bundle", "int8"]


def test_a_strip_has_the_first_and_the_last_frame_and_keeps_the_proportions() -> None:
    clip = np.zeros((25, 320, 640, 3), np.uint8)
    clip[0], clip[-1] = 50, 200
    found = quality.strip(clip)
    assert found.shape == (80, 6 * 160, 3)
    assert (found[0, 0, 0], found[0, -1, 0], found[0, 200, 0]) == (50, 200, 0)
    assert quality.strip(clip[:1, :16, :16]).shape == (16, 16, 3)


def made(*ssims: float, strip: Frames | None = None, psnr: float = 30.0) -> Comparison:
    strip = np.zeros((8, 16, 3), np.uint8) if strip is None else strip
    clips = [
        Clip(f"a |{number}|", number, Measures(psnr, ssim, 1.0, 0.0), strip, score=0.5)
        for number, ssim in enumerate(ssims)
    ]
    return Comparison("made", tuple(clips))


def found(*comparisons: Comparison) -> Quality:
    terms = Terms(7, 9, 128, 64, 24.0, "euler", (1.0, 0.5, 0.0))
    strips = tuple(clip.strip + 9 for clip in comparisons[0].clips)
    return Quality("original", "p.txt", terms, "not measured", "eye", strips, 0.75, comparisons)


def test_pooled_psnr_is_of_the_mean_error() -> None:
    clips = made(1, 1).clips
    ten = replace(clips[1], measures=replace(clips[1].measures, psnr=10.0))
    comparison = Comparison("made", (clips[0], ten))
    assert comparison.mean("psnr") == 20
    assert comparison.pooled_psnr == pytest.approx(-10 * np.log10((1e-3 + 1e-1) / 2))


def test_a_mean_that_is_no_number_misses_every_minimum() -> None:
    limits = Minima(ssim=0.9, psnr=30)
    assert limits.missed(made(0.9, 0.9)) == []
    assert limits.missed(made(0.9, 0.7)) == ["made: SSIM is 0.8000, the minimum is 0.9"]
    assert len(limits.missed(made(float("nan"), psnr=29.9))) == 2
    assert Minima().missed(made(0.1)) == []


def test_the_picture_shows_best_middle_and_worst_of_all_bundles_together() -> None:
    one, other = made(0.9, 0.1, 0.5, 0.6), made(0.9, 1.0, 0.5, 0.2)
    assert quality_report.chosen(found(one, other)) == [0, 2, 3]
    assert quality_report.chosen(found(made(0.3))) == [0]
    assert quality_report.chosen(found(made(0.3, 0.4))) == [1, 0]


def test_a_sheet_has_the_reference_above_each_bundle() -> None:
    strips = [np.full((8, 16, 3), level, np.uint8) for level in (10, 20)]
    rows = quality_report.sheet(found(*(made(1, strip=strip) for strip in strips)), 0)
    assert rows.shape == (3 * 8 + 2 * quality_report.GAP, 16, 3)
    assert [int(rows[at, 0, 0]) for at in (0, 8, 12, 20, 24)] == [19, 255, 10, 255, 20]


def test_the_page_says_what_was_measured_and_how() -> None:
    page = quality_report.markdown(found(made(0.99, 0.95)), "ltx-export quality a")
    assert "| original (reference) |  |  |  |  | 75.0% |" in page
    assert (
        "| made | 0.9700 (0.9500) | 30.0 (30.0) | 1.0000 (1.0000) | 0.00 (0.00) | 50.0% |" in page
    )
    assert "3 scales, as many as these frames have room for" in page  # 64 wide: 64, 32, 16
    assert "LPIPS: not measured." in page
    assert "| made | a \\|1\\| | 1 | 0.9500 | 30.0 |" in page
    assert "made 30.0 dB" in page


def test_lpips_gets_a_column_where_it_was_measured() -> None:
    (clip,) = made(0.99).clips
    measured = replace(clip, measures=replace(clip.measures, lpips=0.0123))
    rows = quality_report.table(found(Comparison("made", (measured,))))
    assert rows[0].endswith("| flicker | LPIPS | eye |")
    assert "| 0.0123 (0.0123) |" in rows[-1]


def test_a_report_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quality_report, "_draw", stop)
    with pytest.raises(KeyboardInterrupt):
        quality_report.write(found(made(0.9)), tmp_path / "out", "command")
    assert list((tmp_path / "out").iterdir()) == []


def test_equal_findings_give_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        quality_report.write(found(made(0.9, 0.8)), tmp_path / name, "command", Minima(ssim=0.85))
    for name in quality_report.FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(("name", "words"), [("file", "is a file"), ("no/out", "no folder")])
def test_a_report_that_cannot_be_written_is_said_first(
    tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=words):
        quality_report.check(tmp_path / name)


def test_without_lpips_the_report_says_what_is_missing() -> None:
    if all(map(find_spec, perceptual.PACKAGES)):
        pytest.skip("lpips and torchvision are installed")
    assert perceptual.find().distance is None
    assert "not installed" in perceptual.find().words


STAND_INS = {
    "lpips.py": "import torch\n"
    "class LPIPS(torch.nn.Module):\n"
    "    def __init__(self, net, verbose):\n"
    "        super().__init__()\n"
    "        assert net == 'alex'\n"
    "    def forward(self, x, y):\n"
    "        assert x.shape == (1, 3, 4, 6) and x.dtype == torch.float32\n"
    "        return (x - y).abs().mean().reshape(1, 1, 1, 1)\n",
    "lpips-9.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: lpips\nVersion: 9.9\n",
    "torchvision/__init__.py": "",
    "torchvision/models.py": "class AlexNet_Weights:\n"
    "    class DEFAULT:\n"
    "        url = 'https://nowhere/alexnet-1.pth'\n",
}


def test_a_torchvision_of_another_torch_is_a_reason_and_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lpips.py").touch()
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    words = "not measured: torchvision cannot be imported (operator nms does not exist)"
    assert perceptual.find() == perceptual.Lpips(words)


def test_lpips_is_asked_frame_by_frame_in_its_own_range_if_its_weights_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in STAND_INS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for name in ("lpips", "torchvision", "torchvision.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    weights = tmp_path / "home/hub/checkpoints/alexnet-1.pth"
    assert perceptual.find().words == f"not measured: alexnet-1.pth is not in {weights.parent}"
    weights.parent.mkdir(parents=True)
    weights.touch()
    measure = perceptual.find()
    assert measure.words == "lpips 9.9, alex"
    assert measure.distance is not None
    white, black = (np.full((2, 4, 6, 3), level, np.uint8) for level in (255, 0))
    white[1] = 0
    assert measure.distance(white, black) == pytest.approx(1.0)  # 2 in one frame of two
    for name in ("lpips", "torchvision", "torchvision.models"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("ssim", "psnr"), [(math.nan, None), (2.0, None), (None, math.inf), (None, math.nan)]
)
def test_a_minimum_that_nothing_can_reach_is_refused(
    ssim: float | None, psnr: float | None
) -> None:
    with pytest.raises(UserError, match="wanted a number up to"):
        Minima(ssim=ssim, psnr=psnr)
