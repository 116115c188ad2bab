"""A file of jobs is right in every line, or one line of the terminal says which is not."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from ltx_engines import pipeline_config, presets
from ltx_engines.errors import UserError
from ltx_trt import SEED
from ltx_trt.batch import asking, facts, jobs
from ltx_trt.cache_options import CacheWishes
from ltx_trt.request import Wishes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "jobs.jsonl"


def test_a_job_wishes_what_its_line_says_and_of_the_rest_what_the_command_line_says(
    file: Path,
) -> None:
    file.write_text(
        '{"prompt": "a", "width": 64, "name": "fox"}\n\n{"prompt": "b", "height": null}\n'
    )
    first, second = jobs.read(file, {"width": 32, "seed": 5})
    assert (first.name, first.wishes) == ("fox", Wishes("a", width=64, seed=5))
    assert (second.name, second.wishes) == ("0001", Wishes("b", width=32, seed=5))
    assert (first.where, second.where) == (f"{file}:1", f"{file}:3")


def test_whatever_a_clip_can_be_asked_for_is_a_key_of_a_job() -> None:
    assert {field.name for field in fields(Wishes)} < jobs.LINE.model_fields.keys()


def test_prompts_have_seeds_that_count_up(file: Path) -> None:
    made = jobs.of_prompts(file, ("a", "b"), {"seed": 7, "height": 64})
    assert [(job.name, job.wishes) for job in made] == [
        ("0000", Wishes("a", seed=7, height=64)),
        ("0001", Wishes("b", seed=8, height=64)),
    ]


FOX = '{"prompt": "a fox"}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "jobs.jsonl has no jobs; write one on each line"),
        (" \n\n", "jobs.jsonl has no jobs"),
        (FOX + '{"prompt": "b", "sed": 3}', "jobs.jsonl:2: unknown key sed; did you mean 'seed'?"),
        ('{"seed": 3}', "jobs.jsonl:1: missing key prompt"),
        (FOX + "\n{prompt: 1}", "jobs.jsonl:3: not JSON: Expecting property name"),
        ("a fox in the snow", "jobs.jsonl:1: not JSON"),
        ('["a fox"]', "jobs.jsonl:1: a job is an object"),
        ('{"prompt": 3}', "jobs.jsonl:1: prompt should be a valid string, not 3"),
        ('{"prompt": "a", "seed": "7"}', "jobs.jsonl:1: seed should be a valid integer, not '7'"),
        ('{"prompt": "a", "width": 64.5}', "jobs.jsonl:1: width should be a valid integer"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', "the key 'seed' is there twice"),
        ('{"prompt": "a", "frame_rate": NaN}', "NaN is no number of JSON"),
        ('{"prompt": "a", "name": "../a"}', "name should be 1 to 100 letters, digits, - and _"),
        ('{"prompt": "a", "name": "a.mp4"}', "not 'a.mp4'"),
        ('{"prompt": "a", "name": ""}', "name should be 1 to 100 letters"),
        (
            '{"prompt": "a", "name": "fox"}\n{"prompt": "b", "name": "Fox"}',
            "jobs.jsonl:2: the name 'Fox' is that of line 1 already",
        ),
        (FOX + '{"prompt": "a", "name": "0000"}', "the name '0000' is that of line 1 already"),
        ("[" * 100_000, "jobs.jsonl:1: "),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(
    file: Path, text: str, said: str
) -> None:
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        jobs.read(file, {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(file: Path) -> None:
    file.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match="not a text in UTF-8"):
        jobs.read(file, {})


def test_a_mark_of_the_byte_order_and_windows_lines_are_read(file: Path) -> None:
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [job.wishes.prompt for job in jobs.read(file, {})] == ["a", "b"]


def test_keys_of_a_job_go_back_to_json(file: Path) -> None:
    file.write_text('{"prompt": "a", "guidance_scale": 3}\n')
    (job,) = jobs.read(file, {})
    assert json.loads(json.dumps(job.keys)) == {"prompt": "a", "guidance_scale": 3}


def test_a_picture_that_has_changed_makes_another_clip(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    job = jobs.Job("fox", "jobs.jsonl:1", {"prompt": "a", "image": [f"{photo}@8:0.5"]})
    Image.new("RGB", (8, 8)).save(photo)
    before = facts.of_job(job, "mp4", {"bundle": "b"}, Path("b"))
    assert before == facts.of_job(job, "mp4", {"bundle": "b"}, Path("b"))
    Image.new("RGB", (8, 8), "red").save(photo)
    now = facts.of_job(job, "mp4", {"bundle": "b"}, Path("b"))
    assert facts.difference(before, now) == "other contents of a file that it names"


def test_a_job_says_how_steps_are_cached(file: Path) -> None:
    file.write_text('{"prompt": "a", "cache_steps": "easycache:0.1", "cache_table": "t.json"}\n')
    (job,) = jobs.read(file, {})
    assert job.cache == CacheWishes("easycache:0.1", Path("t.json"))
    assert list(asking.files(job)) == [Path("t.json")]


def test_a_jobs_own_preset_comes_before_that_of_all() -> None:
    every = presets.named("ltxv-2b-0.9.5")
    plain = jobs.Job("fox", "1", {"prompt": "a"})
    own = jobs.Job("fox", "1", {"prompt": "a", "preset": "ltxv-2b-0.9.6-distilled"})
    assert asking.config_of(plain, None) is None
    assert asking.config_of(plain, every) == pipeline_config.load(every)
    assert asking.config_of(own, every) == asking.config_of(own, None)
    assert asking.config_of(own, every) != asking.config_of(plain, every)


def test_a_name_too_long_for_the_disk_is_refused(file: Path) -> None:
    name = "\u4f60" * 78
    file.write_text(json.dumps({"prompt": "a", "name": name[:77]}))
    assert jobs.read(file, {})[0].name == name[:77]
    file.write_text(json.dumps({"prompt": "a", "name": name}))
    with pytest.raises(UserError, match=r"jobs.jsonl:1: name should be of 233 bytes at most"):
        jobs.read(file, {})


def test_half_a_character_is_refused_in_words(file: Path) -> None:
    file.write_text('{"prompt": "\\ud83d\\ude00"}\n{"prompt": "a \\ud800"}\n')
    with pytest.raises(UserError, match=r"jobs.jsonl:2: half of a character"):
        jobs.read(file, {})


def test_a_default_that_is_said_is_no_change() -> None:
    plain, said = (
        facts.of_job(jobs.Job("fox", "1", {"prompt": "a", **more}), "mp4", {}, Path("b"))
        for more in ({}, {"seed": SEED, "image": [], "resize": False})
    )
    other = facts.of_job(jobs.Job("fox", "1", {"prompt": "a", "seed": 1}), "mp4", {}, Path("b"))
    assert facts.difference(plain, said) == ""
    assert facts.difference(plain, other) == "seed was not said and is 1"


def test_the_bundles_own_cache_table_is_part_of_what_a_clip_is_made_of(tmp_path: Path) -> None:
    job = jobs.Job("fox", "1", {"prompt": "a", "cache_steps": "magcache"})
    table = tmp_path / "step_cache.json"
    table.write_text("1")
    before = facts.of_job(job, "mp4", {}, tmp_path)
    table.write_text("2")
    now = facts.of_job(job, "mp4", {}, tmp_path)
    assert facts.difference(before, now) == "another step_cache.json in the bundle"
    plain = jobs.Job("fox", "1", {"prompt": "a", "cache_steps": "easycache"})
    assert "cache table" not in facts.of_job(plain, "mp4", {}, tmp_path)


def test_an_unknown_preset_is_told_the_nearest_one() -> None:
    job = jobs.Job("fox", "1", {"prompt": "a", "preset": "ltxv-2b-0.9.55"})
    with pytest.raises(UserError, match=r"did you mean 'ltxv-2b-0.9.5'"):
        asking.config_of(job, None)
