"""What is asked of `ltx-export onnx`: a value that is read without loading onnx."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ltx_engines import bundle
from ltx_engines.bundle import StgMode

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
