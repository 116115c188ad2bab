"""`ltx-export lora`: LoRAs looked at, or fused into a checkpoint that other tools read too."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ltx_engines.errors import UserError
from ltx_export import derive, lora_fit
from ltx_ref import lora
from ltx_ref.checkpoint import read_header
from ltx_ref.lora_file import listed


def lines(words: Sequence[str], checkpoint: Path | None) -> Iterator[str]:
    """What each LoRA is and, given a checkpoint, whether it fits.

    Raises:
        UserError, CheckpointError: at the end, one does not fit; earlier, one is no LoRA.
    """
    header = None if checkpoint is None else read_header(checkpoint)
    unfit = []
    for wish in lora.parse(words):
        fits = yield from lora_fit.lines(wish, header)
        if not fits:
            unfit.append(str(wish.path))
    if unfit:
        raise UserError(
            f"{listed(unfit)} cannot be fused into {checkpoint}; see the report for the reason"
        )


def fuse(words: Sequence[str], checkpoint: Path, out: Path) -> Iterator[str]:
    """Write the checkpoint with the LoRAs in it; yields how far it is.

    Raises:
        UserError, CheckpointError: a LoRA does not fit, or there is something at `out`.
    """
    yield "reading"
    header = read_header(checkpoint)
    adapters = lora_fit.read(lora.parse(words), header)
    if os.path.lexists(out):
        raise UserError(f"{out} is there already; choose another name")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.absolute().parent}; create it first")
    target = derive.planned(header, adapters=adapters)
    yield from derive.percents(derive.write(header, target, out, adapters), f"writing {out.name}")
