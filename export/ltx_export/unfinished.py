"""The file that ltx-export calibrate goes on with: of one process, of one order, and sound."""

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from textwrap import shorten
from typing import Any, BinaryIO

from ltx_engines.errors import UserError
from ltx_export import calibration, derive
from ltx_export.calibration import Calibration, DamagedError

SUFFIX = ".safetensors"

ANY = "?" * 8
"""In the names that `calibration.write` gives to what it has not finished."""

log = logging.getLogger(__name__)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Within it, no other process calibrates to that path, which can be written. What a killed one
    had half written there goes.

    Raises:
        UserError: another one does, or nothing can be written there.
    """
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is no folder; make it, or choose another --out")
    path = out.with_name(f".{out.name}.lock")
    with derive.told(out):
        file = _locked(path, out)
    with file:
        try:
            for left in out.parent.glob(f".{escape(out.name)}.{ANY}.partial"):
                left.unlink()
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path, out: Path) -> BinaryIO:
    """The file at that path, locked. Whoever had it before may have unlinked what we opened."""
    while True:
        file = path.open("ab")
        try:
            _lock(file, out)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: BinaryIO, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another ltx-export calibrate is at work on {out}; wait for it, or choose another "
            "--out"
        ) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): start no second process with it", out, error)


def check_place(out: Path, *, overwrite: bool) -> None:
    """
    Raises:
        UserError: what is there can neither be gone on with nor be replaced.
    """
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file's name, as in {out}/x{SUFFIX}")
    if not out.exists():
        return
    try:
        calibration.load(out)
    except DamagedError:
        if not overwrite:
            raise
        if out.suffix != SUFFIX:
            raise UserError(
                f"{out} is no calibration, and not named {SUFFIX}, so that it is not replaced; "
                "choose another --out"
            ) from None


def begun(out: Path, facts: Mapping[str, Any], inputs: Mapping[str, int]) -> Calibration:
    """What an earlier command of the same order has done; `inputs` has those of each layer.

    Raises:
        UserError: what is there is of another order, or damaged.
    """
    before = calibration.load(out)
    for key, now in facts.items():
        if key != "done" and (was := before.facts.get(key)) != now:
            raise UserError(
                f"{out} was begun with other {key}: {shorten(repr(was), 80)}, now "
                f"{shorten(repr(now), 80)}; give --overwrite, or another --out"
            )
    _check_layers(before, inputs)
    if before.facts["done"] == before.facts["runs"]:
        calibration.check(before.ranges, str(out))
    else:
        calibration.check_numbers(before.ranges, str(out))
    return before


def _check_layers(before: Calibration, inputs: Mapping[str, int]) -> None:
    found = {path: len(amax) for path, amax in before.ranges.items()}
    for path in dict.fromkeys((*inputs, *found)):
        if found.get(path) != inputs.get(path):
            raise UserError(
                f"{before.path} has {found.get(path, 'no')} ranges of {path}, wanted "
                f"{inputs.get(path, 'none')}; give --overwrite, or another --out"
            )
