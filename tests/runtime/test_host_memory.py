"""Peaks of the host's memory: what is taken is seen, also when it is given back at once."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ltx_engines.byte_sizes import UNITS
from ltx_trt import host_memory
from ltx_trt.host_memory import HostWatch
from tests.runtime.memory_looks import Looks, taken

BLOCK = 64 * UNITS["MiB"]

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux' /proc")


@pytest.fixture(autouse=True)
def nothing_is_given_back_meanwhile() -> Iterator[None]:
    """Garbage of other tests is not collected between two looks of these."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


def now() -> tuple[int, int]:
    found = host_memory.in_memory()
    assert found is not None
    return found


def own() -> int:
    return now()[1]


@linux
def test_what_was_taken_and_given_back_is_the_peak(looks: Looks) -> None:
    before = own()
    with HostWatch(interval=0.001) as watch, taken(BLOCK):
        looks.wait()
    assert watch.anonymous is not None
    assert before + 0.9 * BLOCK < watch.anonymous
    assert own() < watch.anonymous - 0.9 * BLOCK


@linux
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "sampled"])
def test_what_lies_in_a_file_is_resident_and_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: Looks, counted: bool
) -> None:
    if not counted:
        monkeypatch.setattr(host_memory, "reset_peak", lambda: False)
    np.ones(BLOCK, np.uint8).tofile(tmp_path / "weights")
    before, anonymous = now()
    with HostWatch(interval=0.001) as watch:
        mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
        assert mapped.sum() == BLOCK
        looks.wait()
    assert watch.anonymous is not None
    assert watch.anonymous < anonymous + 0.5 * BLOCK
    assert watch.resident is not None
    assert watch.resident > before + 0.9 * BLOCK


@linux
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "sampled"])
def test_a_second_clip_is_not_said_to_take_what_the_first_one_took(
    counted: bool, monkeypatch: pytest.MonkeyPatch, looks: Looks
) -> None:
    """Where the system lets nobody set its count back, it is not asked for it."""
    if not counted:
        monkeypatch.setattr(host_memory, "reset_peak", lambda: False)
    elif not host_memory.reset_peak():
        pytest.skip("this system does not set its count back")
    peaks = []
    for size in (BLOCK, 1):
        with HostWatch(interval=0.001) as watch, taken(size):
            looks.wait()
        assert watch.resident is not None
        peaks.append(watch.resident)
    assert peaks[1] < peaks[0] - 0.9 * BLOCK


@linux
def test_what_is_there_too_short_to_be_sampled_is_counted() -> None:
    if not host_memory.reset_peak():
        pytest.skip("this system does not set its count back")
    before, _ = now()
    with HostWatch(interval=60) as watch, taken(BLOCK):
        pass
    assert watch.resident is not None
    assert watch.resident > before + 0.9 * BLOCK


def test_a_system_that_does_not_say_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "PROCESS", tmp_path)
    with HostWatch(interval=0.001) as watch:
        pass
    assert (watch.anonymous, watch.resident) == (None, None)
    assert [*tmp_path.iterdir()] == []
