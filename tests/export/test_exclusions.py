"""What `quantize` keeps, from the runs of a small model to the file that is written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ltx_engines import metrics
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_export import (
    calibrate,
    calibration,
    cli,
    exclusions,
    quantize,
    recipes,
    sensitivity,
    sensitivity_report,
    trials,
)
from ltx_export.calibration import Calibration
from ltx_export.exclusions import Question, Wish
from ltx_export.sensitivity_report import Sensitivity
from ltx_ref import quantization
from ltx_ref.checkpoint import read_header
from tests.export.checkpoints import LAYERS, config, write_checkpoint
from tests.export.conftest import Files
from tests.export.generators import finish

Words = list[str | Path]

SHAPE = VideoShape(9, 32, 64)
STEPS = 3


@pytest.fixture(scope="module")
def runs(files: Files, tmp_path_factory: pytest.TempPathFactory) -> calibrate.Order:
    """Two runs of three steps."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red ball\na green one")
    return calibrate.Order(
        files.checkpoint,
        files.text_encoder,
        prompts,
        Path("unread"),
        shapes=(SHAPE,),
        steps=STEPS,
        seed=5,
        device="cpu",
    )


@pytest.fixture(scope="module")
def ranges(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Made up, and kept in a file."""
    header = read_header(files.checkpoint)
    found = {
        path: np.linspace(0.5, 4, header.tensors[f"{path}.weight"].shape[1]).astype(np.float32)
        for path in quantize.linear_layers(header)
    }
    facts = {
        "format_version": calibration.FORMAT,
        "checkpoint": calibration.identity(files.checkpoint),
        "runs": 1,
        "done": 1,
    }
    path = tmp_path_factory.mktemp("ranges") / "ranges.safetensors"
    calibration.write(Calibration(path, found, facts))
    return calibration.read(path, header)


@pytest.fixture(scope="module")
def report(runs: calibrate.Order, ranges: Calibration) -> Sensitivity:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chosen = sensitivity.recipes_of("fp8,int8-wo")
    found = finish(sensitivity.measure(sensitivity.Order(runs, chosen, ranges.path, 2)))
    torch.set_num_threads(threads)
    return found


@pytest.fixture
def saved(report: Sensitivity, tmp_path: Path) -> Path:
    sensitivity_report.save(report, tmp_path / "s.json")
    return tmp_path / "s.json"


def command(runs: calibrate.Order, name: str, *options: str | Path) -> int:
    words = [name, str(runs.checkpoint), *map(str, options)]
    return cli.main(words)


def running(runs: calibrate.Order) -> list[str]:
    text = ["--text-encoder", str(runs.text_encoder), "--prompts", str(runs.prompts)]
    return [*text, "--shape", "64x32x9", "--steps", str(STEPS), "--seed", "5", "--device", "cpu"]


def test_each_layer_is_measured_on_all_runs(report: Sensitivity, ranges: Calibration) -> None:
    assert [errors.name for errors in report.measured] == ["fp8", "int8-wo"]
    for errors in report.measured:
        assert len(errors.layers) == 10 * LAYERS
        assert all(0 < error < 1 for error in errors.layers.values())
    assert report.facts["prompts"] == ["a red ball", "a green one"]
    assert report.facts["seeds"] == [5, 6]
    assert report.facts["measured_steps"] == {"64x32x9": [0, 2]}
    assert report.facts["calibration"]["file"] == calibration.identity(ranges.path)


def test_one_resident_block_gives_the_same_report(
    report: Sensitivity, runs: calibrate.Order, ranges: Calibration
) -> None:
    order = sensitivity.Order(
        replace(runs, offload_blocks=True), sensitivity.recipes_of("fp8"), ranges.path, 2
    )
    assert finish(sensitivity.measure(order)).measured == report.measured[:1]


def test_nothing_is_left_of_quantized_checkpoints(runs: calibrate.Order, tmp_path: Path) -> None:
    chosen = sensitivity.recipes_of("int8-wo")
    order = sensitivity.Order(runs, chosen, None, 1, scratch=tmp_path)
    work = sensitivity.measure(order)
    while "measuring" not in next(work):
        pass
    assert len(list(tmp_path.iterdir())) == 1
    work.close()
    assert not list(tmp_path.iterdir())


def test_ranges_are_asked_for_where_they_are_wanted_and_refused_where_not(
    runs: calibrate.Order, ranges: Calibration
) -> None:
    fp8, plain = sensitivity.recipes_of("fp8,int8-wo"), sensitivity.recipes_of("int8-wo")
    with pytest.raises(UserError, match="fp8 wants ranges of activations; give --calibration"):
        finish(sensitivity.measure(sensitivity.Order(runs, fp8)))
    with pytest.raises(UserError, match="leave out --calibration"):
        finish(sensitivity.measure(sensitivity.Order(runs, plain, ranges.path)))


def test_a_recipe_is_measured_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--formats fp8, fp8 has fp8 twice"):
        sensitivity.recipes_of("fp8, fp8")


def selected(
    runs: calibrate.Order, report: Sensitivity, target: float, scratch: Path | None = None
) -> trials.Selected:
    recipe = recipes.load("int8-wo")
    layers = sorted(report.measured[1].layers.items(), key=lambda entry: -entry[1])
    return finish(trials.select(trials.Order(runs, recipe, None, layers, target, scratch)))


def test_what_is_similar_enough_keeps_nothing(
    runs: calibrate.Order, report: Sensitivity, tmp_path: Path
) -> None:
    found = selected(runs, report, 0.5, tmp_path)
    assert (found.recipe, found.choice.kept) == (recipes.load("int8-wo"), 0)
    assert not list(tmp_path.iterdir())


def clips(runs: calibrate.Order, checkpoint: Path) -> list[metrics.Frames]:
    """As `trials` makes them, from the parts that it is made of."""
    plan = calibrate.check(replace(runs, out=checkpoint.parent / "none"))
    encoded = finish(calibrate.encode(plan))
    order = replace(plan.order, checkpoint=checkpoint)
    return list(trials.clips(replace(plan, order=order, header=read_header(checkpoint)), encoded))


def test_the_score_is_that_of_the_file_that_is_written(
    runs: calibrate.Order, report: Sensitivity, tmp_path: Path
) -> None:
    whole = selected(runs, report, 0.5)
    found = selected(runs, report, (1 + whole.choice.score) / 2)
    assert whole.choice.score < found.choice.score < 1
    assert 0 < found.choice.kept < 10 * LAYERS
    out = tmp_path / "q.safetensors"
    finish(quantize.write(quantize.plan(read_header(runs.checkpoint), found.recipe), out))
    pairs = zip(clips(runs, out), clips(runs, runs.checkpoint), strict=True)
    assert np.mean([metrics.similarity(*pair).ssim for pair in pairs]) == found.choice.score


def test_clips_of_one_resident_block_are_the_same(runs: calibrate.Order) -> None:
    offloaded = clips(replace(runs, offload_blocks=True), runs.checkpoint)
    for one, other in zip(clips(runs, runs.checkpoint), offloaded, strict=True):
        assert one.shape == (SHAPE.frames, SHAPE.height, SHAPE.width, 3)
        assert np.array_equal(one, other)


def test_the_two_clips_differ(runs: calibrate.Order) -> None:
    one, other = clips(runs, runs.checkpoint)
    assert not np.array_equal(one, other)


def test_pixels_that_are_not_numbers_are_no_clip() -> None:
    with pytest.raises(UserError, match="not numbers"):
        trials.frames(torch.full((1, 3, 1, 32, 32), float("nan")))


def test_pixels_become_the_bytes_that_the_runtime_makes() -> None:
    pixels = torch.tensor([0.0, 0.5, 0.999, 1.0])[:, None].expand(4, 3).T.reshape(1, 3, 1, 1, 4)
    assert trials.frames(pixels)[0, 0, :, 0].tolist() == [0, 127, 254, 255]


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (lambda: Wish(max_error=0.1, target_ssim=0.9), "both choose layers; give one"),
        (lambda: Wish(report=Path("s.json")), "chooses nothing alone"),
        (lambda: Wish(target_ssim=1.1), "at most 1"),
    ],
)
def test_wishes_that_contradict_themselves_are_refused(wish: Callable[[], Wish], said: str) -> None:
    with pytest.raises(UserError, match=said):
        wish()


def question(runs: calibrate.Order | None, checkpoint: Path, scratch: Path) -> Question:
    return Question(read_header(checkpoint), recipes.load("int8-wo"), None, runs, scratch)


def test_runs_are_asked_for_where_they_are_wanted(runs: calibrate.Order, tmp_path: Path) -> None:
    asked = question(None, runs.checkpoint, tmp_path)
    with pytest.raises(UserError, match="--max-error wants --sensitivity FILE, or --prompts"):
        finish(exclusions.choose(Wish(max_error=0.1), asked))
    with pytest.raises(UserError, match="--target-ssim wants --prompts"):
        finish(exclusions.choose(Wish(target_ssim=0.9, report=Path("s.json")), asked))


def test_what_a_report_cannot_give_is_said_before_anything_is_calibrated(
    runs: calibrate.Order, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitting: Words = ["--recipe", "int8", *running(runs), "--sensitivity", saved]
    out = tmp_path / "q.safetensors"
    assert command(runs, "quantize", *fitting, "--max-error", "0.1", "--out", out) == 2
    found = capsys.readouterr().err
    assert "was not measured as int8" in found
    assert len(found.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["s.json"]


def test_errors_that_are_measured_on_the_way_choose_as_those_of_a_report(
    runs: calibrate.Order, saved: Path, report: Sensitivity, tmp_path: Path
) -> None:
    bound = float(np.median(list(report.measured[1].layers.values())))
    asked = question(runs, runs.checkpoint, tmp_path)
    told = finish(exclusions.choose(Wish(max_error=bound, report=saved), asked))
    found = finish(exclusions.choose(Wish(max_error=bound), asked))
    assert {rule.layers for rule in told.recipe.rules} == {r.layers for r in found.recipe.rules}
    assert told.sentence.startswith(f"{5 * LAYERS} of {10 * LAYERS} layers have an error above")


def test_a_report_of_another_checkpoint_chooses_nothing(saved: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other.safetensors", config("0.9"))
    with pytest.raises(UserError, match=r"was measured on small\.safetensors"):
        wish = Wish(max_error=0.1, report=saved)
        finish(exclusions.choose(wish, question(None, other, tmp_path)))


def test_the_command_measures_shows_and_saves(
    runs: calibrate.Order, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "s.json", tmp_path / "s.png"
    options = [*running(runs), "--formats", "int8-wo", "--sample-steps", "1"]
    assert command(runs, "sensitivity", *options, "--out", out, "--plot", plot) == 0
    text = capsys.readouterr().out
    assert f"The {10 * LAYERS} largest of {10 * LAYERS} errors of single layers" in text
    assert "By block" in text
    found = sensitivity_report.read(out)
    assert found.facts["measured_steps"] == {"64x32x9": [0]}
    assert plot.stat().st_size > 1000
    assert command(runs, "sensitivity", *options, "--out", out) == 2
    assert "is already there; give --overwrite" in capsys.readouterr().err


def test_what_is_chosen_travels_in_the_file(
    runs: calibrate.Order,
    ranges: Calibration,
    saved: Path,
    report: Sensitivity,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    errors = sorted(report.measured[0].layers.items(), key=lambda entry: -entry[1])
    (worst, error), bound = errors[0], errors[1][1]
    out = tmp_path / "q.safetensors"
    fitting: Words = [
        "--recipe",
        "fp8",
        "--calibration",
        ranges.path,
        "--sensitivity",
        saved,
    ]
    assert command(runs, "quantize", *fitting, "--max-error", repr(bound), "--out", out) == 0
    assert f"1 of {10 * LAYERS} layers have an error above" in capsys.readouterr().out
    written = json.loads(read_header(out).metadata[quantization.METADATA])
    why = f"sensitivity {error:.3g} > {bound:g}"
    kept = {"layers": worst, "format": "keep", "why": why, "added": True}
    assert written["recipe"]["rule"][0] == kept
    assert worst not in written["layers"]
    assert set(quantization.layers(read_header(out))) == {path for path, _ in errors[1:]}


def test_a_command_with_a_target_says_what_it_reached(
    runs: calibrate.Order, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q.safetensors"
    fitting: Words = [
        "--recipe",
        "int8-wo",
        "--sensitivity",
        saved,
        *running(runs),
        "--out",
        out,
    ]
    assert command(runs, "quantize", *fitting, "--target-ssim", "0.5") == 0
    found = capsys.readouterr()
    assert f"wanted 0.5, with 0 of {10 * LAYERS} layers kept" in found.out
    assert f"trying with 0 of {10 * LAYERS} layers kept" in found.err
    assert len(quantization.layers(read_header(out))) == 10 * LAYERS


def test_a_calibration_on_the_way_is_kept_named_and_replaced_when_that_is_asked_for(
    runs: calibrate.Order, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, left = tmp_path / "q.safetensors", tmp_path / "q.calibration.safetensors"
    words: Words = ["--recipe", "fp8", *running(runs), "--first", "1", "--out", out]
    assert command(runs, "quantize", *words) == 0
    assert f"{left}: ranges of activations, for --calibration\n" in capsys.readouterr().out
    header = read_header(runs.checkpoint)
    first = calibration.read(left, header)
    again = tmp_path / "again.safetensors"
    read: Words = ["--recipe", "fp8", "--calibration", left, "--out", again]
    assert command(runs, "quantize", *read) == 0
    assert again.read_bytes() == out.read_bytes()
    calibration.write(replace(first, facts={**first.facts, "done": 0}))
    other: Words = [*words, "--negative-prompt", "blurry", "--ignore-config-key", "none"]
    out.unlink()
    assert command(runs, "quantize", *other) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert command(runs, "quantize", *other, "--overwrite") == 0
    assert calibration.read(left, header).facts["negative_prompt"] == "blurry"


@pytest.mark.parametrize("bound", ["0", "nan", "-1"])
def test_a_bound_that_cannot_be_writes_nothing(
    runs: calibrate.Order,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bound: str,
) -> None:
    out = tmp_path / "q.safetensors"
    fitting: Words = [
        "--recipe",
        "int8-wo",
        "--sensitivity",
        saved,
        "--max-error",
        bound,
    ]
    assert command(runs, "quantize", *fitting, "--out", out) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not out.exists()
