"""The benchmark of a Triton server: what counts as met, and a short run where there is a server."""

import json
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")

import triton_server
from tests.triton import server
from tests.triton.stream import Heard

GOOD: dict[str, Any] = {"layout": "single", "step_cost": 0.001, "gain": 1.4, "wrong": 0}


@pytest.mark.parametrize(
    ("change", "met"),
    [
        ({}, True),
        ({"step_cost": 0.004}, False),
        ({"step_cost": 0.004, "layout": "stages"}, True),
        ({"gain": 1.2}, False),
        ({"wrong": 1}, False),
    ],
)
def test_it_is_met_when_all_is(change: dict[str, Any], met: bool) -> None:
    assert triton_server.met({**GOOD, **change}) is met


def test_a_step_is_what_passes_between_two_as_the_client_hears_of_them() -> None:
    kinds = ["planned", "stage", "step", "step", "step", "done"]
    heard = Heard([{"event": kind} for kind in kinds], [0.0, 1.0, 2.0, 2.5, 3.0, 9.0])
    assert triton_server.step_seconds(heard) == 0.5


@pytest.mark.skipif(bool(server.missing()), reason=server.missing())
def test_a_short_run_ends_with_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rounds", "1", "--requests", "2", "--steps", "3", "--layout", "single"]
    assert triton_server.main(words) in (0, 1), "a shared machine decides nothing about speed"
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert row["wrong"] == 0
    assert row["server"] > 0
