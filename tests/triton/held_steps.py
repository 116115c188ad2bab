"""Clips that a server holds at a step, so that no test has to be faster than a model.

    a step that is under way   ends when its client has gone, or when so many others wait for it
    before it                  nothing is held: `prompt`, `planned`, the steps up to it are told
    while it lasts             the transformer has a pass under way, as with any long step

A repository with `add` does this to clips whose prompt is `Hold.prompt`; the server's log says when
a step is held. Runs in the model's process.
"""

import re
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path
from threading import local
from typing import Any

from tests.waiting import until

LINE = "from tests.triton import held_steps\n\nheld_steps.install()\n"

PROMPT = re.compile(r"hold step (\d+) of (\d+) until (\d+) wait, for (\w+)")
"""None wait: until the client has gone."""


@dataclass(frozen=True)
class Hold:
    """Step `step` of `steps` lasts until its client has gone or, of a number, until so many others
    wait for the transformer. `name` is one that no other clip of the server has."""

    step: int
    steps: int = 200
    waiting: int = 0
    name: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def prompt(self) -> str:
        return f"hold step {self.step} of {self.steps} until {self.waiting} wait, for {self.name}"

    @property
    def wishes(self) -> dict[str, Any]:
        """Of a shape that no other clip of the tests has: a pass to itself."""
        return {
            "prompt": self.prompt,
            "num_inference_steps": self.steps,
            "width": 160,
            "height": 32,
            "num_frames": 9,
        }

    def said(self) -> str:
        """In the log, from when it is held."""
        return f"held: {self.prompt}"


def add(repository: Path) -> None:
    with (repository / "ltx_video/1/model.py").open("a", encoding="utf-8") as file:
        file.write(LINE)


def install() -> None:
    """Once in a process; a request is a thread of it, and so is the pass of a clip that shares
    none."""
    from ltx_trt.triton import batching, video_model

    here = local()
    whole, one_pass = video_model.answer, batching.Batcher._pass

    def answer(order: Any, studio: Any, client: Any, meter: Any) -> None:
        here.hold = of(order.request.prompt)
        here.client, here.made = client, 0
        whole(order, studio, client, meter)

    def held(batcher: Any, calls: Any) -> Any:
        here.made += 1
        if here.hold is not None and here.made == here.hold.step:
            print(here.hold.said(), file=sys.stderr, flush=True)
            until(lambda: is_over(here, batcher), f"an end of what is {here.hold.said()}")
        return one_pass(batcher, calls)

    video_model.answer = answer
    every: Any = batching.Batcher
    every._pass = held


def of(prompt: str) -> Hold | None:
    if (found := PROMPT.fullmatch(prompt)) is None:
        return None
    return Hold(int(found[1]), int(found[2]), int(found[3]), found[4])


def is_over(here: local, batcher: Any) -> bool:
    if here.hold.waiting:
        return bool(len(batcher._waiting) >= here.hold.waiting)
    return bool(here.client.gone())
