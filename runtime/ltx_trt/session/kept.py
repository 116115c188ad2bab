"""Sessions that outlive their use: opened once, lent to whoever asks, closed together."""

from collections.abc import Callable
from contextlib import nullcontext

from ltx_trt.session import Opened, Session


class Kept:
    """By the stage's name. Whoever takes them closes them."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    def lend(self, stage: str, open_session: Callable[[], Session]) -> Opened:
        """It stays open when its user is done with it."""
        if stage not in self._sessions:
            self._sessions[stage] = open_session()
        return nullcontext(self._sessions[stage])

    def take(self) -> list[Session]:
        """All of them; none is kept from now on."""
        taken, self._sessions = list(self._sessions.values()), {}
        return taken
