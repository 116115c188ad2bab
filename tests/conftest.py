"""What holds for all tests: what ltx-trt keeps for its user is kept for each test alone."""

import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest


class Caches:
    """A folder for each test, and one that is not a user's for what is made for several."""

    def __init__(self, base: Path) -> None:
        self._base, self._numbers = base, count()
        self.next()

    def next(self) -> None:
        self._now = self._base / str(next(self._numbers))

    def __call__(self, name: str) -> str:
        return str(self._now / name)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caches]:
    found = Caches(tmp_path_factory.mktemp("caches"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platformdirs.user_cache_dir", found)
        yield found


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Whatever a test starts: begun with `nohup` or `&`, it would inherit to ignore Ctrl-C."""
    if (before := signal.getsignal(signal.SIGINT)) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def own_cache(caches: Caches) -> None:
    caches.next()
