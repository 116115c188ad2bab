"""In which numbers a checkpoint's engines compute, and the checkpoint that has these numbers.

read(words) -> Numbers            what --precision, --recipe and --rest-precision mean together
check(numbers, bundle)            graphs that are there already have them, or it is refused
written(numbers, checkpoint, ..)  the checkpoint, quantized on the way if a recipe is wished
"""

import json
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ltx_engines import hashes
from ltx_engines.bundle import Manifest, QuantizationEntry
from ltx_engines.bundle import Precision as FloatType
from ltx_engines.errors import UserError, nearest
from ltx_engines.targets import Target
from ltx_export import recipes
from ltx_export.plan_question import FLOATS, STORED_AS, own_precision
from ltx_export.recipes import SHIPPED, Recipe
from ltx_ref import quantization
from ltx_ref.checkpoint import Header, read_header
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX
from ltx_ref.quantization import Format


@dataclass(frozen=True, slots=True)
class Words:
    """As on the command line."""

    precision: str | None = None
    recipe: str | None = None
    calibration: Path | None = None
    rest_precision: str | None = None


@dataclass(frozen=True, slots=True)
class Numbers:
    """A `recipe` is for the transformer, `floats` are for all that it leaves alone; None leaves
    them as they are."""

    recipe: Recipe | None = None
    calibration: Path | None = None
    floats: FloatType | None = None

    def facts(self) -> list[object]:
        """All that decides about the numbers, the calibration by what is in it."""
        table = None if self.recipe is None else self.recipe.table()
        seen = None if self.calibration is None else hashes.sha256(self.calibration)
        return [table, seen, self.floats]


NOTHING = Numbers()


def read(words: Words) -> Numbers:
    """
    Raises:
        UserError: there is no such precision or recipe, or the words contradict each other.
    """
    rest = None if words.rest_precision is None else _rest(words.rest_precision)
    word = words.precision
    if word is not None and word not in SHIPPED:
        if words.recipe is not None or rest is not None:
            other = "--recipe" if words.recipe is not None else "--rest-precision"
            raise UserError(
                f"--precision {word} is for all that is not quantized, and {other} is given too; "
                "say --recipe and --rest-precision, or --precision alone"
            )
        return _calibrated(replace(NOTHING, floats=_float(word)), words)
    if word is not None and words.recipe is not None:
        raise UserError(f"--precision {word} is a recipe already; leave out --recipe")
    named = word if words.recipe is None else words.recipe
    recipe = None if named is None else recipes.load(named)
    return _calibrated(Numbers(recipe, floats=rest), words)


def _float(word: str) -> FloatType:
    known = _floats()
    if word not in known:
        every = (*known, *SHIPPED)
        raise UserError(
            f"unknown precision {word!r}{nearest(word, every)}; known are {', '.join(FLOATS)} and, "
            f"of the transformer alone, {', '.join(SHIPPED)}"
        )
    return known[word]


def _floats() -> dict[str, FloatType]:
    """By their short names and by their long ones."""
    return {name: long for short, long in FLOATS.items() for name in (str(short), long)}


def _rest(word: str) -> FloatType:
    """float32 is not among them: around quantized layers, no attention would have a kernel."""
    known = {name: long for name, long in _floats().items() if long != "float32"}
    if word not in known:
        raise UserError(
            f"--rest-precision {word}: it is of what is not quantized, fp16 or bf16"
            f"{nearest(word, known)}"
        )
    return known[word]


def _calibrated(numbers: Numbers, words: Words) -> Numbers:
    """The calibration is where a recipe wants one."""
    if words.calibration is not None and numbers.recipe is None:
        raise UserError(
            "--calibration is for a recipe that quantizes activations; give --precision fp8 or "
            "int8, or --recipe"
        )
    return replace(numbers, calibration=words.calibration)


def check_cards(numbers: Numbers, cards: Iterable[Target]) -> None:
    """
    Raises:
        UserError: a GPU has none of these numbers.
    """
    forms: tuple[Format, ...] = () if numbers.recipe is None else numbers.recipe.formats
    wanted = [STORED_AS[form] for form in forms]
    wanted += [short for short, long in FLOATS.items() if long == numbers.floats]
    for card in cards:
        for precision in wanted:
            if reason := card.refusal(precision):
                raise UserError(reason)


def check(numbers: Numbers, folder: Path, manifest: Manifest) -> None:
    """
    Raises:
        UserError: the bundle's graphs compute in other numbers.
    """
    if numbers.calibration is not None:
        raise UserError(f"{folder} has graphs already; --calibration is for a checkpoint")
    if numbers.floats not in (None, manifest.precision):
        raise UserError(
            f"the graphs in {folder} are {manifest.precision}, not {numbers.floats}; give the "
            "checkpoint that they are of, or leave out the precision"
        )
    entry = manifest.stages.get("transformer")
    if numbers.recipe is not None and entry is not None:
        _check_agrees(numbers.recipe, f"the transformer in {folder}", entry.quantization)


def _check_agrees(recipe: Recipe, what: str, found: QuantizationEntry | None) -> None:
    if found is None:
        raise UserError(
            f"{what} is not quantized; give the checkpoint that it is of, to be quantized to "
            f"{recipe.name}"
        )
    if {*found.layers} <= {*recipe.formats} and found.recipe in (None, recipe.name):
        return
    raise UserError(
        f"{what} is quantized already: {said(found)}, not {recipe.name}; leave out the recipe, or "
        "give the checkpoint that is not quantized"
    )


def said(found: QuantizationEntry) -> str:
    """A recipe's name, and the layers of each format."""
    counts = ", ".join(f"{count} {form}" for form, count in sorted(found.layers.items()))
    return f"{found.recipe or 'without a name'} ({counts})"


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint, and the type of its floats from here on; None: their own."""

    checkpoint: Path
    floats: FloatType | None


def written(numbers: Numbers, checkpoint: Path, scratch: Path) -> Generator[str, None, Written]:
    """The checkpoint that has these numbers: itself, or a quantized one in the folder `scratch`,
    which is made. It is linked from the cache of weights, where the next order finds it.

    Raises:
        UserError, CheckpointError: the recipe does not fit, or wants a calibration.
    """
    header = read_header(checkpoint)
    found = _entry(header)
    if found is None and numbers.recipe is None:
        return Written(checkpoint, numbers.floats)
    wanted = floats(numbers, header)
    if found is not None:
        if numbers.recipe is not None:
            _check_agrees(numbers.recipe, str(checkpoint), found)
        if numbers.calibration is not None:
            raise UserError(f"{checkpoint} is quantized already; leave out --calibration")
        return Written(checkpoint, wanted)
    target = scratch / f"{checkpoint.stem}-{_recipe(numbers).name}.safetensors"
    yield from _quantized(numbers, header, target)
    return Written(target, wanted)


def floats(numbers: Numbers, header: Header) -> FloatType | None:
    """Of all that is not quantized; None: their own."""
    quantized = numbers.recipe is not None or _entry(header) is not None
    return numbers.floats or (_sixteen_bits(header) if quantized else None)


def is_quantized(checkpoint: Path) -> bool:
    return _entry(read_header(checkpoint)) is not None


def _entry(header: Header) -> QuantizationEntry | None:
    layers = quantization.layers(header)
    if not layers:
        return None
    counts: dict[Format, int] = {}
    for layer in layers.values():
        counts[layer.format] = counts.get(layer.format, 0) + 1
    written = quantization.provenance(header)
    recipe = {} if written is None else written.get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else None
    return QuantizationEntry(recipe=name, layers=counts)


def _sixteen_bits(header: Header) -> FloatType | None:
    """bfloat16 where products of codes would have float32 around them: there, no attention has a
    kernel."""
    kept = {
        name: info
        for name, info in header.tensors.items()
        if name.startswith(TRANSFORMER_PREFIX) and info.dtype in ("F32", "F16", "BF16")
    }
    return "bfloat16" if kept and own_precision("transformer", kept) == "fp32" else None


def _recipe(numbers: Numbers) -> Recipe:
    if numbers.recipe is None:
        raise AssertionError("there is no recipe to quantize by")
    return numbers.recipe


def _quantized(numbers: Numbers, header: Header, target: Path) -> Generator[str, None, None]:
    from ltx_export import calibration, quantize, weight_cache

    recipe = _recipe(numbers)
    if recipe.calibrated and numbers.calibration is None:
        raise UserError(
            f"recipe {recipe.name} quantizes activations and wants their ranges, with --calibration"
            f" FILE; make them with ltx-export calibrate {header.path} --text-encoder FOLDER "
            f"--prompts FILE --out FILE"
        )
    ranges = None
    if numbers.calibration is not None:
        ranges = calibration.read(numbers.calibration, header)
    plan = quantize.plan(header, recipe, ranges)
    what = f"quantizing {header.path.name} to {recipe.name}"

    def write(path: Path) -> Generator[str, None, None]:
        for step in quantize.write(plan, path):
            yield f"{what}: {step.replace(': ', ', ')}"

    target.parent.mkdir()
    facts = json.dumps(numbers.facts()[:2])
    made = weight_cache.Other(target.name, (header.path,), facts, write)
    yield from weight_cache.place_other(made, target)
