"""Both sessions of the load benchmark compute the same clip, driven through the same lines."""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

import load
from ltx_trt.cli import SHIPPED
from report import Facts


@pytest.fixture(scope="module")
def answers() -> dict[str, list[Facts]]:
    found = {}
    for kind in load.KINDS:
        with load.worker(kind, SHIPPED, tokens=12) as worker:
            found[kind] = [worker.tell(word) for word in ("read", "open", "step", "step")]
    return found


def test_ours_and_the_default_session_agree(answers: dict[str, list[Facts]]) -> None:
    sums = [step["sum"] for found in answers.values() for step in found[2:]]
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-4)
    assert sums[0] > 0


def test_every_answer_has_seconds_and_memory(answers: dict[str, list[Facts]]) -> None:
    for found in answers.values():
        assert all(answer["seconds"] >= 0 for answer in found)
        assert all(0 < answer["anon"] <= answer["peak_anon"] for answer in found)


def test_a_worker_that_cannot_go_on_is_an_error_and_not_a_hang() -> None:
    with (
        load.worker("ours", SHIPPED, tokens=12) as worker,
        pytest.raises(RuntimeError, match="ended at 'step'"),
    ):
        worker.tell("step")


def test_a_dropped_file_is_read_from_the_disk_again() -> None:
    home = load.ROOT / "build"  # on a disk, where a temporary folder may be in memory
    home.mkdir(exist_ok=True)
    with NamedTemporaryFile(dir=home) as file:
        file.write(os.urandom(1 << 20) * 64)
        file.flush()
        assert load.cached(file.fileno()) == 1
        assert load.drop([Path(file.name)]) < 0.1
