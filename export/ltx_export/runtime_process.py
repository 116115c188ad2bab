"""Clips as a user would get them: the runtime in a process of its own, as export may not import it.

Frames come back as PNG, so nothing is lost between the two.
"""

import json
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from ltx_engines.command import INTERRUPTED
from ltx_engines.errors import UserError
from ltx_engines.metrics import Frames

RUNTIME = "ltx_trt"


@dataclass(frozen=True, slots=True)
class Batch:
    """What `ltx-trt batch` is asked for. Without a seed it is the runtime's own."""

    bundle: Path
    prompts: Path
    seed: int | None = None
    pipeline_config: Path | None = None

    def command(self, folder: Path) -> list[str]:
        words = [sys.executable, "-m", f"{RUNTIME}.cli", "batch", "--format", "png", "--json"]
        words += ["--bundle", str(self.bundle), "--prompts", str(self.prompts)]
        if self.seed is not None:
            words += ["--seed", str(self.seed)]
        if self.pipeline_config is not None:
            words += ["--pipeline-config", str(self.pipeline_config)]
        return [*words, "--output", str(folder)]


@dataclass(frozen=True, slots=True)
class Terms:
    """What two clips must have in common to be compared."""

    seed: int
    frames: int
    height: int
    width: int
    frame_rate: float
    sampler: str
    sigmas: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"{self.frames} frames of {self.width} x {self.height} at {self.frame_rate:g} a "
            f"second, seed {self.seed}, {len(self.sigmas) - 1} steps of {self.sampler}"
        )


@dataclass(frozen=True, slots=True)
class Made:
    """A clip that the runtime has finished: a folder of frames."""

    folder: Path
    terms: Terms

    def read(self) -> Frames:
        from PIL import Image

        paths = sorted(self.folder.glob("*.png"))
        return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def check() -> None:
    """Before any work, or an error that says what to install."""
    if find_spec(RUNTIME) is None:
        raise UserError(
            f"the runtime, {RUNTIME}, is not installed beside ltx-export; "
            "pip install 'ltx-trt[onnxruntime]'"
        )


def clips(batch: Batch, folder: Path) -> Generator[Made, None, None]:
    """Each clip when it is there. Closing the generator ends the process.

    Raises:
        UserError: the runtime's own, or how it ended.
    """
    command = batch.command(folder)
    with (
        TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                yield _read(batch, line)
        except BaseException:
            process.terminate()
            raise
        if code := process.wait():
            raise _failure(batch, code, errors)


def _read(batch: Batch, line: str) -> Made:
    """A report of the runtime, `ltx_trt.job.Report`, or why there is none."""
    told = json.loads(line)
    if told.get("state") == "failed":
        raise UserError(f"{batch.bundle}: {told['reason']}")
    facts = {name: told[name] for name in Terms.__slots__}
    return Made(Path(told["output"]), Terms(**facts | {"sigmas": tuple(told["sigmas"])}))


def _failure(batch: Batch, code: int, errors: IO[str]) -> BaseException:
    if code == INTERRUPTED:
        return KeyboardInterrupt()
    errors.seek(0)
    *_, last = ["it said nothing", *filter(str.strip, errors.read().splitlines())]
    how = "" if code == 2 else f" (it ended with code {code})"
    return UserError(f"{batch.bundle}: {last.removeprefix('ltx-trt: ')}{how}")
