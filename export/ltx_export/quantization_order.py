"""What the command `quantize` is asked for, and all that it does for that: from the ranges of
activations to the file.

    recipe, checkpoint -> what fits -> ranges -> layers that are kept -> plan -> file
                                     read, or     by a wish
                                     calibrated
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltx_engines.errors import UserError
from ltx_export import calibration, exclusions, foreign, outputs, quantize, recipes
from ltx_export.calibration import Calibration
from ltx_export.exclusions import Question, Wish
from ltx_export.quantization_plan import QuantizationPlan
from ltx_export.recipes import Recipe
from ltx_ref.checkpoint import Header, read_header

if TYPE_CHECKING:
    from ltx_export import calibrate


@dataclass(frozen=True, slots=True)
class Runs:
    """Of the model, for what is not given. None and nothing: not said."""

    prompts: Path | None = None
    text_encoder: Path | None = None
    shapes: tuple[str, ...] = ()
    steps: int | None = None
    seed: int | None = None
    first: int | None = None
    pipeline_config: Path | None = None
    negative_prompt: str | None = None
    device: str | None = None
    offload_blocks: bool = False
    ignore_config_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.prompts is not None:
            return
        for option, value in (
            ("--text-encoder", self.text_encoder),
            ("--shape", self.shapes or None),
            ("--steps", self.steps),
            ("--seed", self.seed),
            ("--first", self.first),
            ("--pipeline-config", self.pipeline_config),
            ("--negative-prompt", self.negative_prompt),
            ("--device", self.device),
            ("--offload-blocks", self.offload_blocks or None),
            ("--ignore-config-key", self.ignore_config_keys or None),
        ):
            if value is not None:
                raise UserError(
                    f"{option} is of runs of the model; add --prompts FILE, or leave it out"
                )


@dataclass(frozen=True, slots=True)
class Order:
    checkpoint: Path
    recipe: str
    """A shipped one's name, or a file."""
    out: Path
    calibration: Path | None
    wish: Wish
    runs: Runs
    overwrite: bool = False

    def inputs(self) -> dict[str, Path]:
        """What is read, by what it is called."""
        named = {
            "the checkpoint": self.checkpoint,
            "the file of --calibration": self.calibration,
            "the file of --sensitivity": self.wish.report,
            "the file of --prompts": self.runs.prompts,
            "the folder of --text-encoder": self.runs.text_encoder,
            "the file of --pipeline-config": self.runs.pipeline_config,
            "the recipe": None if self.recipe in recipes.SHIPPED else Path(self.recipe),
        }
        return {what: path for what, path in named.items() if path is not None}


@dataclass(frozen=True, slots=True)
class Done:
    """What was written, and sentences about the way there."""

    plan: QuantizationPlan
    sentences: tuple[str, ...]


def run(order: Order) -> Generator[str, None, Done]:
    """Quantize. Yields what is being done; what follows a colon is how far that is.

    Raises:
        UserError, CheckpointError, OSError: something that the user can mend.
    """
    yield "reading"
    sentences = []
    foreign.check_gguf(order.checkpoint)
    header, recipe = read_header(order.checkpoint), recipes.load(order.recipe)
    outputs.check(order.out, order.inputs(), overwrite=order.overwrite)
    quantize.fit(header, recipe)
    exclusions.check(order.wish, header, recipe, runs=order.runs.prompts is not None)
    runs = _runs(order, recipe)
    found = None
    if order.calibration is not None:
        found = calibration.read(order.calibration, header)
    elif runs is not None and recipe.calibrated:
        found = yield from _calibrated(runs, header)
        sentences.append(f"{runs.out}: ranges of activations, for --calibration")
    if order.wish:
        scratch = order.out.absolute().parent
        question = Question(header, recipe, found, runs, scratch)
        choice = yield from exclusions.choose(order.wish, question)
        recipe = choice.recipe
        sentences.append(choice.sentence)
    plan = quantize.plan(header, recipe, found)
    yield from quantize.write(plan, order.out, overwrite=order.overwrite)
    return Done(plan, tuple(sentences))


def lines(done: Done, out: Path, seconds: float) -> Iterator[str]:
    """What there is to say at the end."""
    yield from done.sentences
    yield from quantize.summary(done.plan, read_header(out))
    before, after = done.plan.source.path.stat().st_size, out.stat().st_size
    yield f"{out}: {after:,} bytes, {after / before:.1%} of before, in {seconds:.1f} s"


def _runs(order: Order, recipe: Recipe) -> "calibrate.Order | None":
    """
    Raises:
        UserError: runs can be made and are of no use, or miss something.
    """
    runs = order.runs
    if runs.prompts is None:
        return None
    useful = order.wish.measures or (recipe.calibrated and order.calibration is None)
    if runs.text_encoder is None or not useful:
        raise UserError(
            "--prompts is for a recipe that quantizes activations, without --calibration, and "
            "for choosing layers; it wants --text-encoder FOLDER"
        )
    calibration.check_packages()
    from ltx_export import calibrate

    return calibrate.Order(
        order.checkpoint,
        runs.text_encoder,
        runs.prompts,
        order.out.with_suffix(".calibration.safetensors"),
        shapes=tuple(map(calibrate.shape_of, runs.shapes)),
        steps=runs.steps,
        seed=runs.seed or 0,
        first=runs.first,
        pipeline_config=runs.pipeline_config,
        negative_prompt=runs.negative_prompt,
        device=runs.device,
        offload_blocks=runs.offload_blocks,
        overwrite=order.overwrite,
        ignore_config_keys=runs.ignore_config_keys,
    )


def _calibrated(runs: "calibrate.Order", header: Header) -> Generator[str, None, Calibration]:
    from ltx_export import calibrate

    yield from calibrate.run(runs)
    return calibration.read(runs.out, header)
