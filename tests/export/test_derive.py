"""Files made from files: announced before they are there, complete or absent, and made once."""

import errno
import hashlib
import logging
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_engines.bundle import Precision
from ltx_engines.errors import UserError
from ltx_export import cli, derive, lora_fit, weight_cache
from ltx_export.derive import Progress
from ltx_export.weight_cache import Cleared, Derivation, Entry
from ltx_ref import casts
from ltx_ref.checkpoint import CheckpointError, Header, TensorInfo, read_header
from ltx_ref.lora import Adapter, Wish
from tests.export import loras
from tests.export.generators import finish

PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "bfloat16")
WEIGHT = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture
def source(tmp_path: Path) -> Header:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.weight": torch.randn(5, 7, generator=generator).bfloat16(),
        "a.weight": torch.randn(3, generator=generator),
        WEIGHT: torch.randn(6, 4, generator=generator),
        "eight.weight": torch.randn(3, 3, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(1000.0, dtype=torch.float16),
        "empty": torch.ones(0, 4),
        "steps": torch.arange(4),
        "codes": torch.arange(3, dtype=torch.int32),
        "flags": torch.tensor([True, False, True]),
    }
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"config": "{}", "umlaut": "\u00fc"})
    return read_header(folder / "model.safetensors")


@pytest.fixture
def adapter(source: Header, tmp_path: Path) -> tuple[Adapter, ...]:
    return adapters(source, tmp_path / "style.safetensors", seed=1)


def adapters(source: Header, path: Path, seed: int) -> tuple[Adapter, ...]:
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 4), (6, 2)))
    loras.write(path, loras.tensors({loras.ATTENTION: (down, up)}))
    return lora_fit.read([Wish(path, 0.5)], source)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("with_lora", [False, True])
def test_the_planned_header_is_that_of_the_written_file(
    source: Header,
    adapter: tuple[Adapter, ...],
    precision: Precision,
    with_lora: bool,
) -> None:
    chosen = adapter if with_lora else ()
    target = derive.planned(source, precision, chosen)
    sha256 = finish(derive.write(source, target, target.path, chosen))
    wanted = f"model.{'lora.' if with_lora else ''}{precision}.safetensors"
    assert target.path.name == wanted
    assert read_header(target.path) == target
    assert target.path.stat().st_size == derive.size(target)
    assert sha256 == hashlib.sha256(target.path.read_bytes()).hexdigest()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_numbers_and_metadata_are_those_of_a_plain_cast(
    source: Header, precision: Precision
) -> None:
    target = derive.planned(source, precision)
    finish(derive.write(source, target, target.path))
    before, after = load_file(source.path), load_file(target.path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        wanted = tensor.to(getattr(torch, precision)) if tensor.is_floating_point() else tensor
        assert after[name].dtype == wanted.dtype
        assert torch.equal(after[name], wanted)
    assert target.metadata == source.metadata


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_number_of_the_new_file_is_aligned(source: Header, precision: Precision) -> None:
    for info in derive.planned(source, precision).tensors.values():
        assert info.begin % casts.element(info.dtype).itemsize == 0


def test_a_file_that_has_the_type_already_is_its_own_plan(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "n": torch.arange(2)}, tmp_path / "a.safetensors")
    source = read_header(tmp_path / "a.safetensors")
    assert derive.planned(source, "float32") is source
    assert derive.planned(source) is source


def test_only_what_is_kept_is_in_the_new_file(source: Header) -> None:
    kept = {"b.weight", "steps", "empty", "of another file"}
    target = derive.planned(source, "float32", keep=kept)
    finish(derive.write(source, target, target.path))
    before, after = load_file(source.path), load_file(target.path)
    assert read_header(target.path) == target
    assert after.keys() == kept & before.keys()
    assert torch.equal(after["b.weight"], before["b.weight"].float())
    assert torch.equal(after["steps"], before["steps"])
    assert target.metadata == source.metadata


def test_a_type_that_all_kept_tensors_have_already_leaves_nothing_to_do(source: Header) -> None:
    assert derive.planned(source, "float32", keep={"a.weight", "steps"}) is source
    assert derive.planned(source, keep={"a.weight"}) is source


def test_keeping_everything_is_keeping_nothing_back(source: Header) -> None:
    assert derive.planned(source, "float32", keep=source.tensors) == derive.planned(
        source, "float32"
    )


def test_each_percent_is_said_once_and_the_result_comes_back() -> None:
    def work() -> Generator[Progress, None, str]:
        yield from (Progress(done, 400) for done in (0, 1, 3, 4, 200, 400))
        return "hash"

    def watched() -> Iterator[str]:
        results.append((yield from derive.percents(work(), "writing a")))

    results: list[str] = []
    assert list(watched()) == [f"writing a: {percent} %" for percent in (0, 1, 50, 100)]
    assert results == ["hash"]


def test_whoever_stops_looking_at_the_percents_stops_the_work(
    source: Header, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    work = derive.write(source, derive.planned(source, "float32"), out / "a")
    with closing(derive.percents(work, "a")) as shown:
        next(shown)
        assert list(out.iterdir())
    assert not list(out.iterdir())
    assert next(work, None) is None


def test_the_size_of_the_pieces_changes_nothing(
    source: Header, adapter: tuple[Adapter, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = derive.planned(source, "float32", adapter)
    finish(derive.write(source, target, tmp_path / "a", adapter))
    monkeypatch.setattr(derive, "PIECE", 5)
    finish(derive.write(source, target, tmp_path / "b", adapter))
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6)


def test_progress_ends_at_the_size_of_the_file(source: Header, tmp_path: Path) -> None:
    target = derive.planned(source, "float32")
    steps = list(derive.write(source, target, tmp_path / "out"))
    assert steps[-1] == Progress(derive.size(target), (tmp_path / "out").stat().st_size)
    assert [s.done for s in steps] == sorted({s.done for s in steps})


def test_a_number_too_large_for_float16_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    save_file({"x.weight": torch.tensor([1.0, 1e6])}, tmp_path / "a.safetensors")
    source = read_header(tmp_path / "a.safetensors")
    target = derive.planned(source, "float16")
    with pytest.raises(CheckpointError, match=r"x\.weight reaches 1e\+06.*float32"):
        finish(derive.write(source, target, tmp_path / "b.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_interrupt_while_writing_leaves_nothing(
    source: Header, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(numbers: casts.Numbers, dtype: str, what: str) -> casts.Numbers:
        assert list(out.iterdir())
        if "steps" in what:
            raise KeyboardInterrupt
        return cast(numbers, dtype, what)

    cast = casts.cast
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(casts, "cast", interrupt)
    target = derive.planned(source, "float32")
    with pytest.raises(KeyboardInterrupt):
        finish(derive.write(source, target, out / "a.safetensors"))
    assert not list(out.iterdir())


def test_whoever_stops_looking_leaves_nothing(source: Header, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with closing(derive.write(source, derive.planned(source, "float32"), out / "a")) as work:
        next(work)
        assert list(out.iterdir())
    assert not list(out.iterdir())


def test_a_full_disk_is_said_before_anything_is_written(
    source: Header, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=rf"needs [\d,]+ bytes, {tmp_path} has 10 left"):
        finish(derive.write(source, derive.planned(source, "float32"), tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_a_source_that_was_replaced_meanwhile_is_not_read_with_the_old_header(
    source: Header, tmp_path: Path
) -> None:
    target = derive.planned(source, "float32")
    save_file({"x.weight": torch.ones(2)}, source.path)
    with pytest.raises(UserError, match="has changed since"):
        finish(derive.write(source, target, tmp_path / "a"))


@pytest.mark.parametrize("text", ["3", "{", "[" * 100_000])
def test_provenance_that_is_no_list_is_refused(tmp_path: Path, text: str) -> None:
    tensors = {WEIGHT: torch.ones(6, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"ltx_trt.lora": text})
    source = read_header(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"ltx_trt\.lora is not a JSON list"):
        derive.planned(source, None, adapters(source, tmp_path / "style", seed=1))


@pytest.fixture
def wanted(source: Header, adapter: tuple[Adapter, ...], tmp_path: Path) -> Derivation:
    target = derive.planned(source, "float32", adapter)
    return Derivation(source, target, adapter, tmp_path / "cache")


def place(wanted: Derivation, path: Path) -> tuple[str, list[Progress]]:
    steps: list[Progress] = []

    def watched() -> Iterator[Progress]:
        sha256.append((yield from weight_cache.place(wanted, path)))

    sha256: list[str] = []
    steps.extend(watched())
    return sha256[0], steps


def test_the_second_time_is_a_link_and_no_work(wanted: Derivation, tmp_path: Path) -> None:
    first, work = place(wanted, tmp_path / "a.safetensors")
    second, none = place(wanted, tmp_path / "b.safetensors")
    assert work
    assert not none
    assert first == second == hashlib.sha256((tmp_path / "b.safetensors").read_bytes()).hexdigest()
    assert (tmp_path / "a.safetensors").samefile(tmp_path / "b.safetensors")
    assert read_header(tmp_path / "b.safetensors").tensors == wanted.target.tensors


def test_what_is_kept_can_be_listed_and_freed_while_bundles_keep_it(
    wanted: Derivation, tmp_path: Path
) -> None:
    place(wanted, tmp_path / "a.safetensors")
    (entry,) = weight_cache.entries(wanted.cache)
    assert entry.name == "model.lora.float32.safetensors"
    assert entry.bytes == derive.size(wanted.target)
    assert entry.inputs == (str(wanted.source.path), str(wanted.adapters[0].path))
    assert entry.linked
    assert weight_cache.clear(wanted.cache) == Cleared(0, entry.bytes)
    assert not list(weight_cache.home(wanted.cache).iterdir())
    assert weight_cache.entries(wanted.cache) == ()
    assert read_header(tmp_path / "a.safetensors").tensors == wanted.target.tensors


def test_a_cache_that_was_never_used_is_empty(tmp_path: Path) -> None:
    assert weight_cache.entries(tmp_path / "none") == ()
    assert weight_cache.clear(tmp_path / "none") == Cleared(0, 0)


def test_the_cache_said_freed_of_what_bundles_still_hold(
    wanted: Derivation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(weight_cache, "user_cache_dir", lambda _: tmp_path / "cache")
    place(wanted, tmp_path / "a.safetensors")
    (weight_cache.home(wanted.cache) / ".a.partial").write_bytes(b"12345")
    assert cli.main(["cache"]) == 0
    unfinished, kept = capsys.readouterr().out.splitlines()
    assert unfinished.endswith("5 bytes, incomplete")
    assert kept.endswith(f"{wanted.target.path.name}, linked by a bundle")
    assert cli.main(["cache", "--clear"]) == 0
    said, bytes_held = capsys.readouterr().out, f"{derive.size(wanted.target):,}"
    assert (
        said == f"5 bytes freed; {bytes_held} more when the bundles that link to them are deleted\n"
    )
    assert cli.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == "0 bytes freed\n"


def test_what_no_bundle_links_to_is_freed(wanted: Derivation, tmp_path: Path) -> None:
    place(wanted, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    assert weight_cache.clear(wanted.cache) == Cleared(derive.size(wanted.target), 0)


def test_what_a_killed_process_left_is_listed_and_freed(wanted: Derivation) -> None:
    finish(weight_cache.cached(wanted))
    left = weight_cache.home(wanted.cache) / ".abc.safetensors.0123abcd.partial"
    left.write_bytes(b"12345")
    unfinished = weight_cache.entries(wanted.cache)[0]
    assert (unfinished.file, unfinished.bytes, unfinished.name) == (left, 5, "")
    weight_cache.clear(wanted.cache)
    assert not left.exists()


@pytest.mark.parametrize(
    "change", ["strength", "precision", "LoRA", "checkpoint", "its time", "keep"]
)
def test_each_thing_that_changes_the_numbers_makes_another_file(
    wanted: Derivation, source: Header, adapter: tuple[Adapter, ...], tmp_path: Path, change: str
) -> None:
    finish(weight_cache.cached(wanted))
    path, precision, chosen = adapter[0].path, "float32", adapter
    kept = None
    if change == "strength":
        chosen = lora_fit.read([Wish(path, 0.25)], source)
    elif change == "precision":
        precision = "bfloat16"
    elif change == "LoRA":
        chosen = adapters(source, path, seed=2)
    elif change == "its time":
        os.utime(source.path, ns=(1, 1))
    elif change == "keep":
        kept = {WEIGHT}
    else:
        tensors = load_file(source.path)
        save_file(tensors | {WEIGHT: -tensors[WEIGHT]}, source.path, dict(source.metadata))
    target = derive.planned(source, precision, chosen, kept)  # type: ignore[arg-type]
    other = Derivation(source, target, chosen, wanted.cache)
    assert list(weight_cache.cached(other))
    assert len(weight_cache.entries(wanted.cache)) == 2


@pytest.mark.parametrize("damage", ["shorter", "other bytes", "no note", "odd note", "header"])
def test_a_damaged_entry_is_made_again_and_said_so(
    wanted: Derivation, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    entry = finish(weight_cache.cached(wanted))
    good, stat = entry.file.read_bytes(), entry.file.stat()
    note = entry.file.with_suffix(".json")
    if damage == "shorter":
        entry.file.write_bytes(good[:-1])
    elif damage == "other bytes":
        entry.file.write_bytes(good[:-8] + b"12345678")
        os.utime(entry.file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif damage == "no note":
        note.unlink()
    elif damage == "odd note":
        note.write_text("[]")
    else:
        entry.file.write_bytes(good.replace(b"b.weight", b"c.weight"))
        os.utime(entry.file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with caplog.at_level(logging.WARNING):
        sha256, work = place(wanted, tmp_path / "a.safetensors")
    assert work
    assert "damaged or was changed" in caplog.text
    assert (tmp_path / "a.safetensors").read_bytes() == good
    assert sha256 == entry.sha256


def test_an_interrupt_leaves_no_entry(
    wanted: Derivation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(casts, "cast", interrupt)
    with pytest.raises(KeyboardInterrupt):
        place(wanted, tmp_path / "a.safetensors")
    assert weight_cache.entries(wanted.cache) == ()
    assert not (tmp_path / "a.safetensors").exists()


def test_a_checkpoint_that_changes_while_it_is_read_is_not_kept(wanted: Derivation) -> None:
    work = weight_cache.cached(wanted)
    next(work)
    os.utime(wanted.source.path, ns=(1, 1))
    with pytest.raises(UserError, match="changed while it was read"):
        finish(work)
    assert weight_cache.entries(wanted.cache) == ()


@pytest.mark.parametrize("obstacle", ["another file system", "a file in the way"])
def test_where_no_link_can_lead_the_file_is_made_in_place(
    wanted: Derivation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    obstacle: str,
) -> None:
    if obstacle == "a file in the way":
        (tmp_path / "cache").write_bytes(b"")
    else:
        monkeypatch.setattr(weight_cache, "_device", lambda path: path.name)
    with caplog.at_level(logging.WARNING):
        _, work = place(wanted, tmp_path / "a.safetensors")
    assert work
    assert "not keeping a.safetensors in the cache" in caplog.text
    assert read_header(tmp_path / "a.safetensors").tensors == wanted.target.tensors
    assert (tmp_path / "a.safetensors").stat().st_nlink == 1


def test_a_refused_link_becomes_a_copy(
    wanted: Derivation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    with caplog.at_level(logging.WARNING):
        sha256, _ = place(wanted, tmp_path / "a.safetensors")
    assert "a hard link is refused" in caplog.text
    assert hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest() == sha256


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("linkable", [True, False])
def test_a_second_file_of_one_name_was_written_through_the_link_into_the_cache(
    wanted: Derivation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linkable: bool
) -> None:
    place(wanted, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    target = derive.planned(wanted.source, "bfloat16")
    other = Derivation(wanted.source, target, (), wanted.cache)
    monkeypatch.setattr(weight_cache, "_linkable", lambda *_: linkable)
    with pytest.raises(ValueError, match=r"a\.safetensors is there already"):
        place(other, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert hashlib.sha256(before).hexdigest() in {e.sha256 for e in entries(wanted)}


def entries(wanted: Derivation) -> tuple[Entry, ...]:
    return weight_cache.entries(wanted.cache)


@pytest.mark.parametrize("refusal", [None, errno.EPERM])
def test_a_file_that_appears_while_another_is_made_is_not_replaced(
    wanted: Derivation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int | None
) -> None:
    if refusal:
        monkeypatch.setattr("os.link", failing(refusal))
    path = tmp_path / "a.safetensors"
    work = weight_cache.place(wanted, path)
    next(work)
    path.write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="is there already"):
        finish(work)
    assert path.read_bytes() == b"somebody's"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_only_what_tells_that_no_link_is_possible_leads_to_a_copy(
    wanted: Derivation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("os.link", failing(number))
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        place(wanted, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_disk_that_is_full_while_copying_is_said(
    wanted: Derivation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.link", failing(errno.EXDEV))
    monkeypatch.setattr("shutil.copyfileobj", failing(errno.ENOSPC))
    with pytest.raises(UserError, match=r"cannot write .*a\.safetensors: No space left"):
        place(wanted, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_an_interrupted_copy_leaves_nothing(
    wanted: Derivation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        assert (tmp_path / "a.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("os.link", failing(errno.EXDEV))
    monkeypatch.setattr("shutil.copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        place(wanted, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_the_cache_is_the_users_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache, "user_cache_dir", lambda name: f"/somewhere/{name}")
    assert weight_cache.home(None) == Path("/somewhere/ltx-trt/derived")


def test_a_file_without_tensors_has_a_head() -> None:
    empty = Header(Path("a"), {}, {"k": "v"})
    assert derive.size(empty) == len(derive.head(empty))
    one = Header(Path("a"), {"x": TensorInfo("F32", (2,), 100, 108)}, {})
    assert b'"data_offsets":[0,8]' in derive.head(one)
