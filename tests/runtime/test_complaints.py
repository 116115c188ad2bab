"""Whoever asked hears what the library complains of, and nobody else."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ltx_trt.session.complaints import Said, reason
from ltx_trt.session.engine_api import EngineError
from tests.runtime.recorded_tensorrt import Recorder
from tests.waiting import HANG


def said() -> Said:
    return Said(Recorder().module())


def test_the_first_complaint_is_the_cause() -> None:
    library = said()

    def refuse() -> bool:
        library.logger.log(1, "no\n  memory")
        library.logger.log(1, "so no engine")
        library.logger.log(2, "a warning")
        return False

    with pytest.raises(EngineError, match=r"^tensorrt_rtx refused to open it: no memory$"):
        library.ask("to open it", refuse)
    with pytest.raises(EngineError, match="it gave no reason"):
        library.ask("to open it", lambda: None)


def test_what_the_loader_hears_is_not_blamed_on_another_thread() -> None:
    library = said()
    asked, complained = threading.Event(), threading.Event()

    def load() -> bool:
        asked.wait(HANG)
        library.logger.log(1, "no room for the weights")
        complained.set()
        return False

    def run() -> bool:
        asked.set()
        return not complained.wait(HANG)

    with ThreadPoolExecutor(1) as loader:
        loading = loader.submit(library.ask, "the weights", load)
        with pytest.raises(EngineError, match="refused to run: it gave no reason"):
            library.ask("to run", run)
        with pytest.raises(EngineError, match="refused the weights: no room for the weights"):
            loading.result(HANG)


def test_what_a_thread_of_the_librarys_own_says_is_heard_by_who_asks() -> None:
    library = said()
    with library.heard() as outer:
        with library.heard() as inner, ThreadPoolExecutor(1) as worker:
            worker.submit(library.logger.log, 1, "a kernel does not compile").result(HANG)
        library.logger.log(1, "and what follows")
    library.logger.log(1, "that nobody asked for")
    assert (outer, inner) == (["and what follows"], ["a kernel does not compile"])
    assert reason(inner) == "a kernel does not compile"
