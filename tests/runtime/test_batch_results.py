"""Whatever moment a maker is killed at, a clip is finished as a whole or begins anew."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ltx_engines.errors import UserError
from ltx_trt.batch import results
from ltx_trt.batch.facts import difference
from ltx_trt.batch.results import Finished, Form, Place

FACTS = {"bundle": "b", "format": "mp4", "job": {"prompt": "a", "seed": 1}}
REPORT = {"output": "out/fox.mp4", "sha256": "0"}
CALLS = ("replace", "fsync", "unlink", "rmdir", "mkdir")


class KilledError(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def place(folder: Path, form: Form = "mp4") -> Place:
    return Place(folder, "fox", form)


def make(at: Place, text: str = "frames") -> None:
    results.begin(at, "run")
    clip = at.partial / at.file
    if at.form == "png":
        clip.mkdir()
        (clip / "0000.png").write_text(text)
    else:
        clip.write_text(text)
    results.commit(at, Finished(FACTS, REPORT, "run"))


def kill_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """From the given call of the file system on, none does anything; returns how many there
    were."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > call:
                raise KilledError
            return real(*arguments, **options)

        return wrapper

    for name in CALLS:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return lambda: count


def survives(at: Place, call: int) -> tuple[bool, bool]:
    """Killed after so many calls: was it killed at all, and is it finished then?"""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(call, patch)
        try:
            make(at, "new")
            killed = False
        except KilledError:
            killed = True
    seen = results.find(at)
    if seen is not None and at.report.exists():  # what looks finished, is
        clip = at.clip / "0000.png" if at.form == "png" else at.clip
        assert clip.read_text() in ("new", "old!")
    settled = results.settle(at)
    return killed, settled is not None


@pytest.mark.parametrize(("form", "replaced"), [("mp4", False), ("png", True)])
def test_killed_at_any_call_it_is_finished_or_begins_anew(
    tmp_path: Path, form: Form, replaced: bool
) -> None:
    finished = []
    for call in range(100):
        folder = tmp_path / str(call)
        folder.mkdir()
        at = place(folder, form)
        if replaced:
            make(at, "old!")
        killed, done = survives(at, call)
        finished.append(done)
        if not done:
            assert results.find(at) is None
            results.check_free(at)
            make(at)
        assert results.find(at) is not None
        results.sweep(at)
        assert {path.name for path in folder.iterdir()} == {at.file, "fox.json"}
        if not killed:
            break
    assert finished[-1]
    assert False in finished
    assert killed is False
    last = len(finished) - 1 - finished[::-1].index(False)
    assert all(finished[last + 1 :])
    assert len(finished[last + 1 :]) > 2  # there are moments after the one


def test_a_clip_that_is_gone_or_cut_off_is_not_finished(tmp_path: Path) -> None:
    at = place(tmp_path)
    make(at)
    found = results.find(at)
    assert found is not None
    assert found == Finished(FACTS, REPORT, "run")
    at.clip.write_text("fra")
    assert results.find(at) is None
    at.clip.unlink()
    assert results.find(at) is None


def test_a_missing_frame_makes_a_folder_unfinished(tmp_path: Path) -> None:
    at = place(tmp_path, "png")
    make(at)
    assert results.find(at) is not None
    (at.clip / "0000.png").unlink()
    assert results.find(at) is None


def test_tries_are_counted_within_one_run(tmp_path: Path) -> None:
    at = place(tmp_path)
    assert [results.begin(at, run) for run in ("a", "a", "a", "b", "a")] == [1, 2, 3, 1, 1]


def test_one_claim_at_a_time_and_none_is_left_behind(tmp_path: Path) -> None:
    at = place(tmp_path)
    with results.claim(at) as first, results.claim(at) as second:
        assert (first, second) == (True, False)
        assert at.lock.exists()
    assert not list(tmp_path.iterdir())


def test_what_somebody_is_at_is_not_swept_away(tmp_path: Path) -> None:
    at = place(tmp_path)
    with results.claim(at):
        results.begin(at, "run")
        results.sweep(at)
        assert at.partial.is_dir()
    results.sweep(at)
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    at = place(tmp_path)
    at.clip.write_text("a holiday")
    with pytest.raises(UserError, match="without its report fox"):
        results.check_free(at)
    at.report.write_text("{}")
    with pytest.raises(UserError, match="not the report of a clip"):
        results.check_free(at)


def test_a_folder_is_new_or_empty_or_of_a_batch(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    results.check(folder)
    folder.mkdir()
    results.check(folder)
    (folder / "holiday.mp4").write_text("")
    (folder / "other.json").write_text("[1]")
    with pytest.raises(UserError, match="not an empty folder, nor one of a batch"):
        results.check(folder)
    make(place(folder))
    results.check(folder)
    with pytest.raises(UserError, match="there is no folder"):
        results.check(tmp_path / "nowhere" / "out")
    with pytest.raises(UserError, match="nor one of a batch"):
        results.check(folder / "holiday.mp4")


def test_a_folder_where_a_batch_was_killed_at_once_is_of_a_batch(tmp_path: Path) -> None:
    at = place(tmp_path)
    results.begin(at, "run")
    results.check(tmp_path)
    shutil.rmtree(at.partial)
    at.lock.touch()
    results.check(tmp_path)


def test_the_report_can_be_read_by_others(tmp_path: Path) -> None:
    at = place(tmp_path)
    make(at)
    told = json.loads(at.report.read_text())
    assert told == {
        "format": 2,
        "made_of": FACTS,
        "run": "run",
        "clip": "fox.mp4",
        "bytes": 6,
        "report": REPORT,
    }


def test_a_changed_job_is_told_in_words() -> None:
    now = {**FACTS, "bundle": "c", "job": {"prompt": "a" * 50, "width": 64}}
    assert difference(FACTS, now) == (
        'another bundle, prompt was "a" and is "' + "a" * 36 + "..., seed was 1 and is not said, "
        "width was not said and is 64"
    )


def test_another_form_does_not_hide_nor_delete_a_finished_clip(tmp_path: Path) -> None:
    make(place(tmp_path))
    other = place(tmp_path, "gif")
    assert results.find(other) == Finished(FACTS, REPORT, "run")
    assert results.settle(other) is not None
    assert results.clips(other) == (other.clip, tmp_path / "fox.mp4")
    make(other)  # as --redo does
    assert {path.name for path in tmp_path.iterdir()} == {"fox.gif", "fox.json"}


def test_a_clip_that_was_interrupted_after_its_moment_is_finished_in_its_own_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(results, "_publish", lambda _: None)
        make(place(tmp_path))
    results.sweep(place(tmp_path, "gif"))
    assert {path.name for path in tmp_path.iterdir()} == {"fox.mp4", "fox.json"}
    assert results.find(place(tmp_path)) is not None


def test_a_stranger_of_another_form_is_not_overwritten(tmp_path: Path) -> None:
    make(place(tmp_path))
    (tmp_path / "fox.gif").write_text("a holiday")
    with pytest.raises(UserError, match=r"fox.gif is there without a report of its own"):
        results.check_free(place(tmp_path, "gif"))


def test_a_report_of_format_1_is_read_and_a_later_one_refused(tmp_path: Path) -> None:
    at = place(tmp_path)
    make(at)
    told = json.loads(at.report.read_text())
    at.report.write_text(json.dumps({**told, "format": 3}))
    with pytest.raises(UserError, match=r"is of format 3, this ltx-trt reads up to 2; use"):
        results.find(at)
    del told["clip"]
    at.report.write_text(json.dumps({**told, "format": 1}))
    assert results.find(place(tmp_path, "gif")) == Finished(FACTS, REPORT, "run")
