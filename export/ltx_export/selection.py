"""Which layers a recipe leaves in high precision: those whose error is too large, or the fewest
with which videos are near enough to those of the model that is not quantized.

The choice is a recipe again, with a rule and a reason for each layer that it keeps.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

from ltx_engines.errors import UserError
from ltx_export import recipes
from ltx_export.recipes import Recipe
from ltx_export.sensitivity_report import Sensitivity
from ltx_ref.quantization import Format

Ranking = Sequence[tuple[str, float]]
"""Layers and their errors, the largest first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The first `kept` of a ranking stay as they are; videos were measured to reach `score`."""

    kept: int
    score: float


def ranking(
    recipe: Recipe, formats: Mapping[str, Format], sensitivity: Sensitivity
) -> list[tuple[str, float]]:
    """The layers that a recipe quantizes, the most sensitive first; equal ones in their order.

    Raises:
        UserError: a layer was not measured in its format.
    """
    # What was measured of this very recipe comes first: another may scale weights otherwise.
    known = sorted(sensitivity.measured, key=lambda errors: errors.name != recipe.name)
    found = []
    for path, form in formats.items():
        errors = [e.layers[path] for e in known if e.formats.get(path) == form]
        if not errors:
            raise UserError(
                f"{path} was not measured as {form}; run ltx-export sensitivity with "
                f"--formats {','.join(dict.fromkeys(formats.values()))}"
            )
        found.append((path, errors[0]))
    return sorted(found, key=lambda entry: -entry[1])


def within(recipe: Recipe, layers: Ranking, max_error: float) -> Recipe:
    """The recipe that keeps each layer whose error is above `max_error`.

    Raises:
        UserError: the bound is no number from 0, or leaves nothing to quantize.
    """
    if not max_error >= 0:
        raise UserError(f"--max-error must be a number from 0, not {max_error}")
    kept = [(path, error) for path, error in layers if error > max_error]
    if len(kept) == len(layers):
        raise UserError(
            f"--max-error {max_error:g} leaves nothing to quantize: the smallest error of a layer "
            f"is {layers[-1][1]:.3g}, the largest {layers[0][1]:.3g}; give one between them"
        )
    return _keeping(recipe, {p: f"sensitivity {e:.3g} > {max_error:g}" for p, e in kept})


def first(recipe: Recipe, layers: Ranking, count: int, why: str) -> Recipe:
    """The recipe that keeps the `count` most sensitive layers; `why` ends the reason."""
    return _keeping(recipe, {p: f"sensitivity {e:.3g}, {why}" for p, e in layers[:count]})


def _keeping(recipe: Recipe, reasons: Mapping[str, str]) -> Recipe:
    """`without` puts in front, so the last one first: the file lists them by their error."""
    for path, why in reversed(list(reasons.items())):
        recipe = recipes.without(recipe, (path,), why)
    return recipe


def check_target(target: float) -> None:
    """
    Raises:
        UserError: no video can be so similar, or any is.
    """
    if not -1 < target <= 1:
        raise UserError(f"--target-ssim must be above -1 and at most 1, not {target}")


Score = Callable[[int], Generator[str, None, float]]
"""How good it is to keep so many layers: says what it does, returns the score."""


def fewest(count: int, score: Score, target: float) -> Generator[str, None, Choice]:
    """The least number of kept layers, out of `count`, whose score reaches the target, by
    bisection; a line for each try.

    That more kept layers score higher is likely, not certain: the choice was tried itself, but a
    smaller number that was never tried might do.

    Raises:
        UserError: it is reached only when all layers are kept, if at all.
    """
    scores: dict[int, float] = {}
    low, high = -1, count  # `low` fails, or is no number of layers; `high` reaches it, or is all
    middle = 0
    while low + 1 < high:
        scores[middle] = yield from score(middle)
        if not math.isfinite(scores[middle]):
            raise UserError(
                f"with {middle} layers kept the videos are not numbers; calibrate again"
            )
        reached = scores[middle] >= target
        low, high = (low, middle) if reached else (middle, high)
        yield _said(middle, count, scores[middle], target)
        middle = (low + high) // 2
    if high == count:
        best = max(scores.values(), default=-math.inf)
        raise UserError(
            f"--target-ssim {target:g} is not reached with any of {count} layers quantized (the "
            f"best of {len(scores)} tries: {best:.4f}); take a lower one, or another recipe"
        )
    return Choice(high, scores[high])


def _said(kept: int, count: int, score: float, target: float) -> str:
    verdict = "reaches" if score >= target else "misses"
    return f"SSIM {score:.4f} {verdict} {target:g} with {kept} of {count} layers kept"
