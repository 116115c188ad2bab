"""How what is on a GPU is given back: all of it, whatever one call says, and without hiding why."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ltx_engines.errors import UserError
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.engine_api import EngineError

log = logging.getLogger(__name__)


def close_all(steps: Iterable[Callable[[], object]], error: BaseException | None = None) -> None:
    """Do each of them. After a GPU has failed every call fails, so what follows `error` is not
    raised; else the first complaint is, when all is done."""
    first = error
    for step in steps:
        try:
            step()
        except (DeviceError, EngineError, UserError) as another:
            log.debug("while closing: %s", another)
            first = first or another
    if first is not None and first is not error:
        raise first


@contextmanager
def told(what: str) -> Iterator[None]:
    """What the GPU or an engine refuses, in one line that begins with the stage.

    Raises:
        UserError: it refused.
    """
    try:
        yield
    except (DeviceError, EngineError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error
