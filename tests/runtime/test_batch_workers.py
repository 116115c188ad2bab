"""Workers are killed, interrupted or cannot start: no clip is lost, none is made twice."""

import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from ltx_engines.errors import UserError
from ltx_trt.batch import execution, results, workers
from ltx_trt.batch.results import Place
from ltx_trt.batch.workers import Team
from ltx_trt.job import Voice
from tests.runtime.batches import batch_of, ltx_trt, many, names, order_of, rows
from tests.waiting import HANG, until

pytest.importorskip("onnxruntime")


@pytest.fixture
def folder(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


def test_a_killed_worker_costs_its_job_a_new_beginning_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is ready: what is killed before, while the other makes all, has no job."""
    crews: list[workers.Workers] = []

    def crew(*given: Any) -> workers.Workers:
        crews.append(workers.Workers(*given))
        return crews[-1]

    monkeypatch.setattr(execution, "Workers", crew)
    file, out = many(tmp_path, 10), tmp_path / "out"
    planned = execution.check(batch_of(folder, file, out))
    voice, outcomes = Ear(), []
    for outcome in execution.execute(planned, Team(2), voice):
        outcomes.append(outcome)
        if len(outcomes) == 3:
            assert len(multiprocessing.active_children()) == 2
            ready = [worker for worker in crews[0]._workers if worker.ready]
            killed = next((worker for worker in ready if worker.task), ready[0])
            os.kill(killed.process.pid or 0, signal.SIGKILL)
    assert sorted(one.name for one in outcomes) == [f"{index:04d}" for index in range(10)]
    assert {one.state for one in outcomes} == {"made"}
    assert any("was killed by signal 9" in note for note in voice.notes)
    assert len(names(out)) == 20
    assert not multiprocessing.active_children()


class Ear(Voice):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def say(self, *notes: str) -> None:
        self.notes += notes


def started(cache: Path, *words: str) -> "subprocess.Popen[str]":
    """In a group of its own, as a shell starts a command. It says so much of each clip, and so
    little goes into its pipe, that it cannot come to its end as long as nobody reads."""
    return subprocess.Popen(
        [sys.executable, "-m", "ltx_trt.cli", *words, "--json"],
        env={**os.environ, "XDG_CACHE_HOME": str(cache / "cache")},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=mmap.PAGESIZE,
        text=True,
    )


def heard(process: "subprocess.Popen[str]", lines: int) -> None:
    """So many lines, and not a byte more."""
    assert process.stdout is not None
    while lines:
        byte = os.read(process.stdout.fileno(), 1)
        assert byte, "it has ended"
        lines -= byte == b"\n"


def test_killed_with_all_it_started_it_goes_on_where_it_was(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = many(tmp_path, 16), tmp_path / "out"
    words = [str(word) for word in ("batch", file, "--out", out, "--bundle", folder)]
    with started(tmp_path, *words, "--workers", "2") as process:
        heard(process, 2)
        os.killpg(process.pid, signal.SIGKILL)
    done = {path for path in out.iterdir() if results.find(Place(out, path.stem, "mp4"))}
    before = {path: path.stat().st_mtime_ns for path in done if path.suffix == ".json"}
    assert 2 <= len(before) < 16
    assert ltx_trt(*words, "--json") == 0
    states = [row["state"] for row in rows(capsys)]
    assert len(states) == 16
    assert states.count("skipped") >= len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert names(out) == {f"{i:04d}.{end}" for i in range(16) for end in ("mp4", "json")}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups to interrupt")
def test_ctrl_c_stops_all_workers_and_leaves_finished_clips_only(
    folder: Path, tmp_path: Path
) -> None:
    file, out = many(tmp_path, 60), tmp_path / "out"
    words = [str(word) for word in ("batch", file, "--out", out, "--bundle", folder)]
    with started(tmp_path, *words, "--gpus", "0") as process:
        heard(process, 1)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "ltx-trt: interrupted; nothing is half-written"
    assert "Traceback" not in said
    assert all(results.find(Place(out, path.stem, "mp4")) for path in out.iterdir())
    assert {path.suffix for path in out.iterdir()} == {".mp4", ".json"}
    until(lambda: ended(process.pid), "the end of all processes of the group")


def ended(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_worker_stays_with_its_group_and_then_takes_one_that_nobody_is_at(
    folder: Path, tmp_path: Path
) -> None:
    plain = execution.check(batch_of(folder, many(tmp_path, 5), tmp_path / "out")).tasks
    tasks = [replace(task, group=group) for task, group in zip(plain, "aabbb", strict=True)]
    crew = workers.Workers(order_of(folder), Team(2), Voice())
    anything: Any = MagicMock()
    first, second = (workers._Worker(anything, anything, number) for number in range(2))
    crew._workers = [first, second]
    queue, given = deque(tasks), []
    for worker in (first, second, first, first, second):
        crew._give(worker, queue)
        assert worker.task is not None
        given.append(worker.task.job.name)
    assert given == ["0000", "0002", "0001", "0003", "0004"]
    assert not queue


def test_workers_see_one_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [Team(4, ("0", "3")).gpu(number) for number in range(4)] == ["0", "3", "0", "3"]
    assert Team(2).gpu(1) is None
    seen: list[str | None] = []

    def look(order: object) -> Any:
        seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        raise EOFError

    monkeypatch.setattr(workers, "Maker", look)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    line: Any = None
    workers.work(line, order_of(Path("none")), "3")
    assert seen == ["3"]


@dataclass
class Bomb:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_workers_that_cannot_start_are_not_started_for_ever(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "MOST_STARTS", 1)
    planned = execution.check(batch_of(folder, many(tmp_path, 1), tmp_path / "out"))
    bomb: Any = Bomb()
    crew = workers.Workers(replace(planned.order, choice=bomb), Team(1), Voice())
    monkeypatch.setattr(workers, "Alone", lambda *_: nullcontext())
    with pytest.raises(UserError, match="a worker ended with code 3 before it was ready"), crew:
        list(crew.make(planned.tasks))


@pytest.mark.parametrize("count", [1, 2])
def test_a_job_that_cannot_be_claimed_fails_alone_and_the_batch_ends(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """With workers it was given to one after the other, for ever."""
    file, out = many(tmp_path, 3), tmp_path / "out"
    (out / ".0001.lock").mkdir(parents=True)  # where the lock's file should be
    words = ("--out", out, "--bundle", folder, "--json", "--workers", count)
    assert ltx_trt("batch", file, *words) == 1
    told = {row["name"]: row for row in rows(capsys)}
    states = {name: row["state"] for name, row in told.items()}
    assert states == {"0000": "made", "0001": "failed", "0002": "made"}
    assert ".0001.lock" in told["0001"]["reason"]


def test_a_job_that_ends_its_worker_before_it_is_begun_is_given_up(
    folder: Path, tmp_path: Path
) -> None:
    (task,) = execution.check(batch_of(folder, many(tmp_path, 1), tmp_path / "out")).tasks
    crew, queue, found = workers.Workers(order_of(folder), Team(1), Ear()), deque([task]), []
    for _ in range(4):
        anything: Any = MagicMock()
        anything.exitcode = -9
        worker = workers._Worker(anything, anything, 0, ready=True)
        crew._workers = [worker]
        crew._give(worker, queue)
        found.append(crew._bury(worker, queue))
    assert found[:3] == [None] * 3
    assert found[3] is not None
    assert found[3].state == "failed"
    assert found[3].reason == (
        "it has ended 3 processes that tried to make it; the last was killed by signal 9"
    )
    assert not queue


def test_what_there_is_to_say_of_memory_is_said_once_for_all_workers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--bundle", folder, "--workers", 2, "--backend", "onnxruntime", "--memory", "auto")
    file, out = many(tmp_path, 4), tmp_path / "out"
    assert ltx_trt("batch", file, "--out", out, *words) == 0
    said = capsys.readouterr().err
    (note,) = [line for line in said.splitlines() if "memory: " in line]
    assert "into 1/4 of the" in note
    assert note.endswith("free to 2 processes")
