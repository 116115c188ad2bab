"""What the stages see of a clip that is made in two passes, as words like `WxHxF`."""

from collections.abc import Iterable

from ltx_engines.shapes import ENLARGES, VideoShape, first_size, parse

FIRST, SECOND = 1, ENLARGES
"""Of the first pass's sides."""


def ends(word: str) -> tuple[VideoShape, VideoShape]:
    """
    Raises:
        UserError: it is neither `WxHxF` nor `WxHxF..WxHxF`.
    """
    least, between, most = word.partition("..")
    return parse(least), parse(most if between else least)


def of_passes(words: Iterable[str], factor: float, scales: Iterable[int]) -> tuple[str, ...]:
    """Each word at these scales; a range stays one.

    Raises:
        UserError: a word is no shape, or too small for two passes.
    """
    wanted = tuple(scales)
    return tuple(_at(ends(word), factor, scale) for word in words for scale in wanted)


def _at(clips: tuple[VideoShape, VideoShape], factor: float, scale: int) -> str:
    least, most = (
        f"{scale * width}x{scale * height}x{clip.frames}"
        for clip in clips
        for height, width in [first_size(clip.height, clip.width, factor)]
    )
    return least if least == most else f"{least}..{most}"
