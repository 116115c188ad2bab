"""Everything is given back whatever fails, and the first failure is the one that is heard of."""

from collections.abc import Callable

import pytest

from ltx_engines.errors import UserError
from ltx_trt.session.closing import close_all, told
from ltx_trt.session.device import Device
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.engine_api import EngineError
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu


def steps(done: list[int], *errors: Exception | None) -> list[Callable[[], None]]:
    def step(number: int, error: Exception | None) -> None:
        done.append(number)
        if error is not None:
            raise error

    return [lambda n=n, e=e: step(n, e) for n, e in enumerate(errors)]  # type: ignore[misc]


def test_all_steps_are_done_and_the_first_complaint_is_raised() -> None:
    done: list[int] = []
    with pytest.raises(DeviceError, match="first"):
        close_all(steps(done, None, DeviceError("first"), EngineError("second"), None))
    assert done == [0, 1, 2, 3]


def test_what_fails_while_an_error_is_on_its_way_does_not_hide_it() -> None:
    done: list[int] = []
    error = KeyboardInterrupt()
    close_all(steps(done, DeviceError("later"), None), error)
    assert done == [0, 1]


def test_a_bug_is_no_complaint() -> None:
    with pytest.raises(ZeroDivisionError):
        close_all([lambda: 1 // 0])


def test_what_the_gpu_refuses_is_one_line_that_begins_with_the_stage() -> None:
    words = r"^stage x: cuMemAlloc\(5\): no room$"
    with pytest.raises(UserError, match=words), told("stage x"):
        raise DeviceError("cuMemAlloc(5):\n  no room")


def test_a_device_is_closed_also_where_its_arena_cannot_be() -> None:
    gpu = FakeGpu()
    with pytest.raises(DeviceError, match="lost"), Device.of(gpu, FakeLibrary(gpu)) as device:
        device.arena.reserve(512)
        gpu.fail("free", DeviceError("lost"))
    assert gpu.closed
    assert gpu.leaks() == ["1 allocations of [512] bytes"]


def test_the_error_that_a_device_is_closed_for_stays_the_error() -> None:
    gpu = FakeGpu()
    with pytest.raises(UserError, match="the cause"), Device.of(gpu, FakeLibrary(gpu)) as device:
        device.arena.reserve(512)
        gpu.fail("free", DeviceError("lost"))
        raise UserError("the cause")
    assert gpu.closed
