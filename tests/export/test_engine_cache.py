"""Engines that bundles share: found by their key, never believed, never half there."""

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ltx_engines import hashes
from ltx_engines.cache_key import EngineKey
from ltx_engines.errors import UserError
from ltx_engines.file_entry import FileEntry
from ltx_export import engine_cache
from ltx_export.build_job import Built, Job

KEY = EngineKey(
    stage="transformer",
    graph="0" * 64,
    weights={"w.safetensors": FileEntry(bytes=9, modified_ns=1, sample="1" * 64)},
    profiles=({"tokens": (8, 8, 8)},),
    flavour="tensorrt-rtx",
    version="1.7.1",
    targets=(89, 120),
)


def job(folder: Path) -> Job:
    folder.mkdir(exist_ok=True)
    graph, engine, layers = (folder / name for name in ("x.onnx", "x.engine", "x.layers.json"))
    return Job(graph, engine, layers, "tensorrt-rtx", "1.7.1", (89, 120), (), {})


def built(folder: Path, text: bytes = b"plan") -> tuple[Job, Built]:
    order = job(folder)
    order.engine.write_bytes(text)
    order.layers.write_text("table")
    return order, Built(len(text), hashes.sha256(order.engine), 7)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    engine_cache.keep(folder, KEY, *built(tmp_path / "first"))
    return folder


def test_what_one_bundle_has_built_another_one_links_to(cache: Path, tmp_path: Path) -> None:
    order = job(tmp_path / "second")
    assert engine_cache.take(cache, KEY, order) == built(tmp_path / "third")[1]
    assert order.engine.samefile(tmp_path / "first/x.engine")
    assert order.layers.read_text() == "table"


@pytest.mark.parametrize(
    "change",
    [
        {"graph": "2" * 64},
        {"targets": (89,)},
        {"targets": (89, 120, 121)},
        {"version": "1.8"},
        {"stage": "vae_decoder"},
        {"profiles": ({"tokens": (9, 9, 9)},)},
        {"options": {"optimization level": 1}},
        {"weights": {"w.safetensors": FileEntry(bytes=9, modified_ns=1, sample="3" * 64)}},
    ],
)
def test_another_key_has_another_engine(
    change: dict[str, object], cache: Path, tmp_path: Path
) -> None:
    order = job(tmp_path / "second")
    assert engine_cache.take(cache, KEY.model_copy(update=change), order) is None
    assert not order.engine.exists()


def test_hashed_weights_are_the_same_as_when_nobody_had_read_them(
    cache: Path, tmp_path: Path
) -> None:
    """As after `ltx-export seal`."""
    sealed = FileEntry(bytes=9, sha256="4" * 64, sample="1" * 64)
    key = KEY.model_copy(update={"weights": {"w.safetensors": sealed}})
    assert engine_cache.take(cache, key, job(tmp_path / "second")) is not None


def flip(cache: Path) -> None:
    (file,) = cache.glob("*.engine")
    file.write_bytes(b"plam")


def forget(cache: Path) -> None:
    (file,) = cache.glob("*.layers.json")
    file.unlink()


def scribble(cache: Path) -> None:
    note(cache).write_text('{"format_version": 1}')


def age(cache: Path) -> None:
    said = json.loads(note(cache).read_bytes())
    note(cache).write_text(json.dumps(said | {"format_version": 99}))


def note(cache: Path) -> Path:
    (file,) = (f for f in cache.glob("*.json") if not f.name.endswith(".layers.json"))
    return file


@pytest.mark.parametrize("harm", [flip, forget, scribble, age])
def test_what_is_not_whole_is_dropped_and_can_be_kept_anew(
    harm: Callable[[Path], None], cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm(cache)
    order = job(tmp_path / "second")
    assert engine_cache.take(cache, KEY, order) is None
    assert not order.engine.exists()
    assert not list(cache.iterdir())
    assert "is dropped and built again" in caplog.text
    engine_cache.keep(cache, KEY, *built(tmp_path / "third"))
    assert engine_cache.take(cache, KEY, order) is not None


def test_an_engine_whose_note_was_never_written_is_not_there(cache: Path, tmp_path: Path) -> None:
    note(cache).unlink()  # killed before it
    assert engine_cache.take(cache, KEY, job(tmp_path / "second")) is None
    engine_cache.keep(cache, KEY, *built(tmp_path / "third", b"newer"))
    order = job(tmp_path / "fourth")
    assert engine_cache.take(cache, KEY, order) is not None
    assert order.engine.read_bytes() == b"newer"
    assert not list(cache.glob(".*"))
    assert (tmp_path / "first/x.engine").read_bytes() == b"plan"


def test_another_file_system_gets_a_copy(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    caplog.set_level(logging.INFO)
    order = job(tmp_path / "second")
    assert engine_cache.take(cache, KEY, order) is not None
    assert order.engine.read_bytes() == b"plan"
    assert not order.engine.samefile(tmp_path / "first/x.engine")
    assert "copying" in caplog.text


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot keep an engine in .*; give another --cache"):
        engine_cache.keep(tmp_path / "file", KEY, *built(tmp_path / "first"))
