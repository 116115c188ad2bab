"""Which layers are left as they are: by the bound of an error, or by bisection over a score."""

import io
import json
import math
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from ltx_engines.errors import UserError
from ltx_export import recipes, selection, sensitivity_report
from ltx_export.selection import Choice
from ltx_export.sensitivity_report import Errors, Sensitivity
from ltx_ref.quantization import Format
from tests.export.generators import finish

B = "model.diffusion_model.transformer_blocks."
HEAD = "model.diffusion_model.proj_out"
LAYERS = {f"{B}0.attn1.to_q": 0.03, f"{B}0.ff.net.2": 0.2, f"{B}1.attn1.to_q": 0.01}
KEPT = ["patchify_proj", "adaln_single.linear", "caption_projection.linear_1", "proj_out"]
PATHS = [*(f"model.diffusion_model.{path}" for path in KEPT), *LAYERS]


def errors(form: Format, factor: float = 1.0, name: str = "") -> Errors:
    table = recipes.load(form).table() | ({"name": name} if name else {})
    layers = {path: factor * error for path, error in LAYERS.items()}
    blocks = {f"{B}0": 0.21 * factor, f"{B}1": 0.01 * factor}
    return Errors(table, dict.fromkeys(LAYERS, form), layers, blocks)


def measured(*found: Errors) -> Sensitivity:
    checkpoint = {"name": "ltxv.safetensors", "bytes": 7, "sha256": "1234", "sample": None}
    return Sensitivity({"checkpoint": checkpoint}, found)


def ranked(form: Format = "fp8") -> list[tuple[str, float]]:
    chosen = recipes.load(form)
    return selection.ranking(chosen, recipes.choose(chosen, PATHS), measured(errors(form)))


def test_layers_are_ranked_by_their_error() -> None:
    assert [error for _, error in ranked()] == [0.2, 0.03, 0.01]


def test_equal_errors_stay_in_the_order_of_the_model() -> None:
    flat = Errors({"name": "fp8"}, dict.fromkeys(LAYERS, "fp8"), dict.fromkeys(LAYERS, 0.5), {})
    found = selection.ranking(recipes.load("fp8"), dict.fromkeys(LAYERS, "fp8"), measured(flat))
    assert [path for path, _ in found] == list(LAYERS)


def test_a_recipe_is_ranked_by_what_was_measured_of_it_and_not_of_another() -> None:
    both = measured(errors("int8", 5), errors("int8", 1, name="mine"))
    layers = recipes.choose(recipes.load("int8"), PATHS)
    table = recipes.load("int8").table() | {"name": "mine"}
    mine = selection.ranking(recipes.parse(table, "mine"), layers, both)
    assert mine[0][1] == 0.2
    assert selection.ranking(recipes.load("int8"), layers, both)[0][1] == 1.0


def test_a_format_that_was_not_measured_is_said_with_the_command() -> None:
    chosen = recipes.load("int8")
    with pytest.raises(UserError, match=r"as int8; run .*sensitivity with --formats int8"):
        selection.ranking(chosen, recipes.choose(chosen, PATHS), measured(errors("fp8")))


def test_layers_above_the_bound_are_kept_with_their_errors_as_the_reason() -> None:
    chosen = selection.within(recipes.load("fp8"), ranked(), 0.02)
    assert list(recipes.choose(chosen, PATHS)) == [f"{B}1.attn1.to_q"]
    assert [(rule.layers, rule.why) for rule in chosen.rules[:2]] == [
        (f"{B}0.ff.net.2", "sensitivity 0.2 > 0.02"),
        (f"{B}0.attn1.to_q", "sensitivity 0.03 > 0.02"),
    ]


def test_a_layer_at_the_bound_is_quantized() -> None:
    chosen = selection.within(recipes.load("fp8"), ranked(), 0.03)
    assert f"{B}0.attn1.to_q" in recipes.choose(chosen, PATHS)


def test_an_infinite_bound_excludes_nothing() -> None:
    assert selection.within(recipes.load("fp8"), ranked(), math.inf) == recipes.load("fp8")


def test_a_bound_of_zero_leaves_nothing() -> None:
    with pytest.raises(UserError, match=r"leaves nothing to quantize: .* 0\.01, the largest 0\.2"):
        selection.within(recipes.load("fp8"), ranked(), 0.0)


@pytest.mark.parametrize("bound", [-0.1, math.nan])
def test_a_bound_that_is_no_error_is_refused(bound: float) -> None:
    with pytest.raises(UserError, match="--max-error must be a number from 0"):
        selection.within(recipes.load("fp8"), ranked(), bound)


def test_the_first_layers_of_a_ranking_are_kept() -> None:
    chosen = selection.first(recipes.load("fp8"), ranked(), 1, "kept for SSIM 0.97")
    assert list(recipes.choose(chosen, PATHS)) == [f"{B}0.attn1.to_q", f"{B}1.attn1.to_q"]
    assert chosen.rules[0].why == "sensitivity 0.2, kept for SSIM 0.97"
    assert selection.first(recipes.load("fp8"), ranked(), 0, "") == recipes.load("fp8")


def bisected(
    count: int, score: Callable[[int], float], target: float
) -> tuple[list[str], Choice, list[int]]:
    tried: list[int] = []

    def counted(kept: int) -> Generator[str, None, float]:
        tried.append(kept)
        yield f"trying {kept}"
        return score(kept)

    lines: list[str] = []
    return lines, finish(noted(selection.fewest(count, counted, target), lines)), tried


def noted(work: Generator[str, None, Choice], lines: list[str]) -> Generator[str, None, Choice]:
    while True:
        try:
            lines.append(next(work))
        except StopIteration as end:
            choice: Choice = end.value
            return choice
        yield lines[-1]


def always(score: float) -> Callable[[int], float]:
    return lambda _: score


def reaching(least: int, kept: int) -> float:
    return float(kept >= least)


@pytest.mark.parametrize("count", [2, 3, 7, 280])
def test_bisection_finds_the_least_number_that_reaches_the_target(count: int) -> None:
    for least in {0, 1, count // 2, count - 1}:
        _, choice, tried = bisected(count, partial(reaching, least), 1.0)
        assert choice == Choice(least, 1.0)
        assert len(tried) == len(set(tried)) <= 1 + math.ceil(math.log2(count))


def test_when_everything_quantized_is_good_enough_nothing_else_is_tried() -> None:
    lines, choice, tried = bisected(280, always(0.99), 0.97)
    assert (choice, tried) == (Choice(0, 0.99), [0])
    assert lines == ["trying 0", "SSIM 0.9900 reaches 0.97 with 0 of 280 layers kept"]


def test_each_try_is_told() -> None:
    lines, _, tried = bisected(10, lambda kept: kept / 10, 0.55)
    assert tried == [0, 5, 7, 6]
    assert lines[3:6] == [
        "SSIM 0.5000 misses 0.55 with 5 of 10 layers kept",
        "trying 7",
        "SSIM 0.7000 reaches 0.55 with 7 of 10 layers kept",
    ]


def test_the_choice_reached_the_target_itself_whatever_the_other_scores_do() -> None:
    def score(kept: int) -> float:
        return [0.1, 0.9, 0.2, 0.95, 0.3, 0.96, 0.97, 0.99][kept]

    _, choice, tried = bisected(8, score, 0.9)
    assert choice.kept in tried
    assert choice.score == score(choice.kept) >= 0.9


def test_a_target_that_only_the_whole_model_reaches_is_refused_with_the_best_try() -> None:
    with pytest.raises(UserError, match=r"any of 8 layers quantized .*4 tries: 0\.7000"):
        bisected(8, lambda kept: 0.7 if kept == 4 else 0.5, 0.98)


def test_one_layer_alone_is_all_or_nothing() -> None:
    assert bisected(1, always(0.98), 0.97)[1].kept == 0
    with pytest.raises(UserError, match="1 tries"):
        bisected(1, always(0.5), 0.97)


def test_a_score_that_is_no_number_is_not_bisected() -> None:
    with pytest.raises(UserError, match="not numbers"):
        bisected(8, always(math.nan), 0.9)


@pytest.mark.parametrize("target", [1.01, -1.0, math.nan])
def test_a_similarity_that_cannot_be_is_refused(target: float) -> None:
    with pytest.raises(UserError, match="--target-ssim must be above -1 and at most 1"):
        selection.check_target(target)


def test_a_report_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    found = measured(errors("fp8"), errors("int8", 2))
    sensitivity_report.save(found, tmp_path / "s.json")
    assert sensitivity_report.read(tmp_path / "s.json") == found
    assert [file.name for file in tmp_path.iterdir()] == ["s.json"]


def test_a_report_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*s\.json: No such file or directory"):
        sensitivity_report.save(measured(errors("fp8")), tmp_path / "new" / "s.json")
    assert not list(tmp_path.iterdir())


def test_a_number_that_json_has_not_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        sensitivity_report.save(measured(errors("fp8", math.inf)), tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


def edited(path: Path, edit: Callable[[dict[str, object]], object]) -> Path:
    sensitivity_report.save(measured(errors("fp8")), path)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return path


def layer_of(document: dict[str, object]) -> dict[str, object]:
    entry: dict[str, object] = document["measured"][0]["layers"][f"{B}0.ff.net.2"]  # type: ignore[index]
    return entry


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(version=2),
        lambda d: d.pop("facts"),
        lambda d: d["facts"].update(checkpoint="ltxv"),
        lambda d: layer_of(d).update(error=-1),
        lambda d: layer_of(d).update(error="0.1"),
        lambda d: layer_of(d).update(error=True),
        lambda d: layer_of(d).update(format="fp9"),
        lambda d: d["measured"][0]["layers"].update({HEAD: layer_of(d)}),
        lambda d: d["measured"][0]["recipe"].pop("name"),
    ],
)
def test_what_is_no_report_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, object]], object]
) -> None:
    with pytest.raises(UserError, match="is not what ltx-export sensitivity writes"):
        sensitivity_report.read(edited(tmp_path / "s.json", edit))


def test_a_report_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*s\.json"):
        sensitivity_report.read(tmp_path / "s.json")


def test_a_report_of_another_checkpoint_is_refused() -> None:
    found = measured(errors("fp8"))
    same = {"name": "renamed.safetensors", "bytes": 7, "sha256": "1234", "sample": None}
    found.check_same(Path("s.json"), same)
    with pytest.raises(UserError, match=r"measured on ltxv\.safetensors of 7 bytes.*renamed"):
        found.check_same(Path("s.json"), same | {"sha256": "5678"})


def shown(found: Sensitivity) -> str:
    console = Console(file=io.StringIO(), width=120)
    sensitivity_report.show(found, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_largest_error_stands_first() -> None:
    lines = shown(measured(errors("fp8"), errors("int8", 2))).splitlines()
    names = [line.split()[:3] for line in lines if "transformer_blocks." in line]
    assert names[:2] == [
        ["transformer_blocks.0.ff.net.2", "int8", "0.40000"],
        ["transformer_blocks.0.ff.net.2", "fp8", "0.20000"],
    ]
    assert len(names) == 6


def test_kinds_of_layers_and_blocks_are_summed_up() -> None:
    text = shown(measured(errors("fp8")))
    assert "0.02000 (0.03000)" in text  # attn1.to_q: 0.03 and 0.01
    assert "0.21000" in text


def test_no_more_than_thirty_layers_are_shown() -> None:
    layers = {f"{B}{index}.ff.net.2": 0.1 for index in range(48)}
    found = measured(Errors({"name": "fp8"}, dict.fromkeys(layers, "fp8"), layers, {}))
    text = shown(found)
    assert "The 30 largest of 48 errors" in text
    assert text.count("transformer_blocks.") == 30


def test_the_picture_is_a_png_and_nothing_else_is_left(tmp_path: Path) -> None:
    found = measured(errors("fp8"), errors("int8", 0))
    sensitivity_report.plot(found, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match=r"must end with \.png"):
        sensitivity_report.plot(found, tmp_path / "s.gif")
