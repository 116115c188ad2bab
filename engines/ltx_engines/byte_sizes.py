"""Amounts of memory as people write and read them."""

import re

from ltx_engines.errors import UserError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def parse(text: str, option: str) -> int:
    """Bytes: 8GiB, 7.5 GB, 512MiB or a bare number.

    Raises:
        UserError: it is nothing of that; with the option that it was given to.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise UserError(f"{option} {text}: not an amount of memory; write it as 8GiB or 7500MB")
    if size := int(float(match[1]) * units[match[2].lower()]):
        return size
    raise UserError(f"{option} {text}: it must be more than nothing")


def said(size: int) -> str:
    """Short, for a sentence: two decimals above a MiB."""
    for unit in ("TiB", "GiB", "MiB"):
        if abs(size) >= UNITS[unit]:
            return f"{size / UNITS[unit]:.2f} {unit}"
    return f"{size} bytes"
