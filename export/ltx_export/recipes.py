"""Which linear layer of a model becomes which format, and why: ordered rules, kept as data.

    description = "..."
    algorithm = "smoothquant"        none, max, mse or smoothquant
    alpha = 0.5                      of smoothquant: 0 smooths only what weights ask for, 1 inputs

    [[rule]]                         the first rule that matches a layer decides about it
    layers = "transformer_blocks.*"  the layer's name, with * and ? and [0-9]
    format = "int8"                  or keep
    why = "nearly all weights"
    added = true                     only of a layer that a command kept: rules behind need no other

Every linear layer of the transformer must be decided about, and every rule must decide about one.
"""

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from itertools import takewhile
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
    added: bool = False
    """`without` put it in front: it may take the last layer of a rule that comes later."""

    def matches(self, path: str) -> bool:
        names = (path, path.removeprefix(TRANSFORMER_PREFIX))
        if not WILD & set(self.layers):
            return self.layers in names  # hundreds of them would not fit in fnmatch's cache
        return any(fnmatchcase(name, self.layers) for name in names)

    def table(self) -> dict[str, Any]:
        words = {"layers": self.layers, "format": self.format, "why": self.why}
        return words | ({"added": True} if self.added else {})


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
        rules = [rule.table() for rule in self.rules]
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
    recipe = parse(table, path.stem, str(path))
    if not recipe.name.isprintable():
        raise UserError(f"{str(path)!r} has characters that cannot be shown; rename it")
    if recipe.name in SHIPPED:
        raise UserError(
            f"{path}: {recipe.name!r} is the name of a shipped recipe; give this one another, "
            f'as in name = "my-{recipe.name}"'
        )
    return recipe


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
        _check_keys(entry, place, _RULE, optional={"added"})
        rules.append(Rule(**entry))
    own, alpha = table.get("name", name), _alpha(table, here)
    return Recipe(own, table["description"], table["algorithm"], alpha, tuple(rules))


def _alpha(table: Mapping[str, Any], where: str) -> float | None:
    try:
        return None if "alpha" not in table else float(table["alpha"])
    except OverflowError:
        raise UserError(f"{where}: alpha must be from 0 to 1, not beyond all numbers") from None


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
    first = _first(recipe.rules, listed)
    for path in listed:
        if path not in first:
            raise UserError(
                f"recipe {recipe.name}: no rule matches {path}; "
                f"add one, with a format or with {KEEP!r}"
            )
    _check_dead(recipe, recipe.rules, listed, lambda rule: rule.added)
    own = tuple(rule for rule in recipe.rules if not rule.added)
    _check_dead(recipe, own, listed, lambda rule: not rule.added)
    decided = {path: recipe.rules[index] for path, index in first.items()}
    if not formats(decided):
        raise UserError(f"recipe {recipe.name} keeps every layer; leave one to be quantized")
    return decided


def without(recipe: Recipe, layers: Iterable[str], why: str) -> Recipe:
    """The recipe that keeps these layers as they are as well."""
    kept = tuple(Rule(path, KEEP, why, added=True) for path in layers)
    return replace(recipe, rules=(*kept, *recipe.rules))


def _first(rules: Sequence[Rule], paths: Iterable[str]) -> dict[str, int]:
    """The index of the first rule that matches, of each path that one matches. An index, since two
    rules may be equal."""
    found: dict[str, int] = {}
    for path in paths:
        index = next((i for i, rule in enumerate(rules) if rule.matches(path)), None)
        if index is not None:
            found[path] = index
    return found


def _check_dead(
    recipe: Recipe, rules: Sequence[Rule], paths: Sequence[str], asked: Callable[[Rule], bool]
) -> None:
    """Each of these rules that is asked about must decide about a layer."""
    first = _first(rules, paths)
    for index, rule in enumerate(rules):
        if index in first.values() or not asked(rule):
            continue
        matched = next((path for path in paths if rule.matches(path)), None)
        if matched is None:
            raise UserError(
                f"recipe {recipe.name}: the rule {rule.layers!r} matches none of the model's "
                f"linear layers{nearest(*_near(rule.layers, paths))}"
            )
        raise UserError(
            f"recipe {recipe.name}: the rule {rule.layers!r} comes too late, "
            f"{rules[first[matched]].layers!r} has decided about {matched}; put it in front of "
            "that one, or leave it out"
        )


def _near(pattern: str, paths: Iterable[str]) -> tuple[str, list[str]]:
    """The pattern, and with names of the model in the place of its own, where it matches one."""
    pattern = pattern.removeprefix(TRANSFORMER_PREFIX)
    parts = pattern.split(".")
    known = [path.removeprefix(TRANSFORMER_PREFIX) for path in paths]
    split = [name.split(".") for name in known]
    found = {
        ".".join(_renamed(*pair) for pair in zip(parts, names, strict=False))
        for names in split
        if len(names) >= len(parts)
    }
    matching = {near for near in found if any(Rule(near, KEEP, "").matches(n) for n in known)}
    return pattern, sorted(matching)


def _renamed(part: str, name: str) -> str:
    """A part of a pattern that says this name: itself if it does, else the name and its tail."""
    stem = len(list(takewhile(lambda letter: letter not in WILD, part)))
    return part if fnmatchcase(name, part) else name + part[stem:]


_RECIPE: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "description": (str,),
    "algorithm": (str,),
    "alpha": (float, int),
    "rule": (list,),
}
_RULE: Mapping[str, tuple[type, ...]] = {
    **{"layers": (str,), "format": (str,), "why": (str,)},
    "added": (bool,),
}
_SAID: Mapping[type, str] = {
    **{str: "text", float: "a number", list: "a list of [[rule]]"},
    bool: "true or false",
}


def _check_keys(
    table: Mapping[str, Any],
    where: str,
    known: Mapping[str, tuple[type, ...]],
    optional: Iterable[str] = (),
) -> None:
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
        if type(value) not in known[key]:
            raise UserError(f"{where}: {key} must be {_SAID[known[key][0]]}, not {value!r}")
        lines = value.split("\n") if key == "description" else [value]
        if any(isinstance(line, str) and not line.isprintable() for line in lines):
            raise UserError(f"{where}: {key} has characters that cannot be shown: {value!r}")
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
    own = [rule for rule in recipe.rules if not rule.added]
    added = recipe.rules[: len(recipe.rules) - len(own)]
    if any(not rule.added or rule.format != KEEP or WILD & set(rule.layers) for rule in added):
        return "rules that are added keep one layer each, in front of all others"
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
