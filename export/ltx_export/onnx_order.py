"""What is asked of `ltx-export onnx`: a value that is read without loading onnx."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ltx_engines import bundle
from ltx_engines.bundle import StgMode
from ltx_engines.errors import UserError

Opset = Literal[20, 23]
Reader = Literal["any", "builder", "onnxruntime-gpu"]


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for."""

    checkpoint: Path
    out: Path
    text_encoder: Path | None = None
    upsampler: Path | None = None
    stages: tuple[str, ...] | None = None
    """None: all whose files are given."""
    pipeline_config: Path | None = None
    stg_mode: StgMode | None = None
    precision: bundle.Precision | None = None
    """None leaves the weights as they are."""
    loras: tuple[str, ...] = ()
    opset: Opset | None = None
    reader: Reader = "any"
    """For a builder of engines the opset is the one that has an operator for attention; for ONNX
    Runtime's GPU providers attention is an operator of its own, so that no score is written."""
    weights: Literal["link", "copy", "refer"] = "link"
    hash_everything: bool = False
    name: str | None = None
    overwrite: bool = False
    ignore_config_keys: tuple[str, ...] = ()

    def read_by(self) -> Iterator[Path]:
        """The files that it reads."""
        for path in (self.checkpoint, self.text_encoder, self.upsampler, self.pipeline_config):
            if path is not None and path.is_dir():
                yield from sorted(file for file in path.iterdir() if file.is_file())
            elif path is not None and path.is_file():
                yield path
        for adapter in self.loras:  # FILE or FILE:STRENGTH
            if (file := Path(adapter)).is_file() or (
                file := Path(adapter.rpartition(":")[0])
            ).is_file():
                yield file


def check_apart(out: Path, files: Iterable[Path], surviving: Iterable[Path] = ()) -> None:
    """Nothing that is read lies in the folder that is replaced, but for what is put there again.

    Raises:
        UserError: a file would be gone.
    """
    place = Path(os.path.realpath(out))
    for file in files:
        found = Path(os.path.realpath(file))
        if found.is_relative_to(place) and found not in surviving:
            raise UserError(
                f"{file} lies in {out}, which is replaced, and would be deleted; choose another "
                "--out, or give the file from another place"
            )
