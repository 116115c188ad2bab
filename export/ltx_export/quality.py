"""Does a smaller model still draw the same? Clips of the same prompts and seeds, measured.

Every bundle is held against the reference bundle. The runtime makes the clips, in a process of its
own; those of the reference lie in a temporary folder until the last bundle is done.
"""

import os
import shlex
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np

from ltx_engines import metrics, perceptual, pipeline_config, prompts
from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_engines.metrics import Frames, Measures
from ltx_engines.perceptual import Lpips
from ltx_engines.pipeline_config import PipelineConfig
from ltx_export import runtime_process
from ltx_export.runtime_process import Batch, Made, Terms

COLUMNS, THUMBNAIL = 6, 160
"""Of a clip's strip: how many of its frames, and pixels of the longer side of each."""


@dataclass(frozen=True, slots=True)
class Order:
    """`scratch`: where the temporary folder with the reference's clips is made; they take about a
    byte for each pixel and channel."""

    bundles: tuple[Path, ...]
    reference: Path
    prompts: Path
    seed: int | None = None
    pipeline_config: Path | None = None
    scratch: Path | None = None


@dataclass(frozen=True, slots=True)
class Scorer:
    """A judge of clips by their prompt, 1 is right and 0 is wrong; such as ltx-tiny's detector."""

    name: str
    score: Callable[[str, Frames], float]


@dataclass(frozen=True, slots=True)
class Clip:
    """`strip`: some frames side by side, small."""

    prompt: str
    seed: int
    measures: Measures
    strip: Frames
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One bundle's clips beside the reference's."""

    name: str
    clips: tuple[Clip, ...]

    def values(self, measure: str) -> list[float]:
        """Of each clip; none where it could not be measured."""
        found = [getattr(clip.measures, measure) for clip in self.clips]
        return [value for value in found if value is not None]

    def mean(self, measure: str) -> float:
        return fmean(self.values(measure))

    @property
    def pooled_psnr(self) -> float:
        """Of the mean squared error of all clips: at most the mean of the clips' PSNR."""
        errors = [10 ** (-value / 10) for value in self.values("psnr")]
        return float(-10 * np.log10(fmean(errors)))

    @property
    def score(self) -> float | None:
        return _mean([clip.score for clip in self.clips])


@dataclass(frozen=True, slots=True)
class Original:
    """A clip of the reference: where it lies, and what is kept of it."""

    made: Made
    strip: Frames
    score: float | None


@dataclass(frozen=True, slots=True)
class Quality:
    """What was found. `lpips` says how it was measured, or why it was not."""

    reference: str
    prompts: str
    terms: Terms
    lpips: str
    judge: str | None
    strips: tuple[Frames, ...]
    reference_score: float | None
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class Minima:
    """Of the means over all clips; None is no limit."""

    ssim: float | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        for option, limit, most in (
            ("ssim", self.ssim, 1.0),
            ("psnr", self.psnr, metrics.PSNR_CAP),
        ):
            if limit is not None and not limit <= most:
                raise UserError(f"--min-{option} is {limit:g}, wanted a number up to {most:g}")

    def missed(self, comparison: Comparison) -> list[str]:
        """A sentence for each limit that a bundle misses."""
        limits = {"SSIM": self.ssim, "PSNR": self.psnr}
        return [
            f"{comparison.name}: {name} is {found:.4f}, the minimum is {limit:g}"
            for name, limit in limits.items()
            # `not` >=: a mean that is no number misses every limit
            if limit is not None and not (found := comparison.mean(name.lower())) >= limit
        ]


@dataclass(frozen=True, slots=True)
class _Judges:
    lpips: Lpips
    scorer: Scorer | None

    def measure(self, clip: Frames, reference: Frames) -> Measures:
        found = metrics.measure(clip, reference)
        distance = self.lpips.distance
        return found if distance is None else replace(found, lpips=distance(clip, reference))

    def score(self, prompt: str, clip: Frames) -> float | None:
        return None if self.scorer is None else self.scorer.score(prompt, clip)


def run(order: Order, scorer: Scorer | None = None) -> Generator[str, None, Quality]:
    """Says how far it is, and returns what it found.

    Raises:
        UserError: bundles that do not run under the same terms, or what the runtime complains of.
    """
    runtime_process.check()
    asked = prompts.read(order.prompts)
    _check_defaults(order)
    judges = _Judges(perceptual.find(), scorer)
    reference, *names = _names((order.reference, *order.bundles))
    with TemporaryDirectory(prefix="ltx-quality-", dir=order.scratch) as scratch:
        originals = yield from _originals(order, asked, judges, Path(scratch, "reference"))
        comparisons = []
        for name, bundle in zip(names, order.bundles, strict=True):
            yield f"{name}: 0 of {len(asked)} clips"
            batch = replace(_batch(order), bundle=bundle)
            clips = []
            with closing(runtime_process.clips(batch, Path(scratch, "bundle"))) as making:
                for prompt, original, made in zip(asked, originals, making, strict=True):
                    _check_terms(bundle, made.terms, original.made.terms)
                    clips.append(_compared(prompt, made, original, judges))
                    yield f"{name}: {len(clips)} of {len(asked)} clips"
            shutil.rmtree(Path(scratch, "bundle"))
            comparisons.append(Comparison(name, tuple(clips)))
    return Quality(
        reference=reference,
        prompts=order.prompts.name,
        terms=originals[0].made.terms,
        lpips=judges.lpips.words,
        judge=scorer.name if scorer else None,
        strips=tuple(original.strip for original in originals),
        reference_score=_mean([original.score for original in originals]),
        comparisons=tuple(comparisons),
    )


def command(order: Order) -> str:
    """What a person types to have it again."""
    words = ["ltx-export", "quality", *map(str, order.bundles)]
    words += ["--reference", str(order.reference), "--prompts", str(order.prompts)]
    if order.seed is not None:
        words += ["--seed", str(order.seed)]
    if order.pipeline_config is not None:
        words += ["--pipeline-config", str(order.pipeline_config)]
    return shlex.join(words)


def strip(clip: Frames) -> Frames:
    """Up to COLUMNS frames at equal distances, made small, side by side."""
    from PIL import Image

    chosen = np.linspace(0, len(clip) - 1, min(COLUMNS, len(clip))).round().astype(int)
    height, width = clip.shape[1:3]
    share = min(1.0, THUMBNAIL / max(height, width))
    size = max(1, round(width * share)), max(1, round(height * share))
    small = [np.asarray(Image.fromarray(clip[index]).resize(size)) for index in chosen]
    return np.concatenate(small, axis=1)


def _batch(order: Order) -> Batch:
    return Batch(order.reference, order.prompts, order.seed, order.pipeline_config)


def _originals(
    order: Order, asked: Sequence[str], judges: _Judges, folder: Path
) -> Generator[str, None, list[Original]]:
    step = f"reference {_names((order.reference,))[0]}"
    yield f"{step}: 0 of {len(asked)} clips"
    found: list[Original] = []
    with closing(runtime_process.clips(_batch(order), folder)) as making:
        for prompt, made in zip(asked, making, strict=True):
            _check_window(made.terms)
            frames = made.read()
            found.append(Original(made, strip(frames), judges.score(prompt, frames)))
            yield f"{step}: {len(found)} of {len(asked)} clips"
    return found


def _compared(prompt: str, made: Made, original: Original, judges: _Judges) -> Clip:
    frames = made.read()
    shutil.rmtree(made.folder)
    measures = judges.measure(frames, original.made.read())
    score = judges.score(prompt, frames)
    return Clip(prompt, made.terms.seed, measures, strip(frames), score)


def _names(bundles: Sequence[Path]) -> list[str]:
    """The folders' names; where two are called the same, their whole paths."""
    short = [bundle.resolve().name for bundle in bundles]
    return [
        name if short.count(name) == 1 else str(bundle)
        for name, bundle in zip(short, bundles, strict=True)
    ]


def _check_defaults(order: Order) -> None:
    """What the bundles do by themselves is the same, but for what the config decides anyway."""
    told = PipelineConfig()
    if order.pipeline_config is not None:
        told = pipeline_config.load(order.pipeline_config)
    wanted = pipeline_config.over(open_bundle(order.reference).manifest.defaults, told)
    for bundle in order.bundles:
        if os.path.samefile(bundle, order.reference):
            raise UserError(f"{bundle} is the reference itself; name another bundle")
        if sum(os.path.samefile(bundle, other) for other in order.bundles) > 1:
            raise UserError(f"{bundle} is named twice; name each bundle once")
        found = pipeline_config.over(open_bundle(bundle).manifest.defaults, told)
        for key in type(found).model_fields:
            if (one := getattr(found, key)) != (other := getattr(wanted, key)):
                raise UserError(
                    f"{bundle} has {key} {one}, the reference {other}; give both one "
                    "--pipeline-config that says it"
                )


def _check_terms(bundle: Path, found: Terms, wanted: Terms) -> None:
    if found != wanted:
        raise UserError(
            f"{bundle} makes {found}; the reference makes {wanted}, or another schedule; give both "
            "one --pipeline-config, or export them from one kind of checkpoint"
        )


def _check_window(terms: Terms) -> None:
    if min(terms.height, terms.width) < metrics.WINDOW:
        raise UserError(
            f"frames of {terms.width} x {terms.height} are smaller than SSIM's window of "
            f"{metrics.WINDOW}; give a --pipeline-config with a larger width and height"
        )


def _mean(scores: Sequence[float | None]) -> float | None:
    found = [score for score in scores if score is not None]
    return fmean(found) if found else None
