"""A session that stands in front of another one and calls it, or not."""

from types import TracebackType
from typing import Self

from ltx_trt.session import Session


class Wrapped:
    """What begins and ends with its wrapper does so once. Whoever has opened the other session
    himself only calls the wrapper, and closes what he has opened."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._begun = self._ended = False

    def __enter__(self) -> Self:
        """
        Raises:
            ValueError: it was entered before.
        """
        if self._begun:
            raise ValueError(f"a {type(self).__name__} is entered once; make another")
        self._session.__enter__()
        self._begun = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._begun and not self._ended:
            self._ended = True
            self._session.__exit__(kind, error, trace)
