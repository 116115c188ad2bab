"""A file of prompts, as calibration, quality reports and batches read it: one on each line."""

from pathlib import Path

from ltx_engines.errors import UserError


def read(path: Path) -> tuple[str, ...]:
    """Blank lines and lines that begin with # are left out. Only a line feed ends a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not a text in UTF-8 (byte {error.start}); write one prompt on each line"
        ) from None
    found = tuple(line.strip() for line in lines)
    prompts = tuple(line for line in found if line and not line.startswith("#"))
    if not prompts:
        raise UserError(f"{path} has no prompts; write one on each line")
    return prompts
