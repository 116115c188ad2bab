"""A file of jobs, one JSON object on each line, with the options of `ltx-trt run` as keys.

    {"prompt": "a fox in the snow", "seed": 7, "name": "fox"}
    {"prompt": "a red circle", "width": 128, "height": 96, "num_frames": 33}

Everything that is wrong with a line is said with its number, before any of them is made.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ltx_engines import strict
from ltx_engines.errors import UserError
from ltx_trt.cache_options import CacheWishes
from ltx_trt.request import Wishes

CACHE = "cache_"
CACHED = tuple(field.name for field in fields(CacheWishes) if field.name != "compare")
"""What a job may wish of step caching: `cache_steps` and so on. A batch compares nothing."""

NAME = re.compile(r"\w[\w-]{0,99}")
"""No dot: what follows it would be taken for the form of the file."""

SURROGATE = re.compile("[\ud800-\udfff]")

LONGEST_NAME = 255 - len("..mp4.12345678.partial")
"""Bytes: file systems take 255, and a clip that is being written has the longest name."""


@dataclass(frozen=True, slots=True)
class Job:
    """`where` is said in front of what is wrong with it; `keys` are as in the file, with what the
    command line says of all jobs, and without the name."""

    name: str
    where: str
    keys: Mapping[str, Any]

    @property
    def wishes(self) -> Wishes:
        return Wishes(**{field.name: self._said[field.name] for field in fields(Wishes)})

    @property
    def cache(self) -> CacheWishes:
        return CacheWishes(**{name: self._said[CACHE + name] for name in CACHED})

    @property
    def preset(self) -> str | None:
        name: str | None = self._said["preset"]
        return name

    @property
    def _said(self) -> dict[str, Any]:
        return dict(_checked(self.where, self.keys))


def _line() -> type[BaseModel]:
    """What a clip may be asked for is written once, where the command line has it."""
    keys: dict[str, Any] = {"name": (str | None, None), "preset": (str | None, None)}
    for prefix, of, names in (("", Wishes, None), (CACHE, CacheWishes, CACHED)):
        hints = get_type_hints(of)
        for field in fields(of):
            if names is None or field.name in names:
                default = ... if field.default is MISSING else field.default
                keys[prefix + field.name] = (hints[field.name], default)
    forbid = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model("Line", __config__=forbid, **keys)


LINE = _line()


def read(path: Path, defaults: Mapping[str, Any]) -> tuple[Job, ...]:
    """`defaults` are keys that a job may leave out.

    Raises:
        UserError: a line is wrong, or two jobs have one name, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not a text in UTF-8 (byte {error.start}); write one job on each line"
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(
            f'{path} has no jobs; write one on each line, such as {{"prompt": "a fox"}}'
        )
    jobs = [
        _job(f"{path}:{number}", line, f"{index:04d}", defaults)
        for index, (number, line) in enumerate(numbered)
    ]
    return _apart(jobs)


def of_prompts(path: Path, prompts: Iterable[str], defaults: Mapping[str, Any]) -> tuple[Job, ...]:
    """A job for each, with seeds that count up."""
    return tuple(
        Job(
            f"{index:04d}",
            f"{path}: prompt {index + 1}",
            {**defaults, "prompt": prompt, "seed": defaults["seed"] + index},
        )
        for index, prompt in enumerate(prompts)
    )


def _job(where: str, line: str, name: str, defaults: Mapping[str, Any]) -> Job:
    try:
        found = json.loads(line, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (UserError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from None
    if SURROGATE.search(json.dumps(found, ensure_ascii=False)):
        raise UserError(f"{where}: half of a character (\\ud800 to \\udfff); write the whole one")
    if not isinstance(found, dict):
        raise UserError(f'{where}: a job is an object, such as {{"prompt": "a fox"}}')
    _checked(where, found)
    if (told := found.pop("name", None)) is not None:
        if not NAME.fullmatch(told):
            raise UserError(
                f"{where}: name should be 1 to 100 letters, digits, - and _, not {told!r}"
            )
        if (size := len(os.fsencode(told))) > LONGEST_NAME:
            raise UserError(
                f"{where}: name should be of {LONGEST_NAME} bytes at most, {told[:8]!r}... has "
                f"{size}; shorten it"
            )
        name = told
    said = {key: value for key, value in found.items() if value is not None}
    return Job(name, where, {**defaults, **said})


def _checked(where: str, keys: Mapping[str, Any]) -> BaseModel:
    try:
        return LINE.model_validate_json(json.dumps(keys))
    except ValidationError as error:
        raise UserError(f"{where}: {strict.problem(error, keys, LINE)}") from None


def _apart(jobs: Iterable[Job]) -> tuple[Job, ...]:
    """Also where the disk does not tell large letters from small ones."""
    names: dict[str, Job] = {}
    for job in jobs:
        if (other := names.setdefault(job.name.casefold(), job)) is not job:
            line = other.where.rpartition(":")[2]
            raise UserError(
                f"{job.where}: the name {job.name!r} is that of line {line} already; give each "
                "job a name of its own"
            )
    return tuple(names.values())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"the key {key!r} is there twice; leave one out")
        found[key] = value
    return found


def _no_number(word: str) -> Any:
    raise UserError(f"{word} is no number of JSON")
