"""What `quantize` leaves in high precision, as its options say: by the error of each layer, or by
the videos that come out. Errors are read from a report, or measured first."""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltx_engines.errors import UserError
from ltx_export import calibration, quantization_plan, recipes, selection, sensitivity_report
from ltx_export.calibration import Calibration
from ltx_export.recipes import Recipe
from ltx_export.sensitivity_report import Sensitivity
from ltx_ref.checkpoint import Header

if TYPE_CHECKING:
    from ltx_export import calibrate


@dataclass(frozen=True, slots=True)
class Wish:
    """One of `max_error` and `target_ssim`, or neither."""

    max_error: float | None = None
    target_ssim: float | None = None
    report: Path | None = None
    """Errors that were measured before."""

    def __post_init__(self) -> None:
        if self.max_error is not None and self.target_ssim is not None:
            raise UserError("--max-error and --target-ssim both choose layers; give one of them")
        if self.report is not None and not self:
            raise UserError(
                f"--sensitivity {self.report} chooses nothing alone; add --max-error or "
                "--target-ssim"
            )
        if self.target_ssim is not None:
            selection.check_target(self.target_ssim)

    def __bool__(self) -> bool:
        return self.max_error is not None or self.target_ssim is not None

    @property
    def measures(self) -> bool:
        """It needs runs of the model."""
        return self.target_ssim is not None or (self.max_error is not None and not self.report)


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be quantized how. `runs`: the model's own, with nothing said about an `out`."""

    header: Header
    recipe: Recipe
    ranges: Calibration | None
    runs: "calibrate.Order | None"
    scratch: Path


@dataclass(frozen=True, slots=True)
class Chosen:
    """The recipe with the layers that are kept, and what is true of them."""

    recipe: Recipe
    sentence: str


def check(wish: Wish, header: Header, recipe: Recipe, *, runs: bool) -> None:
    """Before anything is calibrated, which takes hours. `runs`: whether the model can be run.

    Raises:
        UserError: the wish needs runs, its report does not fit, or its bound leaves nothing.
    """
    if wish.measures and not runs:
        option = "--target-ssim" if wish.max_error is None else "--max-error"
        or_report = "--sensitivity FILE, or " if wish.max_error is not None else ""
        raise UserError(
            f"{option} wants {or_report}--prompts FILE and --text-encoder FOLDER for runs of the "
            "model"
        )
    if wish.report is not None:
        layers = _ranking(header, recipe, _read(wish.report, header))
        if wish.max_error is not None:
            selection.within(recipe, layers, wish.max_error)


def choose(wish: Wish, question: Question) -> Generator[str, None, Chosen]:
    """Yields what is being done.

    Raises:
        UserError: the wish cannot be fulfilled, or needs something that was not given.
    """
    check(wish, question.header, question.recipe, runs=question.runs is not None)
    if wish.report is None:
        errors = yield from _measured(question)
    else:
        errors = _read(wish.report, question.header)
    layers = _ranking(question.header, question.recipe, errors)
    if wish.max_error is not None:
        recipe = selection.within(question.recipe, layers, wish.max_error)
        kept = len(recipe.rules) - len(question.recipe.rules)
        above = f"have an error above {wish.max_error:g} and are kept"
        return Chosen(recipe, f"{kept} of {len(layers)} layers {above}")
    return (yield from _selected(wish, question, layers))


def _read(path: Path, header: Header) -> Sensitivity:
    errors = sensitivity_report.read(path)
    errors.check_same(path, calibration.identity(header.path))
    return errors


def _ranking(header: Header, recipe: Recipe, errors: Sensitivity) -> selection.Ranking:
    formats = recipes.formats(quantization_plan.fit(header, recipe))
    return selection.ranking(recipe, formats, errors)


def _measured(question: Question) -> Generator[str, None, Sensitivity]:
    from ltx_export import sensitivity

    order = sensitivity.Order(
        _runs(question),
        (question.recipe,),
        None if question.ranges is None else question.ranges.path,
        scratch=question.scratch,
    )
    return (yield from sensitivity.measure(order))


def _selected(
    wish: Wish, question: Question, layers: selection.Ranking
) -> Generator[str, None, Chosen]:
    from ltx_export import trials

    if wish.target_ssim is None:
        raise AssertionError("nothing was wished for")
    order = trials.Order(
        _runs(question),
        question.recipe,
        question.ranges,
        layers,
        wish.target_ssim,
        question.scratch,
    )
    selected = yield from trials.select(order)
    choice = selected.choice
    return Chosen(
        selected.recipe,
        f"SSIM {choice.score:.4f}, wanted {wish.target_ssim:g}, with {choice.kept} of "
        f"{len(layers)} layers kept",
    )


def _runs(question: Question) -> "calibrate.Order":
    if question.runs is None:
        raise AssertionError("runs were asked for before")
    return question.runs
