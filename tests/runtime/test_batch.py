"""Jobs become clips, each the very one of a single run, however often the batch is killed."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ltx_engines.errors import UserError
from ltx_trt import job
from ltx_trt.batch import asking, execution, facts, maker, results
from ltx_trt.batch.jobs import Job
from ltx_trt.batch.workers import Team
from ltx_trt.job import Clip, Report, Voice
from ltx_trt.session.bundle_stages import Stages
from tests.runtime.batches import batch_of, ltx_trt, names, rows

pytest.importorskip("onnxruntime")

MakeBundle = Callable[..., Path]


@pytest.fixture
def folder(make_bundle: MakeBundle) -> Path:
    return make_bundle()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("# two\nw5 w9\nw7\n")
    return file


def test_a_batch_makes_what_single_runs_make_with_seeds_that_count_up(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--bundle", folder, "--num-inference-steps", 2, "--json")
    assert ltx_trt("batch", "--prompts", prompts, "-o", out, "--seed", 7, *words) == 0
    made = rows(capsys)
    assert [row["output"] for row in made] == [str(out / "0000.mp4"), str(out / "0001.mp4")]
    for row, (prompt, seed) in zip(made, (("w5 w9", 7), ("w7", 8)), strict=True):
        single = tmp_path / f"{seed}.mp4"
        assert ltx_trt("run", "--prompt", prompt, "-o", single, "--seed", seed, *words) == 0
        (alone,) = rows(capsys)
        assert (row["seed"], row["sha256"]) == (seed, alone["sha256"])
        assert Path(row["output"]).read_bytes() == single.read_bytes()
    assert made[0]["sha256"] != made[1]["sha256"]


def test_lossless_frames_are_the_frames_of_the_hash(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hashlib import sha256

    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "out"
    words = ("--bundle", folder, "--format", "png", "--num-frames", 9, "--json")
    assert ltx_trt("batch", "--prompts", prompts, "-o", out, *words) == 0
    for row in rows(capsys):
        paths = sorted(Path(row["output"]).iterdir())
        frames = np.stack([np.asarray(image.open(path)) for path in paths])
        assert len(frames) == 9
        assert row["sha256"] == sha256(frames.tobytes()).hexdigest()


def test_a_note_that_is_true_of_several_clips_is_said_once_and_names_them(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--bundle", folder, "--width", 50, "--format", "gif")
    assert ltx_trt("batch", "--prompts", prompts, "-o", tmp_path / "out", *words) == 0
    captured = capsys.readouterr()
    first, *others = [line for line in captured.err.splitlines() if "are cut out of" in line]
    note = "9 frames of 32 x 50 (height x width) are cut out of 9 of 32 x 64"
    assert first == f"ltx-trt: 0000: {note}"
    assert others == [f"ltx-trt: the same of 0001: {note}"]
    assert captured.out.count("frames of 50 x 32") == 2


def test_a_note_on_one_clip_names_its_job_and_one_on_many_counts_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, Any]] = [{"name": "fox", "prompt": "w5"}]
    lines += [{"name": f"odd{index}", "prompt": "w5", "width": 50} for index in range(8)]
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    out = tmp_path / "out"
    assert ltx_trt("batch", jobs, "-o", out, "--bundle", folder, "--workers", 2) == 0
    told = capsys.readouterr().err
    assert "fox" not in told
    assert re.search(r"^ltx-trt: odd\d: 9 frames of 32 x 50", told, re.MULTILINE)
    assert re.search(r"^ltx-trt: the same of (odd\d, ){4}odd\d and 2 more: 9", told, re.MULTILINE)
    assert told.count("are cut out of") == 2


def test_the_pictures_of_a_finished_job_are_not_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(photo)
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    line = {"prompt": "w5", "image": [str(photo)], "name": "fox"}
    jobs.write_text(json.dumps(line), encoding="utf-8")
    batch = batch_of(folder, jobs, out)
    (wished,) = batch.jobs
    asked: list[str] = []

    def request(job: Job, *_: object) -> None:
        asked.append(job.name)
        raise UserError("its picture was read")

    monkeypatch.setattr(asking, "request", request)
    with pytest.raises(UserError, match="1: its picture was read"):
        execution.check(batch)
    out.mkdir()
    made_of = facts.of_job(wished, "mp4", facts.shared(folder, None, ()), folder)
    place = results.Place(out, "fox", "mp4")
    results.begin(place, "run")
    (place.partial / place.file).write_bytes(b"a clip")
    results.commit(place, results.Finished(made_of, {}, "run"))
    planned = execution.check(batch)
    assert (planned.tasks, [outcome.name for outcome in planned.skipped]) == ((), ["fox"])
    assert asked == ["fox"]
    Image.fromarray(np.ones((32, 64, 3), np.uint8)).save(photo)
    with pytest.raises(UserError, match="made otherwise: other contents of a file"):
        execution.check(batch)
    with pytest.raises(UserError, match="its picture was read"):
        execution.check(replace(batch, redo=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--width", "33"), "mp4 needs an even width"),
        (("--prompts", "none.txt"), "none.txt: No such file"),
        (("--seed", str(2**64 - 1)), "seed must be from 0 to 2^64 - 1"),
        (("--pipeline-config", "none.yaml"), "none.yaml"),
        (("-o", "prompts.txt"), "prompts.txt is there and not an empty folder"),
        (("-o", "bundle"), "bundle is there and not an empty folder"),
        (("-o", "nowhere/out"), "there is no folder"),
        (("--format", "avi"), "--format"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_nothing_is_written(
    folder: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("batch", "--bundle", folder, "--prompts", prompts, "-o", "out", *words)
    assert ltx_trt(*arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert said in captured.err
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "prompts.txt"}


def test_what_is_finished_stays_when_a_later_clip_is_interrupted(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = job.make
    made: list[Clip] = []

    def stop_at_the_second(clip: Clip, stages: Stages, voice: Voice) -> Report:
        if made:
            raise KeyboardInterrupt
        made.append(clip)
        return real(clip, stages, voice)

    monkeypatch.setattr(maker, "make", stop_at_the_second)
    out = tmp_path / "out"
    assert ltx_trt("batch", "--bundle", folder, "--prompts", prompts, "-o", out) == 130
    assert names(out) == {"0000.mp4", "0000.json"}
    assert ltx_trt("batch", "--bundle", folder, "--prompts", prompts, "-o", tmp_path / "b") == 130
    assert not (tmp_path / "b").exists()


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """Three clips of two shapes: the shapes take turns."""
    file = tmp_path / "jobs.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "w5 w9", "seed": 1, "name": "one"},
        {"prompt": "w6", "num_frames": 17, "guidance_scale": 3},
        {"prompt": "w7", "num_inference_steps": 2, "name": "three"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_each_job_is_the_clip_of_its_own_run_and_shapes_are_made_together(
    folder: Path, jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, single = tmp_path / "out", tmp_path / "single.gif"
    words = ("--bundle", folder, "--json")
    assert ltx_trt("batch", jobs, "--out", out, "--format", "gif", *words) == 0
    made = rows(capsys)
    assert [row["name"] for row in made] == ["one", "three", "0001"]
    assert {row["state"] for row in made} == {"made"}
    options = ("--num-frames", 17, "--guidance-scale", 3)
    assert ltx_trt("run", "--prompt", "w6", "-o", single, *options, *words) == 0
    (alone,) = rows(capsys)
    assert alone["sha256"] == made[2]["sha256"]
    assert single.read_bytes() == (out / "0001.gif").read_bytes()
    written = {f"{row['name']}.{end}" for row in made for end in ("gif", "json")}
    assert names(out) == written


def test_given_again_it_makes_what_is_missing_and_nothing_else(
    folder: Path, jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("batch", jobs, "--out", out, "--bundle", folder)
    assert ltx_trt(*command) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 jobs: 3 made in ")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "three.mp4").unlink()
    assert ltx_trt(*command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(str(out / "three.mp4"))
    assert printed[1].startswith("3 jobs: 1 made, 2 there already in ")
    kept = {path: time for path, time in before.items() if path.stem != "three"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert names(out) == {path.name for path in before}


def test_a_changed_job_is_refused_before_any_work_and_made_again_if_that_is_wished(
    folder: Path, jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("batch", jobs, "--out", out, "--bundle", folder, "--json")
    assert ltx_trt(*command) == 0
    before = {row["name"]: row["sha256"] for row in rows(capsys)}
    jobs.write_text(jobs.read_text().replace('"seed": 1', '"seed": 2'))
    (out / "three.mp4").unlink()
    assert ltx_trt(*command) == 2
    said = capsys.readouterr().err
    assert "jobs.jsonl:1: " in said
    assert "one.mp4 is finished, but was made otherwise: seed was 1 and is 2; --redo" in said
    assert not (out / "three.mp4").exists()
    assert ltx_trt(*command, "--redo") == 0
    now = {row["name"]: (row["state"], row["sha256"]) for row in rows(capsys)}
    assert now["0001"] == ("skipped", before["0001"])
    assert now["three"] == ("made", before["three"])
    assert now["one"][0] == "made"
    assert now["one"][1] != before["one"]


def test_another_bundle_is_told_apart_and_engines_are_not(
    make_bundle: MakeBundle, jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = make_bundle(), tmp_path / "out"
    command = ("batch", jobs, "--out", out, "--bundle", bundle)
    assert ltx_trt(*command) == 0
    file = bundle / "manifest.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "toolchain": {"onnx": "another"}}))
    assert ltx_trt(*command) == 0
    told["defaults"]["guidance_scale"] = 4.0
    file.write_text(json.dumps(told))
    capsys.readouterr()
    assert ltx_trt(*command) == 2
    assert "was made otherwise: another bundle; --redo" in capsys.readouterr().err


def test_a_failed_job_does_not_end_the_others_and_is_made_later(
    folder: Path,
    jobs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, real = tmp_path / "out", job.make
    command = ("batch", jobs, "--out", out, "--bundle", folder, "--json")

    def fails(clip: Clip, stages: Stages, voice: Voice) -> Report:
        if clip.request.prompt == "w5 w9":
            raise RuntimeError("the first one\nfails")
        return real(clip, stages, voice)

    monkeypatch.setattr(maker, "make", fails)
    assert ltx_trt(*command) == 1
    captured = capsys.readouterr()
    told = [json.loads(line) for line in captured.out.splitlines()]
    assert [(row["name"], row["state"]) for row in told] == [
        ("one", "failed"),
        ("three", "made"),
        ("0001", "made"),
    ]
    assert told[0]["reason"] == "the first one fails"
    last = captured.err.splitlines()[-2:]
    assert last[0] == f"ltx-trt: {jobs}:1 (one): the first one fails"
    assert last[1].startswith("ltx-trt: 3 jobs: 2 made, 1 failed in ")
    assert names(out) == {"three.mp4", "three.json", "0001.mp4", "0001.json"}
    monkeypatch.undo()
    assert ltx_trt(*command) == 0
    assert [row["state"] for row in rows(capsys)] == ["skipped", "skipped", "made"]


def test_a_job_that_ends_its_process_each_time_fails_in_the_end(
    folder: Path, jobs: Path, tmp_path: Path
) -> None:
    planned = execution.check(batch_of(folder, jobs, tmp_path / "out"))
    (tmp_path / "out").mkdir()
    task = planned.tasks[0]
    for _ in range(maker.MOST_TRIES):
        results.begin(task.place, planned.order.run)
    outcome = maker.Maker(planned.order).one(task)
    assert (outcome.state, outcome.name) == ("failed", "one")
    assert "ended 3 processes" in outcome.reason
    assert not list((tmp_path / "out").iterdir())


def test_what_another_command_is_at_is_waited_for_and_not_made_twice(
    folder: Path, jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this one waits, the other finishes its job."""
    out = tmp_path / "out"
    mine = execution.check(batch_of(folder, jobs, out))
    other = execution.check(batch_of(folder, jobs, out))
    out.mkdir()
    with ExitStack() as held:
        assert held.enter_context(results.claim(other.tasks[0].place))
        waited: list[float] = []

        def wait(seconds: float) -> None:
            waited.append(seconds)
            held.close()
            with maker.Maker(other.order) as there:
                assert there.one(other.tasks[0]).state == "made"

        monkeypatch.setattr(execution, "sleep", wait)
        outcomes = list(execution.execute(mine, Team(1), Voice()))
    assert waited == [execution.PAUSE]
    assert [(one.name, one.state) for one in outcomes] == [
        ("three", "made"),
        ("0001", "made"),
        ("one", "skipped"),
    ]


def test_a_clip_that_is_made_again_is_not_made_of_itself(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was removed first, by --redo."""
    out = tmp_path / "out"
    assert ltx_trt("batch", "--prompts", prompts, "--out", out, "--bundle", folder) == 0
    before = (out / "0000.mp4").read_bytes()
    again = {"prompt": "w5", "name": "0000", "video": [str(out / "0000.mp4")], "resize": True}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(again))
    command = ("batch", tmp_path / "jobs.jsonl", "--out", out, "--bundle", folder, "--redo")
    assert ltx_trt(*command) == 2
    assert "0000.mp4 is read for the clip that would replace it" in capsys.readouterr().err
    assert (out / "0000.mp4").read_bytes() == before


def test_another_format_is_a_changed_job(
    folder: Path, jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was made a second time, and left the first one without a report."""
    out = tmp_path / "out"
    command = ("batch", jobs, "--out", out, "--bundle", folder)
    assert ltx_trt(*command) == 0
    before = names(out)
    capsys.readouterr()
    assert ltx_trt(*command, "--format", "gif") == 2
    said = capsys.readouterr().err
    assert 'one.mp4 is finished, but was made otherwise: format was "mp4" and is "gif"' in said
    assert names(out) == before
    assert ltx_trt(*command, "--format", "gif", "--redo") == 0
    assert names(out) == {
        f"{name}.{end}" for name in ("one", "0001", "three") for end in ("gif", "json")
    }


BAD = '{"prompt": "w5"}\n{"prompt": "w6", %s}\n'


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        (BAD % '"heigth": 32', (), "jobs.jsonl:2: unknown key heigth; did you mean 'height'?"),
        (BAD % '"width": 33', (), "jobs.jsonl:2: mp4 needs an even width"),
        (BAD % '"seed": -1', (), "jobs.jsonl:2: seed must be from 0"),
        (BAD % '"sampler": "eul"', (), "jobs.jsonl:2: unknown sampler 'eul'"),
        (BAD % '"num_inference_steps": 0', (), "jobs.jsonl:2: "),
        (BAD % '"image": ["fox.png@8"]', (), "jobs.jsonl:2: there is no file fox.png"),
        (BAD % '"image": ["jobs.jsonl"]', (), "jobs.jsonl:2: jobs.jsonl is no image"),
        (BAD % '"image": "fox.png"', (), "jobs.jsonl:2: image should be a valid"),
        (
            BAD % '"cache_steps": "easycache:0.1", "cache_table": "nope.json"',
            (),
            "jobs.jsonl:2: nope.json: No such file",
        ),
        (BAD % '"input_video": "fox.mp4"', (), "jobs.jsonl:2: there is no file fox.mp4"),
        (BAD % '"preset": "ltxv-2b-0.8"', (), "jobs.jsonl:2: "),
        (BAD % '"cache_steps": "magic"', (), "jobs.jsonl:2: "),
        (BAD % '"strict_shape": true, "num_frames": 10', (), "jobs.jsonl:2: "),
        ('{"prompt": ""}', (), "jobs.jsonl:1: the prompt is empty"),
        ("", (), "has no jobs"),
        ('{"prompt": "w5"}', ("--prompts", "jobs.jsonl"), "name one file"),
        ('{"prompt": "w5"}', ("--out", "bundle"), "bundle is there and not an empty folder"),
        ('{"prompt": "w5"}', ("--out", "/proc/none"), "/proc"),
        ('{"prompt": "w5"}', ("--gpus", "0;1"), "--gpus should be numbers with commas"),
        ('{"prompt": "w5"}', ("--ray", "--gpus", "0"), "--gpus is of workers of this machine"),
        ('{"prompt": "w5"}', ("--bundle", "out"), "out"),
    ],
)
def test_a_wrong_job_costs_one_line_before_anything_is_read(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text(text)

    def unread(*_: object, **__: object) -> Any:
        raise AssertionError("the model is not read before all jobs are right")

    monkeypatch.setattr(maker, "open_stages", unread)
    assert ltx_trt("batch", "jobs.jsonl", "--bundle", folder, "--out", "out", *words) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert said in captured.err
    assert names(tmp_path) == {"bundle", "jobs.jsonl"}
