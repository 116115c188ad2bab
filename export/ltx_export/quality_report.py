"""What `ltx-export quality` found, as a page for people, a picture, and JSON for scripts."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ltx_engines.errors import UserError
from ltx_engines.metrics import PEAK, PSNR_CAP, SCALE_WEIGHTS, WINDOW, Frames, scales
from ltx_export.quality import Comparison, Minima, Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("report.md", "report.json", "report.png")
WORST = 3
"""Clips of each bundle that the page names."""

GAP = 4
"""Pixels between two rows of the picture."""


def check(folder: Path, *, overwrite: bool = False) -> None:
    """Before any work: an hour of it should not end with a report that cannot be written."""
    if find_spec("matplotlib") is None:
        raise UserError("a report with --out needs matplotlib; pip install 'ltx-trt[quantize]'")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out wants a folder")
    if not folder.is_dir() and not folder.absolute().parent.is_dir():
        raise UserError(f"{folder}: there is no folder {folder.absolute().parent}; create it first")
    for name in FILES:
        if (folder / name).exists() and not overwrite:
            raise UserError(f"{folder / name} is there already; add --overwrite to replace it")


def write(quality: Quality, folder: Path, command: str, minima: Minima | None = None) -> None:
    """All three files, or none."""
    folder.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix=".report-", dir=folder) as temporary:
        home = Path(temporary)
        text = json.dumps(document(quality, command), indent=1)
        (home / "report.json").write_text(text + "\n", encoding="utf-8")
        (home / "report.md").write_text(markdown(quality, command), encoding="utf-8")
        _draw(quality, minima or Minima()).savefig(
            home / "report.png", dpi=100, metadata={"Software": None}
        )
        for name in FILES:
            (home / name).replace(folder / name)


def document(quality: Quality, command: str) -> Mapping[str, Any]:
    """Every figure of every clip."""
    return {
        "command": command,
        "reference": quality.reference,
        "prompts": quality.prompts,
        "clips": len(quality.strips),
        "terms": asdict(quality.terms),
        "ms_ssim_scales": _scales(quality),
        "lpips": quality.lpips,
        "judge": quality.judge,
        "reference_score": quality.reference_score,
        "bundles": {
            comparison.name: {
                "means": {**_means(comparison), "psnr_pooled": comparison.pooled_psnr},
                "score": comparison.score,
                "clips": [
                    {"prompt": clip.prompt, "seed": clip.seed, "score": clip.score}
                    | asdict(clip.measures)
                    for clip in comparison.clips
                ],
            }
            for comparison in quality.comparisons
        },
    }


def table(quality: Quality) -> list[str]:
    """Markdown: a row for each bundle; means, and the worst clip in brackets."""
    head = ["bundle", "SSIM", "PSNR dB", "MS-SSIM", "flicker"]
    head += ["LPIPS"] * _has_lpips(quality) + [str(quality.judge)] * (quality.judge is not None)
    rows = [head, ["---"] * len(head)]
    if quality.reference_score is not None:
        blanks = [""] * (len(head) - 2)
        rows.append([f"{quality.reference} (reference)", *blanks, f"{quality.reference_score:.1%}"])
    rows += [_row(quality, comparison) for comparison in quality.comparisons]
    return [f"| {' | '.join(row)} |" for row in rows]


def markdown(quality: Quality, command: str) -> str:
    terms, levels = quality.terms, _scales(quality)
    fewer = "" if levels == len(SCALE_WEIGHTS) else ", as many as these frames have room for"
    lines = [
        f"# Quality against {quality.reference}",
        "",
        f"{len(quality.strips)} prompts of `{quality.prompts}`, each with one seed for all bundles:"
        f" {terms}; the seeds count up.",
        "",
        f"    {command}",
        "",
        *table(quality),
        "",
        "Means over the clips; in brackets the worst clip. All on the runtime's 8-bit frames.",
        "",
        f"- SSIM: Wang et al. 2004, Gaussian window of {WINDOW} x {WINDOW}, mean of the channels R,"
        " G, B.",
        f"- PSNR: of a clip's mean squared error over R, G, B, at most {PSNR_CAP:g} dB (equal"
        " clips); of the error of all clips together: "
        + ", ".join(f"{c.name} {c.pooled_psnr:.1f} dB" for c in quality.comparisons)
        + ".",
        f"- MS-SSIM: Wang et al. 2003, {levels} scales{fewer}.",
        f"- Flicker: mean absolute difference of the changes from frame to frame, of {PEAK:g}"
        " levels.",
        f"- LPIPS: {quality.lpips}.",
        "",
        "![figures by prompt, and the clips with the best, the middle and the worst SSIM]"
        "(report.png)",
        "",
        *_worst_clips(quality),
    ]
    return "\n".join(lines) + "\n"


def chosen(quality: Quality) -> list[int]:
    """The clips that the picture shows: of the best, the middle and the worst SSIM, all bundles
    taken together."""
    means = np.mean([comparison.values("ssim") for comparison in quality.comparisons], axis=0)
    order = np.argsort(-means, kind="stable")
    return [int(order[at]) for at in dict.fromkeys((0, len(order) // 2, len(order) - 1))]


def sheet(quality: Quality, clip: int) -> Frames:
    """The reference's strip of one clip above those of the bundles."""
    strips = [quality.strips[clip], *(c.clips[clip].strip for c in quality.comparisons)]
    gap = np.full((GAP, *strips[0].shape[1:]), PEAK, np.uint8)
    return np.concatenate([part for strip in strips for part in (strip, gap)][:-1])


def _row(quality: Quality, comparison: Comparison) -> list[str]:
    cells = [comparison.name]
    for measure, figure, worst in (
        ("ssim", ".4f", min),
        ("psnr", ".1f", min),
        ("ms_ssim", ".4f", min),
        ("flicker", ".2f", max),
        *((("lpips", ".4f", max),) if _has_lpips(quality) else ()),
    ):
        values = comparison.values(measure)
        cells.append(f"{comparison.mean(measure):{figure}} ({worst(values):{figure}})")
    return cells if comparison.score is None else [*cells, f"{comparison.score:.1%}"]


def _worst_clips(quality: Quality) -> list[str]:
    rows = ["| bundle | its worst clips | seed | SSIM | PSNR dB |", "|---|---|---|---|---|"]
    for comparison in quality.comparisons:
        for clip in sorted(comparison.clips, key=lambda clip: clip.measures.ssim)[:WORST]:
            found = clip.measures
            prompt = clip.prompt.replace("|", "\\|")
            rows.append(
                f"| {comparison.name} | {prompt} | {clip.seed} | {found.ssim:.4f} "
                f"| {found.psnr:.1f} |"
            )
    return rows


def _means(comparison: Comparison) -> dict[str, float]:
    measures = ("psnr", "ssim", "ms_ssim", "flicker", "lpips")
    return {name: comparison.mean(name) for name in measures if comparison.values(name)}


def _has_lpips(quality: Quality) -> bool:
    return bool(quality.comparisons[0].values("lpips"))


def _scales(quality: Quality) -> int:
    return scales(quality.terms.height, quality.terms.width)


def _draw(quality: Quality, minima: Minima) -> "Figure":
    from matplotlib.figure import Figure

    sheets = [(index, sheet(quality, index)) for index in chosen(quality)]
    inches = [4.5 * rows.shape[0] / rows.shape[1] + 0.4 for _, rows in sheets]
    figure = Figure(figsize=(9, 5 + sum(inches)), layout="constrained")
    axes = figure.subplots(2 + len(sheets), 1, height_ratios=[2.5, 2.5, *inches])
    _plot(axes[0], quality, "ssim", "SSIM", minima.ssim)
    _plot(axes[1], quality, "psnr", "PSNR dB", minima.psnr)
    for axis, (index, rows) in zip(axes[2:], sheets, strict=True):
        _show(axis, quality, index, rows)
    return figure


def _plot(axis: "Axes", quality: Quality, measure: str, label: str, minimum: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    for comparison in quality.comparisons:
        axis.plot(comparison.values(measure), ".-", linewidth=0.8, label=comparison.name)
    if minimum is not None:
        axis.axhline(minimum, color="black", linestyle="--", linewidth=0.8)
    axis.set(xlabel="prompt", ylabel=label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")


def _show(axis: "Axes", quality: Quality, index: int, rows: Frames) -> None:
    names = [quality.reference, *(comparison.name for comparison in quality.comparisons)]
    height = quality.strips[index].shape[0]
    middles = [number * (height + GAP) + height / 2 for number in range(len(names))]
    axis.imshow(rows)
    axis.set_xticks([])
    axis.set_yticks(middles, names, fontsize="small")
    axis.set_title(
        f"prompt {index}: {quality.comparisons[0].clips[index].prompt}",
        fontsize="small",
        parse_math=False,
    )
