"""What TensorRT says goes wrong, raised by the call in which it said so."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as once
from importlib import import_module
from threading import get_ident
from typing import Any

from ltx_trt.session.engine_api import EngineError

log = logging.getLogger(__name__)


class Said:
    """The library's complaints, each for the thread that asked: one loads weights while another
    runs. What a thread of the library's own complains of is for all that ask just then."""

    def __init__(self, trt: Any) -> None:
        self.name = str(trt.__name__)
        self._asking: dict[int, list[str]] = {}
        self.logger = _logger(trt, self)

    @contextmanager
    def heard(self) -> Iterator[list[str]]:
        """What it complains of from here on to the end."""
        thread, complaints = get_ident(), list[str]()
        outer = self._asking.get(thread)
        self._asking[thread] = complaints
        try:
            yield complaints
        finally:
            if outer is None:
                del self._asking[thread]
            else:
                self._asking[thread] = outer

    def ask(self, what: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """
        Raises:
            EngineError: the answer is False or None, or there is none.
        """
        with self.heard() as complaints:
            try:
                answer = method(*arguments)
            except RuntimeError as error:
                raise EngineError(f"{self.name} refused {what}: {error}") from None
        if answer is None or answer is False:
            raise EngineError(f"{self.name} refused {what}: {reason(complaints)}")
        return answer

    def complain(self, words: str) -> None:
        own = self._asking.get(get_ident())
        for complaints in [own] if own is not None else [*self._asking.values()]:
            complaints.append(words)
        if own is None:
            log.info("%s", words)


def reason(complaints: list[str]) -> str:
    """The first one is the cause, the next ones say what it led to."""
    return complaints[0] if complaints else "it gave no reason"


@once
def of_library(module: str) -> Said:
    """One for each library: it keeps the first logger that it is given, for the whole process."""
    return Said(import_module(module))


def _logger(trt: Any, said: Said) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            words = " ".join(message.split())
            if severity <= trt.ILogger.ERROR:
                said.complain(words)
            elif severity == trt.ILogger.WARNING:
                log.info("%s", words)

    return Log()
