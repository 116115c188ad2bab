"""One line about what is wrong in a file that a pydantic model refuses."""

from collections.abc import Iterable, Iterator
from reprlib import repr as short
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ltx_engines.errors import nearest

Location = tuple[int | str, ...]


def problem(error: ValidationError, data: Any, model: type[BaseModel]) -> str:
    """The first problem of `data`, a typo before the gap that it leaves."""
    order = {"extra_forbidden": 0, "missing": 1}
    problems = sorted(error.errors(), key=lambda p: order.get(p["type"], 2))
    first = problems[0]
    where = _dotted(first["loc"], data)
    if first["type"] == "extra_forbidden":
        return f"unknown key {where}{nearest(str(first['loc'][-1]), _known(first['loc'], model))}"
    if first["type"] == "missing":
        return "missing key " + f"{where}.{first['loc'][-1]}".removeprefix(".")
    if first["type"] == "model_type" and " or instance of " in first["msg"]:
        return f"{where} should hold keys and values, not {short(first['input'])}"
    # A union says one thing for each of its members.
    wishes = [p["msg"] for p in problems if _dotted(p["loc"], data) == where]
    wish = " or ".join(dict.fromkeys(w.partition(" should ")[2] or w for w in wishes))
    return f"{where or 'the file'} should {wish}, not {short(first['input'])}"


def _dotted(location: Location, data: Any) -> str:
    """pydantic's location as the file spells it: union members, not found there, are left out."""
    keys = []
    for key in location:
        found = key in data if isinstance(data, dict) else isinstance(data, list)
        if not found or (isinstance(data, list) and not isinstance(key, int)):
            continue
        data = data[key]
        keys.append(str(key) if str(key).isprintable() else repr(key))
    return ".".join(keys)


def _known(location: Location, model: type[BaseModel]) -> Iterable[str]:
    """The keys that are allowed beside the one at `location`."""
    for key in location[:-1]:
        if field := model.model_fields.get(str(key)):
            model = next(_models(field.annotation), model)
    return model.model_fields


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
