"""A file of ranges is read only for the checkpoint that they are of, and whole or not at all."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ltx_engines import hashes
from ltx_engines.errors import UserError
from ltx_export import calibration
from ltx_export.calibration import METADATA, Calibration
from ltx_ref.checkpoint import Header, read_header
from tests.export.conftest import Files

PATHS = ("model.diffusion_model.transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2")
K = 6


@pytest.fixture
def checkpoint(tmp_path: Path) -> Header:
    path = tmp_path / "model.safetensors"
    save_file({f"{name}.weight": np.ones((4, K), np.float32) for name in PATHS}, path)
    return read_header(path)


@pytest.fixture
def done(checkpoint: Header, tmp_path: Path) -> Calibration:
    facts = {
        "format_version": 1,
        "checkpoint": calibration.identity(checkpoint.path),
        "runs": 2,
        "done": 2,
        "prompts": ["a red ball", "ein grüner Ball"],
    }
    ranges = {name: np.arange(i, i + K, dtype=np.float32) for i, name in enumerate(PATHS)}
    return Calibration(tmp_path / "ranges.safetensors", ranges, facts)


def written(found: Calibration, **facts: Any) -> Path:
    calibration.write(replace(found, facts={**found.facts, **facts}))
    return found.path


def with_range(found: Calibration, numbers: NDArray[np.float32]) -> Path:
    calibration.write(replace(found, ranges={**found.ranges, PATHS[1]: numbers}))
    return found.path


def test_what_is_written_is_read(checkpoint: Header, done: Calibration) -> None:
    found = calibration.read(written(done), checkpoint)
    assert found.ranges.keys() == done.ranges.keys()
    assert all(np.array_equal(found.ranges[name], done.ranges[name]) for name in PATHS)
    assert found.facts == done.facts


def test_the_file_is_a_safetensors_one(done: Calibration) -> None:
    found = load_file(written(done))
    assert sorted(found) == sorted(f"{name}.input_amax" for name in PATHS)
    assert np.array_equal(found[f"{PATHS[1]}.input_amax"], done.ranges[PATHS[1]])


def test_a_renamed_checkpoint_is_the_same(checkpoint: Header, done: Calibration) -> None:
    renamed = checkpoint.path.rename(checkpoint.path.with_name("other.safetensors"))
    assert calibration.read(written(done), read_header(renamed)).facts == done.facts


def test_another_checkpoint_is_refused(checkpoint: Header, done: Calibration) -> None:
    path = written(done)
    with checkpoint.path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    with pytest.raises(UserError, match=r"is of model.safetensors with sha256 .*calibrate this"):
        calibration.read(path, read_header(checkpoint.path))


def test_of_a_large_checkpoint_a_sample_is_compared(
    checkpoint: Header, done: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "STAMP_FROM", 10)
    known = calibration.identity(checkpoint.path)
    assert known["sha256"] is None
    path = written(done, checkpoint=known)
    assert calibration.read(path, checkpoint)
    with checkpoint.path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    with pytest.raises(UserError, match="with sample's sha256"):
        calibration.read(path, read_header(checkpoint.path))


def test_an_unfinished_file_is_not_read(checkpoint: Header, done: Calibration) -> None:
    path = written(done, done=1)
    with pytest.raises(UserError, match="is not finished, 1 of 2 runs are done; give ltx-export"):
        calibration.read(path, checkpoint)
    assert calibration.load(path).facts["done"] == 1


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        (np.full(K, np.nan), "has a range that is no finite number from 0"),
        (np.full(K, np.inf), "has a range that is no finite number from 0"),
        (np.full(K, -1.0), "has a range that is no finite number from 0"),
        (np.zeros(K), "has only ever seen zeros"),
        (np.ones(K + 1), "has ranges of 7 inputs, the checkpoint's has 6"),
    ],
)
def test_a_range_that_gives_no_scale_names_its_layer(
    checkpoint: Header, done: Calibration, numbers: NDArray[np.float64], problem: str
) -> None:
    path = with_range(done, numbers.astype(np.float32))
    with pytest.raises(UserError, match=rf"{PATHS[1]} {problem}"):
        calibration.read(path, checkpoint)


def test_an_input_that_is_always_zero_is_no_error(checkpoint: Header, done: Calibration) -> None:
    numbers = np.array([0, 0, 0, 0, 0, 2], np.float32)
    assert np.array_equal(
        calibration.read(with_range(done, numbers), checkpoint).ranges[PATHS[1]], numbers
    )


def test_a_layer_that_the_checkpoint_has_not_is_refused(
    checkpoint: Header, done: Calibration
) -> None:
    calibration.write(replace(done, ranges={"extra": np.ones(3, np.float32)}))
    with pytest.raises(UserError, match="extra has ranges of 3 inputs, the checkpoint's has none"):
        calibration.read(done.path, checkpoint)


def test_a_checkpoint_is_no_calibration(files: Files) -> None:
    with pytest.raises(UserError, match="is no calibration; ltx-export calibrate writes one"):
        calibration.load(files.checkpoint)


@pytest.mark.parametrize(
    "facts",
    [
        "{",
        "[]",
        "{}",
        '{"done": 1, "runs": 0, "checkpoint": {"bytes": 1}, "format_version": 1}',
        '{"done": 1, "runs": 1, "checkpoint": {"bytes": 1}, "format_version": 99}',
        '{"done": 1, "runs": 1, "checkpoint": 3, "format_version": 1}',
        '{"done": 1, "runs": 1, "checkpoint": "bytes", "format_version": 1}',
        '{"done": 1, "runs": 1, "checkpoint": ["bytes"], "format_version": 1}',
    ],
)
def test_other_facts_are_refused(facts: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a.input_amax": np.ones(2, np.float32)}, path, {METADATA: facts})
    with pytest.raises(UserError, match="is not what this ltx-export calibrate writes"):
        calibration.load(path)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("a.weight", np.ones(2, np.float32)),
        ("a.input_amax", np.ones((2, 2), np.float32)),
        ("a.input_amax", np.ones(2, np.float16)),
    ],
)
def test_other_tensors_are_refused(
    name: str, numbers: NDArray[Any], done: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: numbers}, path, {METADATA: json.dumps(dict(done.facts))})
    with pytest.raises(UserError, match=f"{name} is no range of a layer"):
        calibration.load(path)


@pytest.mark.parametrize("size", [0, 8, 100, -1])
def test_a_file_that_is_cut_short_is_to_be_made_again(
    done: Calibration, checkpoint: Header, size: int
) -> None:
    path = written(done)
    path.write_bytes(path.read_bytes()[:size])
    problem = "is cut short, damaged, or no safetensors file; calibrate again with --overwrite"
    with pytest.raises(calibration.DamagedError, match=problem):
        calibration.read(path, checkpoint)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(
    done: Calibration, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = written(done, done=1)

    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr("ltx_export.calibration.os.fsync", fail)
    wanted = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        written(done)
    assert calibration.load(path).facts["done"] == 1
    assert [other.name for other in path.parent.iterdir() if "partial" in other.name] == []


def test_ranges_merge_to_the_larger_of_each() -> None:
    one = {"a": np.array([1, 5], np.float32)}
    other = {"a": np.array([3, 2], np.float32)}
    assert calibration.merged(one, other)["a"].tolist() == [3, 5]
    empty: Mapping[str, NDArray[np.float32]] = {}
    assert calibration.merged(one, empty) is one
    assert calibration.merged(empty, other) is other
    with pytest.raises(ValueError, match="different layers"):
        calibration.merged(one, {"b": other["a"]})


def test_reading_ranges_needs_no_torch() -> None:
    code = "import sys, ltx_export.calibration; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_calibrating_needs_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.check_packages()
    monkeypatch.setattr(calibration, "find_spec", lambda name: None if name == "modelopt" else 1)
    with pytest.raises(UserError, match=r"needs modelopt; pip install 'ltx-trt\[quantize\]'"):
        calibration.check_packages()
