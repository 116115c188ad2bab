"""Distances, bounds and verdicts, on numbers made by hand."""

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ltx_engines.bundle import Precision
from ltx_engines.errors import UserError
from ltx_export import ladder, ladder_report
from ltx_export.ladder import Bound, Culprit, Outputs, Pair, Report, Row, Skipped
from ltx_ref.quantization import FORMATS, Format

BOUND = Bound(0.1, "a tenth")
PAIR = Pair("quantized", "float32", {"velocity": BOUND, "latents": BOUND})


def outputs(seed: int = 1) -> Outputs:
    rng = np.random.default_rng(seed)
    return {"velocity": rng.normal(size=(2, 5, 3)), "latents": rng.normal(size=(1, 5, 3))}


def scaled(found: Outputs, factor: float) -> Outputs:
    return {name: numbers * factor for name, numbers in found.items()}


def rows(found: Outputs, wanted: Outputs) -> list[Row]:
    return list(ladder.compare(PAIR, found, wanted))


def test_a_rung_is_at_no_distance_from_itself() -> None:
    for row in rows(outputs(), outputs()):
        assert (row.distance, row.largest) == (0.0, 0.0)
        assert row.cosine == pytest.approx(1)
        assert row.passed


@pytest.mark.parametrize("factor", [1.05, 0.8, -1.0, 0.0])
def test_the_distance_is_the_share_of_the_norm_that_is_off(factor: float) -> None:
    wanted = outputs()
    for row in rows(scaled(wanted, factor), wanted):
        assert row.distance == pytest.approx(abs(factor - 1))
        assert row.distance == ladder.distance(wanted[row.output] * factor, wanted[row.output])
        assert row.largest == pytest.approx(abs(factor - 1) * np.abs(wanted[row.output]).max())
        assert row.passed == (abs(factor - 1) <= 0.1)


def test_the_unit_of_both_rungs_does_not_matter() -> None:
    near = scaled(outputs(), 1.01)
    plain, large = rows(near, outputs()), rows(scaled(near, 1e6), scaled(outputs(), 1e6))
    for one, other in zip(plain, large, strict=True):
        assert other.distance == pytest.approx(one.distance)


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_what_is_no_number_is_within_no_bound(damage: float) -> None:
    broken = outputs()
    broken["velocity"][0, 0, 0] = damage
    velocity, latents = rows(broken, outputs())
    assert not replace(velocity, bound=Bound(1e30, "anything goes")).passed
    assert latents.passed


def test_outputs_of_two_shapes_are_a_mistake_in_the_program() -> None:
    other = {name: numbers[:, :-1] for name, numbers in outputs().items()}
    with pytest.raises(AssertionError, match=r"velocity of quantized is \(2, 4, 3\)"):
        rows(other, outputs())


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_has_a_bound_for_everything_and_a_reason(form: Format) -> None:
    found = ladder.bounds({form})
    for name in ("bfloat16.velocity", "quantized.velocity", "quantized.weights", "onnx.blocks"):
        assert 0 < found[name].limit < 1
        assert found[name].why
    assert found["quantized.latents"].limit <= 0.5


def test_the_loosest_format_of_a_file_counts() -> None:
    mixed, loose = ladder.bounds({"int8-wo", "int4-wo"}), ladder.bounds({"int4-wo"})
    assert mixed["quantized.velocity"] == loose["quantized.velocity"]
    assert mixed["quantized.weights"] == loose["quantized.weights"]


def test_only_codes_of_activations_may_flip() -> None:
    """So the graph of anything else must give the very same numbers."""
    assert ladder.bounds(set())["onnx.velocity"].limit <= 1e-3
    assert ladder.bounds({"int8-wo"})["onnx.velocity"].limit <= 1e-3
    assert ladder.bounds({"int8"})["onnx.velocity"].limit > 1e-3
    assert ladder.bounds({"int8"})["onnx.blocks"].limit <= 1e-2


@pytest.mark.parametrize("formats", [set(), {"int4-wo"}, {"int8"}, {"fp8", "int8-wo"}])
def test_float16_has_fewer_bits_and_so_wider_bounds(formats: set[Format]) -> None:
    wide, half = ladder.bounds(formats), ladder.bounds(formats, (), "float16")
    for name in ("onnx.layers", "onnx.blocks"):
        assert wide[name].limit < half[name].limit <= 0.05
    graph = [name for name in wide if name.startswith("onnx.")]
    assert all(half[name] == wide[name] for name in wide.keys() - graph)
    assert ladder.bounds(formats, ("onnx.layers=1",), "float16")["onnx.layers"].limit == 1


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_model_without_codes_is_not_said_to_have_some(precision: Precision) -> None:
    for name, bound in ladder.bounds(set(), (), precision).items():
        assert "code" not in bound.why, name


def test_a_float_checkpoint_has_no_bounds_of_quantization() -> None:
    assert not [name for name in ladder.bounds(set()) if name.startswith("quantized")]


def test_a_bound_can_be_wished_for() -> None:
    found = ladder.bounds({"fp8"}, ("quantized.velocity=0.02", "onnx.latents=inf"))
    assert found["quantized.velocity"].limit == 0.02
    assert found["onnx.latents"].limit == math.inf
    assert found["bfloat16.velocity"] == ladder.bounds({"fp8"})["bfloat16.velocity"]


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        ("quantised.velocity=1", "did you mean 'quantized.velocity'?"),
        ("quantized.velocity", "wanted NAME=VALUE"),
        ("quantized.velocity=small", "wanted NAME=VALUE"),
        ("quantized.velocity=-1", "with a number from 0"),
        ("quantized.velocity=nan", "with a number from 0"),
    ],
)
def test_a_wish_that_is_none_costs_one_line(wish: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint.replace("?", r"\?")) as caught:
        ladder.bounds({"fp8"}, (wish,))
    assert "\n" not in str(caught.value)


def test_what_the_ladder_needs_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "find_spec", lambda name: None if name == "polygraphy" else name)
    with pytest.raises(UserError, match=r"needs polygraphy; pip install 'ltx-trt\[quantize\]'"):
        ladder.check_packages()


def row(distance: float, rung: ladder.Rung = "quantized", place: str | None = None) -> Row:
    return Row(rung, "float32", "velocity", distance, 0.99, 0.5, BOUND, place)


def report(*found: Row, culprit: Culprit | None = None) -> Report:
    facts = {
        "checkpoint": "q.safetensors",
        "shape": "64x64x9",
        "sigmas": [1.0, 0.5, 0.0],
        "seed": 3,
    }
    skipped = (Skipped("engine", "no GPU"),)
    return Report(facts, found, skipped, "Q/DQ coverage 60 of 60 layers (fp8)", culprit)


def printed(found: Report) -> str:
    text = StringIO()
    ladder_report.show(found, Console(width=100, file=text))
    return text.getvalue()


def test_the_first_rung_that_breaks_is_named_and_what_breaks_it() -> None:
    culprit = Culprit("transformer_blocks.3.ff.net.2", 0.2, 0.01, 0.19)
    found = report(row(0.01, "bfloat16"), row(0.2), row(0.3, "onnx"), culprit=culprit)
    assert found.broken is not None
    assert found.broken.rung == "quantized"
    text = printed(found)
    assert "the first rung that breaks is quantized: velocity 0.2 from float32" in text
    assert "the bound: a tenth" in text
    assert "worst part is transformer_blocks.3.ff.net.2: 0.2 with it, 0.01 without it" in text
    assert "engine skipped: no GPU" in text


def test_a_ladder_that_holds_says_so() -> None:
    text = printed(report(row(0.01), row(0.02, place="model.diffusion_model.proj_out")))
    assert "every rung is within its bounds" in text
    assert "Q/DQ coverage 60 of 60 layers (fp8)" in text
    assert "64x64x9, 2 steps, seed 3" in text
    assert "worst velocity of quantized: proj_out, 2.00e-02" in text


def test_nan_is_said_to_be_nan_and_a_break_without_a_part_too() -> None:
    text = printed(report(row(math.nan)))
    assert "velocity with NaN or infinity" in text
    assert "no part of it does so by itself" in text


def test_figures_that_cannot_be_written_name_their_own_file(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "ladder.json"
    with pytest.raises(UserError, match=r"cannot write .*/gone/ladder\.json: No such file"):
        ladder_report.save(report(row(0.2)), path)


def test_the_document_holds_all_figures(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    path.write_text("old", encoding="utf-8")
    ladder_report.save(report(row(0.2), culprit=Culprit("proj_out", 0.2)), path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["passed"] is False
    assert found["first_broken"] == "quantized.velocity"
    assert found["rungs"][0]["distance"] == 0.2
    assert found["rungs"][0]["bound"] == {"limit": 0.1, "why": "a tenth"}
    assert found["culprit"]["place"] == "proj_out"
    assert found["skipped"] == {"engine": "no GPU"}
    assert [*tmp_path.iterdir()] == [path]
