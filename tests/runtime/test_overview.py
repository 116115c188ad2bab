"""`ltx-trt` on a bundle says what is in it, and what of it is quantized."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ltx_engines import pipeline_config, presets
from ltx_engines.bundle import Defaults, QuantizationEntry, open_bundle, read, update
from ltx_engines.cache_key import Part
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_trt import overview
from tests.runtime import engine_bundles
from tests.runtime.conftest import manifest
from tests.runtime.engine_bundles import Engines

MakeBundle = Callable[..., Path]


def shown(path: Path) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        overview.show(open_bundle(path), console)
    return capture.get()


def quantized(make_bundle: MakeBundle, recipe: str | None) -> Path:
    stages = manifest().stages
    entry = QuantizationEntry(recipe=recipe, layers={"fp8": 270, "int8-wo": 10})
    changed = stages["transformer"].model_copy(update={"quantization": entry})
    return make_bundle(stages=stages | {"transformer": changed})


@pytest.mark.parametrize(("recipe", "said"), [("mine", " (recipe mine)"), (None, "")])
def test_a_quantized_stage_says_how_many_layers_have_which_format(
    make_bundle: MakeBundle, recipe: str | None, said: str
) -> None:
    text = shown(quantized(make_bundle, recipe))
    assert f"270 layers fp8, 10 layers int8-wo{said}" in text
    assert "recipe" not in text or said


def test_a_stage_that_is_not_quantized_says_nothing_of_it(make_bundle: MakeBundle) -> None:
    assert "layers fp8" not in shown(make_bundle())


def test_an_unknown_format_is_refused(make_bundle: MakeBundle) -> None:
    path = quantized(make_bundle, "mine")
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"int8-wo"', '"int9-wo"'))
    with pytest.raises(UserError, match=r"int9-wo") as told:
        open_bundle(path)
    assert "\n" not in str(told.value)


def test_engines_are_shown_with_part_cards_version_profiles_kernels_and_size(
    make_bundle: MakeBundle,
) -> None:
    folder = make_bundle()
    engines = Engines((VideoShape(9, 32, 64),), ("transformer",), targets=(86, 89))
    engine_bundles.add(folder, engines)
    found = read(folder)
    (engine,) = found.engines
    key = engine.key.model_copy(update={"part": Part(index=1, of=2, first=2, end=3)})
    counts = {"kernels": 200, "fused attentions": 12}
    changed = engine.model_copy(update={"key": key, "counts": counts, "refittable": True})
    update(folder, found.model_copy(update={"engines": (changed,)}))
    text = shown(folder)
    for words in (
        *("part 2 of 2, blocks 2 to 2", "takes LoRAs", "SM86, SM89", "tensorrt-rtx 1.7.1.116"),
        *("tokens 4", "batch 1 to 3 (for 3)", "200 kernels", "12 fused attentions", "0.00 MiB"),
    ):
        assert words in text


def test_a_bundle_without_engines_has_no_table_of_them(make_bundle: MakeBundle) -> None:
    assert "engines" not in shown(make_bundle())


def test_without_a_second_pass_none_is_shown(make_bundle: MakeBundle) -> None:
    text = shown(make_bundle())
    assert "second pass" not in text
    assert text.count("guidance_scale") == 1


def test_the_second_pass_of_a_bundle_is_shown_beside_the_first(make_bundle: MakeBundle) -> None:
    config = pipeline_config.load(presets.named("ltxv-13b-0.9.8-distilled"))
    text = shown(make_bundle(defaults=pipeline_config.over(Defaults(), config)))
    assert text.count("guidance_scale") == 2
    assert "(0.9094, 0.725, 0.4219)" in text.partition("second pass")[2]
