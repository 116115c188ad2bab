"""A file that a command will write, looked at before the work that fills it."""

import os
from collections.abc import Mapping
from pathlib import Path

from ltx_engines.errors import UserError


def check(out: Path, inputs: Mapping[str, Path], *, overwrite: bool, option: str = "--out") -> None:
    """`inputs`: by what each is called. One that is a folder is an input with all that is in it.

    Raises:
        UserError: there is something that may not be replaced, or no folder for the file.
    """
    target = out.resolve()
    for what, path in inputs.items():
        same = out.exists() and path.exists() and out.samefile(path)
        if same or path.resolve() in {target, *target.parents}:
            where = "is" if same or path.resolve() == target else "is in"
            itself = "itself" if where == "is" else path
            raise UserError(f"{option} {out} {where} {what} {itself}; choose another name")
    if not out.parent.is_dir():
        raise UserError(f"{option} {out}: there is no folder {out.parent}; create it first")
    if not os.path.lexists(out):
        return
    if out.is_dir():
        raise UserError(f"{option} {out} is a folder; give a file's name in it")
    if out.exists() and not out.is_file():
        raise UserError(f"{option} {out} is a device; give the name of a file")
    if not overwrite:
        raise UserError(f"{out} is already there; give --overwrite, or choose another {option}")
