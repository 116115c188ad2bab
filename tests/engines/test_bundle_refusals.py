"""What open_bundle says to a bundle that is not as it was made: one line, each time."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ltx_engines import hashes
from ltx_engines.bundle import FORMAT_VERSION, MANIFEST, open_bundle, reseal
from ltx_engines.errors import UserError

Edit = Callable[[dict[str, Any]], object]


def rewrite(folder: Path, edit: Edit) -> None:
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    edit(data)
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def refusal(folder: Path, cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_bundle(folder, cache=cache)
    said = str(caught.value)
    assert said.isprintable(), "more than one line"
    return said


def put(*keys: Any) -> Edit:
    """An edit: the last argument is the value, those before it are where it goes."""

    def edit(data: Any) -> None:
        *path, last, value = keys
        for key in path:
            data = data[key]
        data[last] = value

    return edit


def drop(*keys: Any) -> Edit:
    def edit(data: Any) -> None:
        *path, last = keys
        for key in path:
            data = data[key]
        del data[last]

    return edit


HASH = "0" * 64
FIRST = ("stages", "transformer", "inputs", 0)

WRONG: list[tuple[Edit, str]] = [
    (put("nmae", "x"), "unknown key nmae; did you mean 'name'?"),
    (put("zzz", "x"), "unknown key zzz; export the bundle again"),
    (
        put("defaults", "guidance_scal", 3),
        "unknown key defaults.guidance_scal; did you mean 'guidance_scale'?",
    ),
    (
        put("stages", "transformer", "weight", []),
        "unknown key stages.transformer.weight; did you mean 'weights'?",
    ),
    (put(*FIRST, "axis", []), "unknown key stages.transformer.inputs.0.axis; did you mean 'axes'?"),
    (put("two\nlines", 1), "unknown key 'two\\nlines'"),
    (drop("checkpoint"), "missing key checkpoint; export the bundle again (ltx-export onnx)"),
    (drop("tokenizer", "max_length"), "missing key tokenizer.max_length;"),
    (drop(*FIRST, "dtype"), "missing key stages.transformer.inputs.0.dtype;"),
    (drop("files", "ltx.safetensors", "bytes"), "missing key files.ltx.safetensors.bytes;"),
    (put("name", 3), "name should be a valid string, not 3;"),
    (put("defaults", "width", "704"), "defaults.width should be a valid integer, not '704';"),
    (put("defaults", "width", 0), "defaults.width should be greater than or equal to 1, not 0;"),
    (
        put("defaults", "cfg_star_rescale", 1),
        "defaults.cfg_star_rescale should be a valid boolean, not 1;",
    ),
    (
        put("defaults", "stg_scale", "much"),
        "defaults.stg_scale should be a valid number or be a valid array, not 'much';",
    ),
    (put("defaults", "stg_scale", {"a": 1}), "defaults.stg_scale should be a valid number or"),
    (put("defaults", "stg_scale", [1, "a"]), "defaults.stg_scale"),
    (put("defaults", "stg_scale", float("nan")), "defaults.stg_scale should be a finite number"),
    (put("precision", "fp16"), "precision should be 'float32', 'float16' or 'bfloat16', not 'f"),
    (put("files", "ltx.safetensors", "sha256", "ABC"), "files.ltx.safetensors.sha256 should match"),
    (put("stages", []), "stages should be an object, not []"),
    (
        put("stages", "transfomer", None),
        "stages.transfomer should be an object, not None",
    ),
    (
        lambda data: data["stages"].update(vae_decode=data["stages"]["transformer"]),
        "unknown stage 'vae_decode'; did you mean 'vae_decoder'?",
    ),
    (
        put("checkpoint", "ltx.safetensor"),
        "checkpoint is 'ltx.safetensor', which is not among files; did you mean 'ltx.safetensors'?",
    ),
    (put("tokenizer", "file", "x"), "tokenizer.file is 'x', which is not among files;"),
    (put("stages", "transformer", "file", "x"), "stages.transformer.file is 'x', which is not"),
    (put("stages", "transformer", "weights", 0, "x"), "stages.transformer.weights.0 is 'x', which"),
]


@pytest.mark.parametrize(("edit", "said"), WRONG, ids=[said[:50] for _, said in WRONG])
def test_a_wrong_manifest_costs_one_line(folder: Path, cache: Path, edit: Edit, said: str) -> None:
    rewrite(folder, edit)
    assert refusal(folder, cache).startswith(f"{folder / MANIFEST}: {said}")


def test_a_typo_is_told_before_the_gap_that_it_leaves(folder: Path, cache: Path) -> None:
    rewrite(folder, lambda data: data.update(chekpoint=data.pop("checkpoint")))
    assert "unknown key chekpoint; did you mean 'checkpoint'?" in refusal(folder, cache)


@pytest.mark.parametrize(
    ("version", "advice"),
    [(FORMAT_VERSION + 1, "update ltx-trt"), (0, "export"), ("1", "export"), (True, "export")],
)
def test_another_format_version_says_which_one_is_read_and_what_to_do(
    folder: Path, cache: Path, version: object, advice: str
) -> None:
    rewrite(folder, put("format_version", version))
    rewrite(folder, put("later_field", 1))  # the version is told first
    said = f"has format version {version!r}, this program reads {FORMAT_VERSION}; {advice}"
    assert said in refusal(folder, cache)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\xff", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"]
)
def test_what_is_not_json_is_said_to_be_so(folder: Path, cache: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert f"{MANIFEST} is not JSON: " in refusal(folder, cache)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_json_that_is_no_object_is_refused(folder: Path, cache: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content, encoding="utf-8")
    assert f"must be a JSON object, not {json.loads(content)!r}" in refusal(folder, cache)


def test_half_a_character_in_a_manifest_is_refused(folder: Path, cache: Path) -> None:
    rewrite(folder, put("name", "\ud800"))
    assert MANIFEST in refusal(folder, cache)


def test_a_folder_without_a_manifest_is_not_a_bundle(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        said = refusal(path, cache)
        assert said.startswith(f"{path} is not a bundle: no {MANIFEST}; make one with ltx-export")


def test_a_folder_in_place_of_the_manifest_is_told(folder: Path, cache: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    assert refusal(folder, cache) == f"{folder / MANIFEST}: Is a directory"


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "C:\\x", "a\\b", "../secret", "a/../../secret", "a/../b"),
        *("", ".", "./a", "a//b", "a/", "a\n", "a\0b"),
    ],
)
def test_a_path_that_is_not_plainly_inside_is_refused(folder: Path, cache: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"")
    rewrite(folder, put("files", name, {"sha256": HASH, "bytes": 0}))
    assert f"{name!r} is not a path inside the bundle" in refusal(folder, cache)


def test_a_link_out_of_the_bundle_is_refused(folder: Path, cache: Path) -> None:
    outside = folder.parent / "outside"
    (folder / "ltx.safetensors").rename(outside)
    (folder / "ltx.safetensors").symlink_to(outside)
    assert "'ltx.safetensors' is a link out of the bundle" in refusal(folder, cache)


def test_a_folder_that_is_a_link_out_of_the_bundle_is_refused(folder: Path, cache: Path) -> None:
    (folder / "text_encoder").rename(folder.parent / "outside")
    (folder / "text_encoder").symlink_to(folder.parent / "outside")
    said = refusal(folder, cache)
    assert "'text_encoder/tokenizer.json' is a link out of the bundle" in said


def test_a_manifest_that_is_a_link_out_of_the_bundle_is_refused(folder: Path, cache: Path) -> None:
    (folder / MANIFEST).rename(folder.parent / "outside")
    (folder / MANIFEST).symlink_to(folder.parent / "outside")
    assert f"{MANIFEST!r} is a link out of the bundle" in refusal(folder, cache)


def test_links_inside_the_bundle_and_to_it_are_fine(folder: Path, cache: Path) -> None:
    (folder / "ltx.safetensors").rename(folder / "real")
    (folder / "ltx.safetensors").symlink_to("real")
    link = folder.parent / "link"
    link.symlink_to(folder)
    open_bundle(link, cache=cache)


def test_a_link_to_itself_is_told(folder: Path, cache: Path) -> None:
    (folder / "ltx.safetensors").unlink()
    (folder / "ltx.safetensors").symlink_to("ltx.safetensors")
    assert "Too many levels of symbolic links" in refusal(folder, cache)


def test_a_missing_file_is_named(folder: Path, cache: Path) -> None:
    (folder / "transformer.onnx").unlink()
    said = refusal(folder, cache)
    assert said.startswith(f"{folder / 'transformer.onnx'} is missing; copy it again or export")


def test_a_truncated_file_is_named_with_both_sizes(folder: Path, cache: Path) -> None:
    (folder / "ltx.safetensors").write_bytes(b"weigh")
    assert "ltx.safetensors has 5 bytes, the manifest says 7; copy it" in refusal(folder, cache)


def test_one_changed_bit_is_found_and_both_hashes_are_named(
    folder: Path, cache: Path, content: dict[str, bytes]
) -> None:
    before = content["ltx.safetensors"]
    after = bytes([before[0] ^ 1]) + before[1:]
    (folder / "ltx.safetensors").write_bytes(after)
    found, wanted = (hashlib.sha256(data).hexdigest()[:12] for data in (after, before))
    said = refusal(folder, cache)
    assert f"ltx.safetensors has sha256 {found}, the manifest says {wanted}; copy it" in said


def test_a_folder_or_a_pipe_in_place_of_a_file_is_refused(folder: Path, cache: Path) -> None:
    for make in (Path.mkdir, os.mkfifo):
        graph = folder / "transformer.onnx"
        graph.rmdir() if graph.is_dir() else graph.unlink()
        make(graph)
        assert "transformer.onnx is not a regular file" in refusal(folder, cache)


def test_files_that_the_manifest_does_not_know_are_left_alone(folder: Path, cache: Path) -> None:
    (folder / "clip.mp4").write_bytes(b"mine")
    open_bundle(folder, cache=cache)


def by_time(folder: Path) -> Path:
    """The weights' entry has a time and a sample, and no hash."""
    file = folder / "ltx.safetensors"
    stat = file.stat()
    times = {"modified_ns": stat.st_mtime_ns, "sample": hashes.sample(file)}
    entry: dict[str, object] = {"bytes": stat.st_size, **times}
    rewrite(folder, put("files", "ltx.safetensors", entry))
    return file


def test_a_file_that_was_changed_since_is_named_with_both_times(folder: Path, cache: Path) -> None:
    file = by_time(folder)
    open_bundle(folder, cache=cache)
    os.utime(file, (86400 * 365, 86400 * 365))
    said = refusal(folder, cache)
    assert said.startswith(f"{file} was changed 1971-01-0")
    assert "; export the bundle again (ltx-export onnx), or if it is only a copy: " in said
    assert said.endswith(f"ltx-export seal --accept-changed {folder}")


def test_an_edit_that_keeps_the_time_is_seen_in_the_sample(folder: Path, cache: Path) -> None:
    file = by_time(folder)
    time = file.stat().st_mtime_ns
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(time, time))
    assert "has other contents than when it was exported" in refusal(folder, cache)


def test_a_nanosecond_is_a_change(folder: Path, cache: Path) -> None:
    file = by_time(folder)
    time = file.stat().st_mtime_ns
    os.utime(file, ns=(time, time + 1))
    assert "was changed" in refusal(folder, cache)


def test_another_size_is_told_before_another_time(folder: Path, cache: Path) -> None:
    file = by_time(folder)
    file.write_bytes(b"more weights")
    assert "has 12 bytes, the manifest says 7" in refusal(folder, cache)


def test_a_file_with_neither_hash_nor_time_is_not_trusted(folder: Path, cache: Path) -> None:
    rewrite(folder, put("files", "ltx.safetensors", {"bytes": 7}))
    assert "has other contents than when" in refusal(folder, cache)
    sample = hashes.sample(folder / "ltx.safetensors")
    rewrite(folder, put("files", "ltx.safetensors", {"bytes": 7, "sample": sample}))
    assert "the manifest says never" in refusal(folder, cache)


def elsewhere(folder: Path, key: str) -> None:
    """The weights lie beside the bundle, and the manifest knows them by this key."""
    (folder / "ltx.safetensors").rename(folder.parent / "hub")
    entry = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    rewrite(folder, put("files", key, entry))
    rewrite(folder, drop("files", "ltx.safetensors"))
    rewrite(folder, put("checkpoint", key))
    rewrite(folder, put("stages", "transformer", "weights", [key]))


def test_only_weights_may_be_elsewhere(folder: Path, cache: Path) -> None:
    key = str(folder.parent / "hub")
    elsewhere(folder, key)
    open_bundle(folder, cache=cache)
    for name in ("transformer.onnx", "text_encoder/tokenizer.json"):
        away = folder.parent / Path(name).name
        away.write_bytes((folder / name).read_bytes())
        rewrite(folder, put("files", str(away), {"bytes": away.stat().st_size, "sha256": HASH}))
        assert f"{str(away)!r} is not a path inside the bundle" in refusal(folder, cache)
        rewrite(folder, drop("files", str(away)))


@pytest.mark.parametrize("crooked", ["{}/../{}/hub", "{}//hub", "{}/./hub"])
def test_a_crooked_path_of_weights_is_refused(folder: Path, cache: Path, crooked: str) -> None:
    parent = folder.parent
    key = crooked.format(parent, parent.name)
    elsewhere(folder, key)
    assert "is not a path inside the bundle" in refusal(folder, cache)


def test_weights_elsewhere_that_are_gone_or_changed_are_named(folder: Path, cache: Path) -> None:
    hub = folder.parent / "hub"
    elsewhere(folder, str(hub))
    hub.write_bytes(b"WEIGHTS")
    assert refusal(folder, cache).startswith(f"{hub} has sha256 ")
    hub.write_bytes(b"weight")
    assert refusal(folder, cache).startswith(f"{hub} has 6 bytes, the manifest says 7")
    hub.unlink()
    assert refusal(folder, cache).startswith(f"{hub} is missing")


def test_resealing_says_what_opening_says(folder: Path, cache: Path) -> None:
    file = by_time(folder)
    file.write_bytes(b"weigh")
    with pytest.raises(UserError, match="has 5 bytes, the manifest says 7"):
        reseal(folder)
    with pytest.raises(UserError, match="is not a bundle"):
        reseal(folder.parent)
