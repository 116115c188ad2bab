"""Which linear layer of a model becomes which format, and why: ordered rules, kept as data.

    description = "..."
    algorithm = "smoothquant"        none, max, mse or smoothquant
    alpha = 0.5                      of smoothquant: 0 smooths only what weights ask for, 1 inputs

    [[rule]]                         the first rule that matches a layer decides about it
    layers = "transformer_blocks.*"  the layer's name, with * and ? and [0-9]
    format = "int8"                  or keep
    why = "nearly all weights"

Every linear layer of the transformer must be decided about, and every rule must decide about one.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from ltx_engines.errors import UserError, nearest
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX
from ltx_ref.quantization import CALIBRATED, FORMATS, Format

Algorithm = Literal["none", "max", "mse", "smoothquant"]
"""Whence the scales. none and max: the largest value, of weights and of activations; mse: weights
are clipped where that makes the squared error of a row smallest; smoothquant: int8 layers share
the width of their activations with their weights."""

KEEP: Literal["keep"] = "keep"
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
CLIPPED: frozenset[Format] = frozenset({"fp8", "int8", "int8-wo"})
"""Formats with a scale for each row, which mse can choose."""

SHIPPED = ("fp8", "int8", "fp8-cast", "int8-wo", "int4-wo", "nvfp4")
WILD = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Rule:
    """`layers` is a pattern of layer paths, with or without the transformer's prefix."""

    layers: str
    format: Format | Literal["keep"]
    why: str

    def matches(self, path: str) -> bool:
        return any(
            fnmatchcase(name, self.layers) for name in (path, path.removeprefix(TRANSFORMER_PREFIX))
        )

    @property
    def names_one(self) -> bool:
        """It is the path of one layer, and no pattern."""
        return not WILD & set(self.layers)


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    description: str
    algorithm: Algorithm
    alpha: float | None
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if problem := _contradiction(self):
            raise UserError(f"recipe {self.name}: {problem}")

    @property
    def formats(self) -> tuple[Format, ...]:
        """In the order of the rules, each once."""
        return tuple(dict.fromkeys(rule.format for rule in self.rules if rule.format != KEEP))

    @property
    def calibrated(self) -> bool:
        """It quantizes activations, and so wants their ranges."""
        return bool(CALIBRATED & set(self.formats))

    def table(self) -> dict[str, Any]:
        """As TOML and JSON have it; `parse` makes a recipe of it again."""
        rules = [asdict(rule) for rule in self.rules]
        alpha = {} if self.alpha is None else {"alpha": self.alpha}
        head = {"name": self.name, "description": self.description, "algorithm": self.algorithm}
        return head | alpha | {"rule": rules}


def load(name: str | Path) -> Recipe:
    """A shipped recipe by its name, or one in a TOML file.

    Raises:
        UserError: there is none, or it is not one.
    """
    word = str(name)
    if word in SHIPPED:
        text = (files("ltx_export") / "recipes" / f"{word}.toml").read_text(encoding="utf-8")
        return parse(tomllib.loads(text), word)
    path = Path(name)
    if path.suffix != ".toml":
        raise UserError(
            f"unknown recipe {word!r}{nearest(word, SHIPPED)}; known are {', '.join(SHIPPED)}, "
            "or give a FILE.toml"
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    return parse(table, path.stem, str(path))


def parse(table: Mapping[str, Any], name: str, where: str = "") -> Recipe:
    """A recipe from its table, which may give its own name.

    Raises:
        UserError: a key is unknown, missing or of a wrong type, or the rules contradict themselves.
    """
    here = where or f"recipe {name}"
    _check_keys(table, here, _RECIPE, optional={"name", "alpha"})
    rules = []
    for index, entry in enumerate(table["rule"]):
        place = f"{here}: rule {index + 1}"
        if not isinstance(entry, dict):
            raise UserError(f"{place} must be a table, not {entry!r}")
        _check_keys(entry, place, _RULE)
        rules.append(Rule(**entry))
    alpha = None if "alpha" not in table else float(table["alpha"])
    own = table.get("name", name)
    return Recipe(own, table["description"], table["algorithm"], alpha, tuple(rules))


def choose(recipe: Recipe, paths: Iterable[str]) -> dict[str, Format]:
    """The format of each layer that gets one, in the order of the paths.

    Raises:
        UserError: as `decide`.
    """
    return formats(decide(recipe, paths))


def formats(rules: Mapping[str, Rule]) -> dict[str, Format]:
    """Of the layers that are not kept."""
    found: dict[str, Format] = {}
    for path, rule in rules.items():
        if rule.format != KEEP:
            found[path] = rule.format
    return found


def decide(recipe: Recipe, paths: Iterable[str]) -> dict[str, Rule]:
    """The rule that decides about each layer: the first one that matches.

    Raises:
        UserError: a rule decides about no layer, or no rule decides about a layer, or all are kept.
    """
    listed = tuple(paths)
    decided: dict[str, Rule] = {}
    for path in listed:
        rule = next((rule for rule in recipe.rules if rule.matches(path)), None)
        if rule is None:
            raise UserError(
                f"recipe {recipe.name}: no rule matches {path}; "
                f"add one, with a format or with {KEEP!r}"
            )
        decided[path] = rule
    for index, rule in enumerate(recipe.rules):
        if rule not in decided.values():
            _check_dead(recipe, index, listed)
    if not formats(decided):
        raise UserError(f"recipe {recipe.name} keeps every layer; leave one to be quantized")
    return decided


def without(recipe: Recipe, layers: Iterable[str], why: str) -> Recipe:
    """The recipe that keeps these layers as they are as well."""
    kept = tuple(Rule(path, KEEP, why) for path in layers)
    return replace(recipe, rules=(*kept, *recipe.rules))


def _check_dead(recipe: Recipe, index: int, paths: Iterable[str]) -> None:
    """A rule that earlier ones leave nothing is an error too, but for layers named one by one:
    these are what `without` puts in front."""
    rule = recipe.rules[index]
    matched = [path for path in paths if rule.matches(path)]
    if not matched:
        known = (path.removeprefix(TRANSFORMER_PREFIX) for path in paths)
        raise UserError(
            f"recipe {recipe.name}: the rule {rule.layers!r} matches none of the model's linear "
            f"layers{nearest(rule.layers, known)}"
        )
    earlier = recipe.rules[:index]
    for path in matched:
        first = next(rule for rule in earlier if rule.matches(path))
        if not first.names_one:
            raise UserError(
                f"recipe {recipe.name}: the rule {rule.layers!r} comes too late, {first.layers!r} "
                "has decided about all its layers; put it in front of that one"
            )


_RECIPE: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "description": (str,),
    "algorithm": (str,),
    "alpha": (float, int),
    "rule": (list,),
}
_RULE: Mapping[str, tuple[type, ...]] = {"layers": (str,), "format": (str,), "why": (str,)}
_SAID: Mapping[type, str] = {str: "text", float: "a number", list: "a list of [[rule]]"}


def _check_keys(
    table: Mapping[str, Any],
    where: str,
    known: Mapping[str, tuple[type, ...]],
    optional: Iterable[str] = (),
) -> None:
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise UserError(f"{where}: {key} must be {_SAID[known[key][0]]}, not {value!r}")
    if missing := [key for key in known if key not in table and key not in optional]:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    for key, allowed in (("algorithm", ALGORITHMS), ("format", (KEEP, *FORMATS))):
        if key in known and table[key] not in allowed:
            hint = nearest(table[key], allowed)
            raise UserError(
                f"{where}: unknown {key} {table[key]!r}{hint}; known are {', '.join(allowed)}"
            )


def _contradiction(recipe: Recipe) -> str | None:
    known = set(recipe.formats)
    if not known:
        return "no rule has a format; leave a layer to be quantized"
    if recipe.algorithm == "none" and (ranged := known & CALIBRATED):
        return f"{_listed(ranged)} wants ranges of activations; write algorithm = 'max'"
    if recipe.algorithm == "mse" and not known & CLIPPED:
        return f"mse chooses the scales of rows, and {_listed(known)} has none; write 'max'"
    if recipe.algorithm != "smoothquant":
        return None if recipe.alpha is None else "alpha is smoothquant's; leave it out"
    if "int8" not in known:
        return f"smoothquant is for int8, the rules have {_listed(known)}; write 'max'"
    if recipe.alpha is None or not 0 <= recipe.alpha <= 1:
        return f"smoothquant wants an alpha from 0 to 1, not {recipe.alpha}"
    return None


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))
