"""What the driver says of the GPU, asked through a driver that is made up."""

import ctypes
from pathlib import Path
from typing import Any

import pytest

from ltx_export import build, card


class Driver:
    """Every call succeeds but `failing`; the names are libcuda's."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.held, self.pushed = failing, 0, 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == self.failing:
                return 100
            self._answer(name, *arguments)
            return 0

        return call

    def _answer(self, name: str, *arguments: Any) -> None:
        if name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = {75: 12, 76: 0}[arguments[1]]
        elif name == "cuDeviceGetName":
            arguments[0].value = b"NVIDIA GeForce RTX 5090"
        elif name == "cuMemGetInfo_v2":
            arguments[0]._obj.value, arguments[1]._obj.value = 7, 9
        self.held += {"cuDevicePrimaryCtxRetain": 1, "cuDevicePrimaryCtxRelease_v2": -1}.get(
            name, 0
        )
        self.pushed += {"cuCtxPushCurrent_v2": 1, "cuCtxPopCurrent_v2": -1}.get(name, 0)


def test_a_card_has_a_name_a_capability_and_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    assert card.at_hand() == card.Card("NVIDIA GeForce RTX 5090", 120, 7)
    assert build.card() == 120
    assert (driver.held, driver.pushed) == (0, 0)


@pytest.mark.parametrize(
    "failing",
    [
        *("cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetName"),
        *("cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemGetInfo_v2"),
    ],
)
def test_a_driver_that_fails_is_no_card_and_keeps_nothing(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(failing)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    assert card.at_hand() is None
    assert (driver.held, driver.pushed) == (0, 0)


def test_a_machine_without_a_driver_has_no_card() -> None:
    if not Path("/dev/nvidia0").exists():
        assert card.at_hand() is None
        assert build.card() is None
