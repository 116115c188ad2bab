"""Words for a scene: several templates, word orders and synonyms, so that language is not trivial.

`words` lists everything a caption can contain; the tokenizer's vocabulary is made from it.
"""

from __future__ import annotations

import re
from itertools import chain

import numpy as np

from tiny.clips import Scene

NEGATIVE_PROMPT = "worst quality, inconsistent motion, blurry, jittery, distorted"

NOUNS = {
    "circle": ("circle", "circle", "disc", "ball"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "diamond", "rhombus"),
}
COLOURS = {
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow",),
    "cyan": ("cyan", "cyan", "turquoise"),
    "purple": ("purple", "purple", "violet"),
    "white": ("white",),
    "black": ("black",),
}
WAYS = {
    "right": ("right", "to the right", "rightwards"),
    "left": ("left", "to the left", "leftwards"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
}
ADVERBS = {"slow": ("slowly",), "normal": ("",), "fast": ("quickly", "fast", "rapidly")}
ADJECTIVES = {"small": ("small", "little"), "normal": ("",), "large": ("large", "big")}
VERBS = (
    ("moves", "moving"),
    ("moves", "moving"),
    ("slides", "sliding"),
    ("drifts", "drifting"),
    ("glides", "gliding"),
    ("travels", "travelling"),
    ("goes", "going"),
    ("flies", "flying"),
)
PLACES = ("on", "over", "across", "against", "in front of")
TEMPLATES = (
    "a {size} {colour} {shape} {moves} {way} {speed} {on} a {background} background",
    "a {size} {colour} {shape} {moves} {way} {speed} {on} a {background} background",
    "a {size} {colour} {shape} {speed} {moves} {way} {on} a {background} background",
    "{on} a {background} background, a {size} {colour} {shape} {moves} {way} {speed}",
    "a {size} {colour} {shape} {speed} {moving} {way}, {background} background",
    "{background} background, {size} {colour} {shape} {moving} {way} {speed}",
    "a {size} {shape} {moves} {way} {speed}. the {shape} is {colour}, the background is"
    " {background}",
    "the background is {background}. a {size} {colour} {shape} is {moving} {way} {speed}",
    "a video of a {size} {colour} {shape} {moving} {way} {speed} {on} {background}",
    "a {size} {shape} in {colour} {speed} {moves} {way}, everything behind it is {background}",
    "{moving} {way} {speed}: a {size} {colour} {shape} {on} a {background} background",
    "{size} {colour} {shape}, {background} background, {moving} {way} {speed}",
)


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many captions of a scene."""

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    moves, moving = VERBS[rng.integers(len(VERBS))]
    text = pick(TEMPLATES).format(
        size=pick(ADJECTIVES[scene.size]),
        colour=pick(COLOURS[scene.colour]),
        shape=pick(NOUNS[scene.shape]),
        moves=moves,
        moving=moving,
        way=pick(WAYS[scene.direction]),
        speed=pick(ADVERBS[scene.speed]),
        on=pick(PLACES),
        background=pick(COLOURS[scene.background]),
    )
    return re.sub(r"\s+(?=[\s,.:])", "", text).strip()


def split(text: str) -> list[str]:
    """Words and marks, one by one."""
    return re.findall(r"\w+|[^\w\s]", text)


def words() -> list[str]:
    """Every word and mark of every caption and of the default negative prompt, sorted."""
    texts = chain(
        (re.sub(r"{\w+}", " ", template) for template in TEMPLATES),
        chain.from_iterable(VERBS),
        PLACES,
        *(
            chain.from_iterable(table.values())
            for table in (NOUNS, COLOURS, WAYS, ADVERBS, ADJECTIVES)
        ),
        [NEGATIVE_PROMPT],
    )
    return sorted(set(chain.from_iterable(split(text) for text in texts)))
