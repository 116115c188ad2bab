"""`ltx-trt` on a bundle says what is in it, and what of it is quantized."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ltx_engines.bundle import QuantizationEntry, open_bundle
from ltx_engines.errors import UserError
from ltx_trt import overview
from tests.runtime.conftest import manifest

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
