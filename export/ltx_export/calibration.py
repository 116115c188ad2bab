"""The ranges of activations that a calibration saw, in a safetensors file.

    PATH.input_amax   F32 [K]   the largest absolute value of each input of the linear layer PATH

Its metadata says of which checkpoint they are, on what they were seen, and how many of the runs are
done: a file with fewer than all of them is one that `ltx-export calibrate` goes on with.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ltx_engines import hashes
from ltx_engines.errors import UserError
from ltx_export import derive
from ltx_ref import casts
from ltx_ref.checkpoint import CheckpointError, Header, TensorInfo, read_header

METADATA = "ltx_trt.calibration"
"""Key of the file's metadata: the JSON object of the facts."""

FORMAT = 1

PACKAGES = ("modelopt", "safetensors", "torch", "transformers")
"""Without which there are no ranges to write; reading them needs none of these."""

AMAX = ".input_amax"

Ranges = Mapping[str, NDArray[np.float32]]
"""By layer path: [K] each."""


@dataclass(frozen=True, slots=True)
class Calibration:
    path: Path
    ranges: Ranges
    facts: Mapping[str, Any]


class DamagedError(UserError):
    """A file that may have been a calibration, and cannot be read as one."""


def check_packages() -> None:
    """
    Raises:
        UserError: what runs the reference and watches it is not installed.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"ltx-export calibrate needs {', '.join(missing)}; pip install 'ltx-trt[quantize]'"
        )


def read(path: Path, header: Header) -> Calibration:
    """The ranges for quantizing the checkpoint with this header.

    Raises:
        UserError: it is no calibration, not finished, of another checkpoint, or does not fit.
    """
    found = load(path)
    done, runs = found.facts["done"], found.facts["runs"]
    if done != runs:
        raise UserError(
            f"{path} is not finished, {done} of {runs} runs are done; give ltx-export calibrate "
            "the same options again to go on"
        )
    _check_same(path, found.facts["checkpoint"], header.path)
    for layer, ranges in found.ranges.items():
        info = header.tensors.get(f"{layer}.weight")
        inputs = None if info is None or len(info.shape) != 2 else info.shape[1]
        if ranges.shape != (inputs,):
            raise UserError(
                f"{path}: {layer} has ranges of {len(ranges)} inputs, the checkpoint's has "
                f"{inputs or 'none'}; calibrate again"
            )
    check(found.ranges, str(path))
    return found


def load(path: Path) -> Calibration:
    """Whatever is done of a calibration.

    Raises:
        DamagedError: it cannot be read.
        UserError: it is something else.
    """
    try:
        header = read_header(path)
    except CheckpointError:
        raise DamagedError(
            f"{path} is cut short, damaged, or no safetensors file; calibrate again with "
            "--overwrite"
        ) from None
    facts = _facts(header)
    ranges = {}
    with path.open("rb") as file:
        for name, info in header.tensors.items():
            if not name.endswith(AMAX) or info.dtype != "F32" or len(info.shape) != 1:
                raise DamagedError(
                    f"{path}: {name} is no range of a layer; calibrate again with --overwrite"
                )
            ranges[name.removesuffix(AMAX)] = casts.read(file, info).astype(np.float32)
    return Calibration(path, MappingProxyType(ranges), facts)


def write(found: Calibration) -> None:
    """The file appears when it is complete; what was there before stays until then.

    Raises:
        UserError: it cannot be written.
    """
    entries, end = {}, 0
    for layer, ranges in sorted(found.ranges.items()):
        entries[f"{layer}{AMAX}"] = TensorInfo("F32", ranges.shape, end, end + 4 * ranges.size)
        end += 4 * ranges.size
    metadata = {METADATA: json.dumps(dict(found.facts))}
    partial = found.path.with_name(f".{found.path.name}.{uuid4().hex[:8]}.partial")
    try:
        with derive.told(found.path), partial.open("xb") as file:
            file.write(derive.head(Header(found.path, entries, metadata)))
            for _, ranges in sorted(found.ranges.items()):
                file.write(np.ascontiguousarray(ranges, np.float32).data)
            file.flush()
            os.fsync(file.fileno())
        with derive.told(found.path):
            os.replace(partial, found.path)
    finally:
        partial.unlink(missing_ok=True)


def check(ranges: Ranges, where: str) -> None:
    """
    Raises:
        UserError: a layer's range is not finite and positive.
    """
    check_numbers(ranges, where)
    for layer, amax in ranges.items():
        if not amax.max(initial=0) > 0:
            raise UserError(
                f"{where}: {layer} has only ever seen zeros, which gives no range; calibrate with "
                "other prompts, or more of them"
            )


def check_numbers(ranges: Ranges, where: str) -> None:
    """What holds before all runs are done, too.

    Raises:
        UserError: a number can be no maximum.
    """
    for layer, amax in ranges.items():
        if not np.isfinite(amax).all() or amax.min(initial=0) < 0:
            raise UserError(
                f"{where}: {layer} has a range that is no finite number from 0; calibrate again "
                "with --overwrite"
            )


def merged(one: Ranges, other: Ranges) -> Ranges:
    """The larger of each; one of them may be empty."""
    if not one or not other:
        return one or other
    if one.keys() != other.keys():
        raise ValueError("ranges of different layers")
    return {path: np.maximum(ranges, other[path]) for path, ranges in one.items()}


def identity(path: Path) -> dict[str, Any]:
    """What makes a file the same one under another name. Gigabytes are known by a sample."""
    size = path.stat().st_size
    small = size < hashes.STAMP_FROM
    return {
        "name": path.name,
        "bytes": size,
        "sha256": hashes.sha256(path) if small else None,
        "sample": None if small else hashes.sample(path),
    }


def _facts(header: Header) -> Mapping[str, Any]:
    text = header.metadata.get(METADATA)
    if text is None:
        raise UserError(f"{header.path} is no calibration; ltx-export calibrate writes one")
    try:
        facts = json.loads(text)
        done, runs, checkpoint = facts["done"], facts["runs"], facts["checkpoint"]
        if facts["format_version"] != FORMAT or not 0 <= done <= runs:
            raise ValueError
        if not isinstance(checkpoint, dict) or "bytes" not in checkpoint:
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DamagedError(
            f"{header.path}: its metadata {METADATA} is not what this ltx-export calibrate writes; "
            "calibrate again with --overwrite"
        ) from None
    return MappingProxyType(facts)


def _check_same(path: Path, known: Mapping[str, Any], checkpoint: Path) -> None:
    found = identity(checkpoint)
    for key, said in (("bytes", "bytes"), ("sha256", "sha256"), ("sample", "sample's sha256")):
        if known.get(key) != found[key]:
            raise UserError(
                f"{path} is of {known.get('name')} with {said} {known.get(key)}, {checkpoint} has "
                f"{found[key]}; calibrate this checkpoint"
            )
