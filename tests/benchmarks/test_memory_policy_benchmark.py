"""The benchmark of memory policies: what its aims say of runs, without running any."""

from typing import Any

import pytest

import memory_policy


def row(**changes: Any) -> dict[str, Any]:
    return {
        "sha256": "a",
        "peak_rss": 1000,
        "peak_anon": 100,
        "host_memory": 1000,
        "host_anonymous": 100,
        "cached_prompts": 0,
        "seconds": {"text_encoder": 1.0},
    } | changes


def found(**changes: dict[str, Any]) -> dict[str, Any]:
    rows = {
        "staged": row(),
        "resident": row(peak_rss=2000, host_memory=2000),
        "auto": row(),
        "new text": row(),
        "seen text": row(cached_prompts=2, seconds={"text_encoder": 0.001}),
        "batch staged": {"second_opens_s": 2.0},
        "batch resident": {"second_opens_s": 0.0},
    }
    for name, change in changes.items():
        rows[name.replace("_", " ")] |= change
    return {"runs": rows}


def test_runs_that_are_as_they_should_be_meet_every_aim() -> None:
    assert set(memory_policy.aims(found()).values()) == {True}


@pytest.mark.parametrize(
    ("name", "change", "aim"),
    [
        ("auto", {"sha256": "b"}, "the same clip"),
        ("staged", {"peak_rss": 2000, "host_memory": 2000}, "staged takes less"),
        ("staged", {"host_memory": 880}, "its own word is true"),
        ("auto", {"host_anonymous": 111}, "its own word is true"),
        ("seen_text", {"cached_prompts": 1}, "texts are found"),
        ("seen_text", {"seconds": {"text_encoder": 0.2}}, "texts are found"),
        ("batch_resident", {"second_opens_s": 2.0}, "a resident stage is there"),
    ],
)
def test_a_run_that_is_not_misses_its_aim_alone(
    name: str, change: dict[str, Any], aim: str
) -> None:
    missed = [aim for aim, met in memory_policy.aims(found(**{name: change})).items() if not met]
    assert missed == [aim]


def test_a_row_is_said_in_one_line() -> None:
    said = memory_policy.said(row(wall_s=1.0))
    assert "\n" not in said
    assert "0 texts found" in said
