"""Options that several commands have."""

from enum import StrEnum
from typing import Annotated

import typer

from ltx_engines.errors import UserError, nearest
from ltx_engines.stages import OPTIONAL, STAGES, STREAM


class Weights(StrEnum):
    link = "link"
    copy = "copy"
    refer = "refer"


class StgModes(StrEnum):
    attention_values = "attention_values"
    attention_skip = "attention_skip"
    transformer_block = "transformer_block"


class Precisions(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Lora = Annotated[
    list[str], typer.Option(metavar="FILE[:STRENGTH]", help="Fuse a LoRA; may be repeated.")
]
Placement = Annotated[
    Weights,
    typer.Option(
        help="Hard links cost no disk, copies can leave the disk, references lead anywhere."
    ),
]
Mode = Annotated[
    StgModes | None, typer.Option(help="What guidance by perturbed blocks does to them.")
]
Preset = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="In place of --pipeline-config: see ltx-trt presets."),
]
IgnoreKeys = Annotated[
    list[str],
    typer.Option(
        "--ignore-config-key",
        help="A key of the checkpoint's configuration to pass over; may be repeated.",
    ),
]


def chosen_stages(words: str) -> tuple[str, ...] | None:
    """In the order of the table, whatever the order on the command line; None for all."""
    if words == "all":
        return None
    known = (*STAGES, STREAM, *OPTIONAL)
    chosen = [word.strip() for word in words.split(",")]
    if "all" in chosen:
        raise UserError(f"--stages {words}: all means each of them; name some, or only all")
    for word in chosen:
        if word not in known:
            raise UserError(
                f"unknown stage {word!r}{nearest(word, known)}; known are all, {', '.join(known)}"
            )
    return tuple(stage for stage in known if stage in chosen)
