"""A table of step caching: of one checkpoint and one schedule, written whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ltx_engines.bundle import Bundle, FileEntry
from ltx_engines.errors import UserError
from ltx_trt import cache_table
from ltx_trt.cache_table import Polynomial
from tests.runtime.test_step_caching import CHECKPOINT, MANIFEST, SIGMAS, STEPS, WALK, table


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    cache_table.write(table(), tmp_path / "table.json")
    assert cache_table.read(tmp_path / "table.json") == table()
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_failure_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        cache_table.write(table(), path)
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sigma": []}, "unknown key sigma; did you mean 'sigmas'"),
        ({"layouts": ["text"]}, f"should have {STEPS} entries, as sigmas has"),
        ({"format_version": 2}, "format_version should be 1"),
        ({"sampler": 7}, "sampler should be a valid string"),
    ],
)
def test_a_table_that_was_spoilt_is_one_line(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table().model_dump(mode="json") | change))
    with pytest.raises(UserError) as told:
        cache_table.read(path)
    assert str(told.value).startswith(str(path))
    assert said in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff\xfe\x00", b"{"])
def test_what_is_no_table_is_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match="calibrate-cache") as told:
        cache_table.read(path)
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="No such file"):
        cache_table.read(tmp_path / "no.json")


def test_a_table_of_another_checkpoint_is_refused_by_name() -> None:
    other = table(checkpoint=FileEntry(bytes=4, sha256="b" * 64), checkpoint_name="other.st")
    with pytest.raises(UserError, match=r"of another checkpoint \(other.st, sha256 bbbb") as told:
        other.check(WALK, MANIFEST)
    assert "by-hand.safetensors, sha256 aaaa" in str(told.value)


@pytest.mark.parametrize(
    ("theirs", "same"), [("c" * 64, True), ("d" * 64, False)], ids=["same", "another"]
)
def test_a_checkpoint_that_nobody_has_hashed_is_known_by_a_sample(theirs: str, same: bool) -> None:
    """The time of its last change is of the machine that calibrated."""
    measured = table(checkpoint=FileEntry(bytes=4, sample="c" * 64))
    here = FileEntry(bytes=4, sample=theirs, modified_ns=17)
    bundle = MANIFEST.model_copy(update={"files": {"by-hand.safetensors": here}})
    if same:
        measured.check(WALK, bundle)
        return
    with pytest.raises(UserError, match=r"sample cccccccccccc.*sample dddddddddddd"):
        measured.check(WALK, bundle)


def test_what_is_written_of_a_checkpoint_knows_it_again_before_and_after_it_is_sealed(
    bundle: Bundle,
) -> None:
    entry = cache_table.checkpoint_of(bundle)
    here = bundle.manifest.files[bundle.manifest.checkpoint]
    assert entry.sha256 == here.sha256
    unhashed = FileEntry(bytes=entry.bytes, sample=entry.sample, modified_ns=5)
    assert entry.is_same(here)
    assert entry.is_same(unhashed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sigmas": SIGMAS[:15], "layouts": WALK.layouts[:15]}, "of 20 steps, the run has 15"),
        ({"sigmas": (*SIGMAS[:-1], 0.03)}, "of another schedule: noise level 0.0500 at step 20"),
        ({"sampler": "ddim"}, "of the sampler 'euler', the run has 'ddim'"),
        ({"layouts": (*WALK.layouts[:-1], "text")}, "branches 'uncond text', the run has 'text'"),
    ],
)
def test_a_table_of_another_schedule_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"{said}.*calibrate-cache.*easycache"):
        table().check(replace(WALK, **change), MANIFEST)
    table().check(WALK, MANIFEST)


def test_what_may_cost_quality_is_said() -> None:
    clips = table().clips
    assert table().differences(clips) == ()
    other = clips.model_copy(update={"width": 96, "guidance_scale": 4.0, "loras": ("a.st",)})
    size, guidance, lora = table().differences(other)
    assert "9 frames of 64 x 32" in size
    assert "guidance_scale 2" in guidance
    assert "no LoRA" in lora


@pytest.mark.parametrize(("r2", "said"), [(0.9, ""), (0.2, "R2 0.20"), (None, "no correlation")])
def test_a_bad_fit_is_said(r2: float | None, said: str) -> None:
    words = {"distances": (0.0,), "coefficients": (1.0,), "pearson": None, "points": 1}
    found = Polynomial.model_validate(words | {"r2": r2}).doubt()
    assert (said in found) if said else found == ""


def test_a_change_is_never_expected_below_zero() -> None:
    fit = table().teacache.model_copy(
        update={"coefficients": (2.0, -1.0), "distances": (0.0, 0.25, 2.0)}
    )
    assert fit.changes() == (1.0, 0.5, 3.0)
    assert CHECKPOINT.sha256 is not None
