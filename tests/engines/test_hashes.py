import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ltx_engines import hashes
from ltx_engines.hashes import verify
from tests.waiting import until

WANTED = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "ltx.safetensors").write_bytes(b"weights")
    return tmp_path / "ltx.safetensors"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read; seven bytes count as large."""
    files: list[Path] = []
    real = hashes.sha256

    def spy(path: Path) -> str:
        files.append(path)
        return real(path)

    monkeypatch.setattr(hashes, "sha256", spy)
    monkeypatch.setattr(hashes, "STAMP_FROM", 7)
    return files


def test_a_large_file_is_read_once(file: Path, cache: Path, read: list[Path]) -> None:
    for _ in range(3):
        assert verify(file, WANTED, cache) == WANTED
    assert read == [file]


def test_a_small_file_is_read_each_time(
    file: Path, cache: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "STAMP_FROM", 8)
    for _ in range(3):
        assert verify(file, WANTED, cache) == WANTED
    assert read == [file] * 3
    assert not cache.exists()


def test_a_stamp_says_what_was_verified(file: Path, cache: Path, read: list[Path]) -> None:
    verify(file, WANTED, cache)
    [note] = (cache / "verified").iterdir()
    assert json.loads(note.read_bytes()) == {
        "path": os.path.realpath(file),
        "size": 7,
        "mtime_ns": file.stat().st_mtime_ns,
        "ctime_ns": file.stat().st_ctime_ns,
        "inode": file.stat().st_ino,
        "sha256": WANTED,
    }


def wait_for_another_time(file: Path) -> None:
    """Until what is written now is told apart by its time: some systems' clocks of files tick a few
    milliseconds, in which no large file is verified, and these seven bytes are."""
    other = file.with_name("clock")

    def ticked() -> bool:
        other.write_bytes(b"")
        return other.stat().st_ctime_ns > file.stat().st_ctime_ns

    until(ticked, "another time of a file")


def overwrite(file: Path) -> None:
    file.write_bytes(b"WEIGHTS")


def replace(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"WEIGHTS")
    os.replace(other, file)


def overwrite_and_turn_back_the_clock(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [overwrite, replace, overwrite_and_turn_back_the_clock])
def test_a_stamp_does_not_hide_a_change(
    file: Path, cache: Path, read: list[Path], change: Callable[[Path], None]
) -> None:
    assert verify(file, WANTED, cache) == WANTED
    wait_for_another_time(file)
    change(file)
    for _ in range(2):  # a failure is not remembered
        assert verify(file, WANTED, cache) == hashlib.sha256(b"WEIGHTS").hexdigest()


def test_a_write_while_the_file_is_read_is_not_stamped(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_then_be_overwritten(path: Path) -> str:
        path.write_bytes(b"longer than before")
        return WANTED

    monkeypatch.setattr(hashes, "STAMP_FROM", 7)
    monkeypatch.setattr(hashes, "sha256", read_then_be_overwritten)
    verify(file, WANTED, cache)
    assert not cache.exists()


def test_a_stamp_vouches_for_the_hash_that_was_wanted_and_no_other(
    file: Path, cache: Path, read: list[Path]
) -> None:
    verify(file, WANTED, cache)
    assert verify(file, "0" * 64, cache) == WANTED
    assert read == [file] * 2


def test_files_of_one_name_do_not_share_a_stamp(file: Path, cache: Path, read: list[Path]) -> None:
    twin = file.parent / "other" / file.name
    twin.parent.mkdir()
    twin.write_bytes(b"WEIGHTS")
    verify(file, WANTED, cache)
    assert verify(twin, WANTED, cache) != WANTED


def test_a_broken_stamp_only_costs_time(file: Path, cache: Path, read: list[Path]) -> None:
    verify(file, WANTED, cache)
    [note] = (cache / "verified").iterdir()
    note.write_bytes(b"\xff")
    assert verify(file, WANTED, cache) == WANTED
    assert read == [file] * 2
    assert list((cache / "verified").iterdir()) == [note], "nothing is left behind"


def test_a_cache_that_cannot_be_written_is_a_warning(
    file: Path, cache: Path, read: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_bytes(b"a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert verify(file, WANTED, cache) == WANTED
    assert "cannot remember which files are intact" in caplog.text
