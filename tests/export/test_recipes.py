"""Recipes: what is shipped, what a file may say, and that no rule is silently without effect."""

import re
from pathlib import Path
from typing import Any

import pytest

import ltx_trt
from ltx_engines.errors import UserError
from ltx_export import quantize, recipes
from ltx_export.recipes import KEEP, SHIPPED, Recipe, Rule
from ltx_ref.checkpoint import read_header
from ltx_ref.quantization import CALIBRATED

TINY = Path(ltx_trt.__file__).parent / "ltx_tiny" / "ltx-tiny.safetensors"
PREFIX = "model.diffusion_model."
PATHS = (
    *("patchify_proj", "proj_out", "transformer_blocks.0.attn1.to_q"),
    *("transformer_blocks.0.ff.net.2", "transformer_blocks.1.attn1.to_q"),
)
LAYERS = tuple(PREFIX + path for path in PATHS)


def recipe(*rules: tuple[str, Any], algorithm: Any = "max", alpha: float | None = None) -> Recipe:
    made = tuple(Rule(layers, form, "why") for layers, form in rules)
    return Recipe("mine", "", algorithm, alpha, made)


def toml(folder: Path, text: str) -> Path:
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    return folder / "mine.toml"


RULE = '[[rule]]\nlayers = "*"\nformat = "fp8"\nwhy = "all"\n'
HEAD = 'description = "d"\nalgorithm = "max"\n'


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_recipe_quantizes_all_of_a_block_and_keeps_the_rest(name: str) -> None:
    found = recipes.load(name)
    paths = quantize.linear_layers(read_header(TINY))
    chosen = recipes.choose(found, paths)
    assert found.name == name
    assert set(chosen.values()) == {name}
    assert len(chosen) == 60
    assert set(chosen) == {path for path in paths if "transformer_blocks" in path}
    assert found.calibrated == (name in CALIBRATED)
    assert all(rule.why for rule in found.rules)
    assert "attention" in found.description


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_what_its_table_says(name: str) -> None:
    found = recipes.load(name)
    assert recipes.parse(found.table(), "other") == found


def test_every_toml_that_is_shipped_is_listed() -> None:
    folder = Path(recipes.__file__).parent / "recipes"
    assert {path.stem for path in folder.glob("*.toml")} == set(SHIPPED)


def test_a_file_is_a_recipe_of_its_own(tmp_path: Path) -> None:
    found = recipes.load(toml(tmp_path, HEAD + RULE))
    assert found == Recipe("mine", "d", "max", None, (Rule("*", "fp8", "all"),))
    assert recipes.load(str(tmp_path / "mine.toml")) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD + "algoritm = 1\n" + RULE, "unknown key 'algoritm'; did you mean 'algorithm'?"),
        (HEAD + RULE + 'layer = "x"\n', "rule 1: unknown key 'layer'; did you mean 'layers'?"),
        (HEAD + RULE.replace("fp8", "fp9"), "rule 1: unknown format 'fp9'; did you mean 'fp8'?"),
        (HEAD + RULE.replace('"fp8"', "8"), "rule 1: format must be text, not 8"),
        (HEAD.replace("max", "min") + RULE, "unknown algorithm 'min'"),
        (HEAD + 'rule = ["a"]', "rule 1 must be a table, not 'a'"),
        (HEAD + 'rule = "a"', "rule must be a list of [[rule]], not 'a'"),
        (HEAD + "alpha = true\n" + RULE, "alpha must be a number, not True"),
        (HEAD + f"alpha = 1{'0' * 400}\n" + RULE, "alpha must be from 0 to 1, not beyond all"),
        (HEAD + RULE.replace("all", "\\u001b[31mall"), "rule 1: why has characters that cannot be"),
        (HEAD + RULE.replace("*", "\\n*"), "rule 1: layers has characters that cannot be shown"),
        (HEAD + 'name = "a\\tb"\n' + RULE, "name has characters that cannot be shown: 'a\\tb'"),
        (HEAD + 'name = "fp8"\n' + RULE, 'give this one another, as in name = "my-fp8"'),
        (HEAD + RULE + "added = 1\n", "rule 1: added must be true or false, not 1"),
        (HEAD + RULE + "added = true\n", "rules that are added keep one layer each, in front of"),
        (HEAD, "missing rule"),
        ('description = "d"\n' + RULE, "missing algorithm"),
        (HEAD + RULE.replace('why = "all"', ""), "rule 1: missing why"),
        (HEAD + RULE.replace("fp8", KEEP), "no rule has a format"),
        (HEAD + "alpha = 0.5\n" + RULE, "alpha is smoothquant's"),
        ("description = ", "mine.toml is not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_costs_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        recipes.load(toml(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_recipe_has_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'fp8_cast'; did you mean 'fp8-cast'\?"):
        recipes.load("fp8_cast")
    with pytest.raises(UserError, match=r"cannot read the recipe gone\.toml: No such file"):
        recipes.load("gone.toml")


def test_the_first_rule_that_matches_decides() -> None:
    found = recipe(
        ("transformer_blocks.1.*", "int8-wo"), ("transformer_blocks.*", "fp8"), ("*", KEEP)
    )
    assert recipes.choose(found, LAYERS) == {
        LAYERS[2]: "fp8",
        LAYERS[3]: "fp8",
        LAYERS[4]: "int8-wo",
    }


def test_a_pattern_may_name_the_whole_path_or_what_follows_the_models_prefix() -> None:
    whole = recipe((f"{PREFIX}transformer_blocks.*", "fp8"), ("p*", KEEP))
    assert len(recipes.choose(whole, LAYERS)) == 3


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    found = recipe(("transformer_blocks.0.attn3.to_q", KEEP), ("*", "fp8"))
    with pytest.raises(
        UserError,
        match=r"'transformer_blocks\.0\.attn3\.to_q' matches none .* did you mean "
        r"'transformer_blocks\.0\.attn1\.to_q'",
    ):
        recipes.choose(found, LAYERS)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("transformer_block.*", "transformer_blocks.*"),
        ("transfomer_block*", "transformer_blocks*"),
        ("transformer_blocks.*.attn3.to_q", "transformer_blocks.*.attn1.to_q"),
        ("transformer_blocks.[01].atn1.*", "transformer_blocks.[01].attn1.*"),
        (f"{PREFIX}proj_ou", "proj_out"),
    ],
)
def test_a_pattern_that_matches_nothing_has_the_nearest_one_that_does(
    pattern: str, meant: str
) -> None:
    with pytest.raises(UserError, match=re.escape(f"did you mean {meant!r}?")):
        recipes.choose(recipe((pattern, KEEP), ("*", "fp8")), LAYERS)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("proj_out", KEEP), ("proj_out", "int8-wo")),
        (("proj_out", KEEP), (f"{PREFIX}proj_out", "int8-wo")),
        ((f"{PREFIX}proj_out", KEEP), ("proj_out", KEEP)),
        (("proj_out", KEEP), ("proj_out", KEEP)),
    ],
)
def test_a_rule_that_another_of_the_same_layer_hides_is_an_error(
    first: tuple[str, Any], second: tuple[str, Any]
) -> None:
    found = recipe(first, second, ("*", "fp8"))
    said = f"the rule {second[0]!r} comes too late, {first[0]!r} has decided about {LAYERS[1]}"
    with pytest.raises(UserError, match=re.escape(said)):
        recipes.choose(found, LAYERS)


def test_only_what_a_command_put_in_front_may_hide_a_rule() -> None:
    found = recipe(("transformer_blocks.1.*", "int8-wo"), ("*", "fp8"))
    fewer = recipes.without(found, LAYERS[4:], "it is sensitive")
    by_hand = recipe((LAYERS[4], KEEP), *((rule.layers, rule.format) for rule in found.rules))
    assert recipes.choose(recipes.parse(fewer.table(), "mine"), LAYERS) == dict.fromkeys(
        LAYERS[:4], "fp8"
    )
    with pytest.raises(UserError, match=r"'transformer_blocks\.1\.\*' comes too late"):
        recipes.choose(by_hand, LAYERS)
    with pytest.raises(UserError, match=r"'transformer_blocks\.0\.\*' comes too late, '\*' has"):
        hidden = recipe(("*", "fp8"), ("transformer_blocks.0.*", KEEP))
        recipes.choose(recipes.without(hidden, LAYERS[2:4], "why"), LAYERS)
    for path, said in (("gone", "matches none"), (LAYERS[4], "comes too late")):
        with pytest.raises(UserError, match=said):
            recipes.choose(recipes.without(fewer, (path,), "why"), LAYERS)


def test_a_description_may_have_lines_and_a_file_another_name(tmp_path: Path) -> None:
    text = 'name = "mine"\ndescription = """a\nb"""\nalgorithm = "max"\n'
    path = toml(tmp_path, text + RULE).rename(tmp_path / "fp8.toml")
    assert (recipes.load(path).name, recipes.load(path).description) == ("mine", "a\nb")


def test_a_rule_behind_one_that_takes_everything_is_an_error() -> None:
    found = recipe(("*", "fp8"), ("transformer_blocks.0.*", KEEP))
    with pytest.raises(UserError, match=r"'transformer_blocks\.0\.\*' comes too late, '\*' has"):
        recipes.choose(found, LAYERS)


def test_a_layer_without_a_rule_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no rule matches model\.diffusion_model\.patchify_proj"):
        recipes.choose(recipe(("transformer_blocks.*", "fp8")), LAYERS)


def test_layers_can_be_taken_out_one_by_one_until_a_rule_has_none_left() -> None:
    found = recipe(("transformer_blocks.1.*", "int8-wo"), ("*", "fp8"))
    fewer = recipes.without(found, LAYERS[4:], "it is sensitive")
    assert recipes.choose(fewer, LAYERS) == dict.fromkeys(LAYERS[:4], "fp8")
    assert fewer.rules[0] == Rule(LAYERS[4], KEEP, "it is sensitive", added=True)
    with pytest.raises(UserError, match="mine keeps every layer"):
        recipes.choose(recipes.without(found, LAYERS, "why"), LAYERS)


@pytest.mark.parametrize(
    ("algorithm", "alpha", "form", "said"),
    [
        ("none", None, "fp8", "fp8 wants ranges of activations; write algorithm = 'max'"),
        ("mse", None, "int4-wo", "mse chooses the scales of rows, and int4-wo has none"),
        ("smoothquant", 0.5, "fp8", "smoothquant is for int8, the rules have fp8"),
        ("smoothquant", None, "int8", "wants an alpha from 0 to 1, not None"),
        ("smoothquant", 1.5, "int8", "wants an alpha from 0 to 1, not 1.5"),
    ],
)
def test_an_algorithm_that_its_formats_have_no_use_for_is_refused(
    algorithm: str, alpha: float | None, form: str, said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        recipe(("*", form), algorithm=algorithm, alpha=alpha)
