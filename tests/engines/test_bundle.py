import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError

from ltx_engines import hashes
from ltx_engines.bundle import (
    MANIFEST,
    Bundle,
    Defaults,
    Hashing,
    Manifest,
    create,
    open_bundle,
    reseal,
    seal,
    tensor_entries,
    tensors,
)
from ltx_engines.errors import UserError
from ltx_engines.stages import FLOAT, Sizes, Tensor, check_feeds, ltx_video

Fill = Callable[..., Manifest]


def test_what_was_sealed_is_what_opens(
    folder: Path, cache: Path, manifest: Manifest, content: dict[str, bytes]
) -> None:
    bundle = open_bundle(folder, cache=cache)
    assert bundle.manifest.model_copy(update={"files": {}}) == manifest
    assert {name: bundle.file(name).read_bytes() for name in bundle.manifest.files} == content
    for name, data in content.items():
        entry = bundle.manifest.files[name]
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_manifest_is_the_same_text_each_time(folder: Path, tmp_path: Path, fill: Fill) -> None:
    text = (folder / MANIFEST).read_text(encoding="ascii")
    again = tmp_path / "again"
    again.mkdir()
    fill(again)
    assert (again / MANIFEST).read_text(encoding="ascii") == text
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_sealing_twice_changes_nothing(folder: Path, manifest: Manifest) -> None:
    before = (folder / MANIFEST).read_bytes()
    seal(folder, manifest)
    assert (folder / MANIFEST).read_bytes() == before


def test_an_opened_manifest_cannot_be_changed(folder: Path, cache: Path) -> None:
    opened = open_bundle(folder, cache=cache).manifest
    for key in Manifest.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(opened, key, "other")


def test_a_moved_bundle_opens(folder: Path, cache: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "elsewhere")
    open_bundle(tmp_path / "elsewhere", cache=cache)


def test_per_step_values_come_back_as_they_went(
    tmp_path: Path, cache: Path, fill: Fill, manifest: Manifest
) -> None:
    wished = Defaults(
        guidance_scale=(1.0, 8.0),
        skip_block_list=((), (11, 25)),
        guidance_timesteps=(1.0, 0.9),
        timesteps=(1.0, 0.5),
    )
    with create(tmp_path / "b") as temporary:
        fill(temporary)
        seal(temporary, manifest.model_copy(update={"defaults": wished}))
    assert open_bundle(tmp_path / "b", cache=cache).manifest.defaults == wished


def test_the_tensor_table_survives_the_manifest_and_checks_feeds(folder: Path, cache: Path) -> None:
    stage = open_bundle(folder, cache=cache).stage("transformer")
    feeds = {
        entry.name: tuple(axis if isinstance(axis, int) else 2 for axis in entry.axes)
        for entry in stage.inputs
    }
    check_feeds("transformer", tensors(stage.inputs), feeds)
    with pytest.raises(ValueError, match="latents axis 12 is 13"):
        check_feeds("transformer", tensors(stage.inputs), feeds | {"latents": (2, 2, 13)})


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_only_the_stages_own_precision_becomes_concrete(
    precision: Literal["float32", "float16", "bfloat16"],
) -> None:
    for stage in ltx_video(Sizes(12, 12, 20, 3, 12, timestep_conditioning=True)).values():
        for table in (stage.inputs, stage.outputs):
            assert tensors(tensor_entries(table, precision)) == tuple(
                Tensor(t.name, precision if t.dtype == FLOAT else t.dtype, t.axes) for t in table
            )


class SuddenError(Exception):
    pass


@pytest.mark.parametrize("error", [SuddenError, KeyboardInterrupt, SystemExit, UserError])
def test_nothing_remains_of_a_failure(
    tmp_path: Path, error: type[BaseException], fill: Fill
) -> None:
    with pytest.raises(error), create(tmp_path / "b") as temporary:
        fill(temporary)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_the_bundle_is_not_there_before_it_is_complete(tmp_path: Path, fill: Fill) -> None:
    with create(tmp_path / "b") as temporary:
        fill(temporary)
        assert temporary.parent == tmp_path, "a rename needs the same file system"
        assert not (tmp_path / "b").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]


def test_an_unsealed_bundle_is_a_programmers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seal the bundle"), create(tmp_path / "b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_missing_parents_are_made_and_an_empty_folder_gives_way(tmp_path: Path, fill: Fill) -> None:
    for name in ("deep/er/bundle", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with create(tmp_path / name) as temporary:
            fill(temporary)
        assert (tmp_path / name / MANIFEST).is_file()


def test_a_bundle_has_the_permissions_of_any_new_folder(folder: Path) -> None:
    (folder.parent / "usual").mkdir()
    assert folder.stat().st_mode == (folder.parent / "usual").stat().st_mode


def target_refusal(target: Path, *, overwrite: bool = False) -> str:
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(UserError) as caught, create(target, overwrite=overwrite):
        raise AssertionError("the body must not run")
    assert sorted(target.parent.rglob("*")) == before
    return str(caught.value)


def test_a_bundle_is_replaced_only_on_demand(folder: Path, cache: Path, fill: Fill) -> None:
    assert "holds a bundle; choose another folder or pass --overwrite" in target_refusal(folder)
    with create(folder, overwrite=True) as temporary:
        fill(temporary, "newer")
        assert open_bundle(folder, cache=cache).manifest.name == "tiny", "until the last moment"
    assert open_bundle(folder, cache=cache).manifest.name == "newer"
    assert list(folder.parent.glob(".*")) == []


def test_the_old_bundle_survives_a_failed_replacement(
    folder: Path, cache: Path, fill: Fill
) -> None:
    with pytest.raises(KeyboardInterrupt), create(folder, overwrite=True) as temporary:
        fill(temporary, "newer")
        raise KeyboardInterrupt
    assert open_bundle(folder, cache=cache).manifest.name == "tiny"
    assert list(folder.parent.glob(".*")) == []


def test_ctrl_c_between_the_two_renames_puts_the_old_bundle_back(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, fill: Fill
) -> None:
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    with pytest.raises(KeyboardInterrupt), create(folder, overwrite=True) as temporary:
        fill(temporary, "newer")
        monkeypatch.setattr(os, "replace", replace)
    assert len(calls) == 3
    assert open_bundle(folder, cache=cache).manifest.name == "tiny"
    assert list(folder.parent.glob(".*")) == []


def test_a_bundle_of_another_version_can_be_replaced(folder: Path, cache: Path, fill: Fill) -> None:
    data = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(data | {"format_version": 99}), encoding="utf-8")
    with create(folder, overwrite=True) as temporary:
        fill(temporary)
    open_bundle(folder, cache=cache)


@pytest.mark.parametrize(
    ("file", "text"),
    [("diary.txt", b"dear diary"), (MANIFEST, b'{"name": "my web app"}'), (MANIFEST, b"[3]")],
)
def test_what_is_not_a_bundle_is_never_replaced(tmp_path: Path, file: str, text: bytes) -> None:
    target = tmp_path / "precious"
    target.mkdir()
    (target / file).write_bytes(text)
    for overwrite in (False, True):
        assert "neither empty nor a bundle" in target_refusal(target, overwrite=overwrite)
    assert (target / file).read_bytes() == text


def test_a_bundle_with_somebodys_files_in_it_is_not_replaced(folder: Path) -> None:
    (folder / "clips").mkdir()
    (folder / "clips" / "holiday.mp4").write_bytes(b"mine")
    said = target_refusal(folder, overwrite=True)
    assert "holds files that are not the bundle's (clips/holiday.mp4); move them away" in said


def test_what_appeared_at_the_target_meanwhile_is_not_lost(tmp_path: Path, fill: Fill) -> None:
    with pytest.raises(UserError, match="neither empty nor"), create(tmp_path / "b") as temporary:
        fill(temporary)
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "mine").write_bytes(b"mine")
    assert (tmp_path / "b" / "mine").is_file()
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]


def test_a_file_at_the_target_or_above_it_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    assert f"{file} is not a folder" in target_refusal(file)
    with pytest.raises(UserError, match=f"cannot write {file}/b: "), create(file / "b"):
        pass
    assert file.read_bytes() == b"mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"), create(tmp_path / "b"):
        pass


def test_through_a_link_the_bundle_lands_where_the_link_points(tmp_path: Path, fill: Fill) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with create(tmp_path / "link") as temporary:
        fill(temporary)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / MANIFEST).is_file()


def test_replacing_leaves_the_users_own_hard_linked_checkpoint(
    folder: Path, fill: Fill, content: dict[str, bytes]
) -> None:
    mine = folder.parent / "mine.safetensors"
    os.link(folder / "ltx.safetensors", mine)
    with create(folder, overwrite=True) as temporary:
        fill(temporary)
    assert mine.read_bytes() == content["ltx.safetensors"]


def test_sealing_refuses_a_manifest_that_points_to_nothing(
    tmp_path: Path, manifest: Manifest
) -> None:
    with pytest.raises(ValueError, match=r"checkpoint is 'ltx.safetensors', which is not among"):
        seal(tmp_path, manifest)
    assert not (tmp_path / MANIFEST).exists()


def test_sealing_refuses_a_link_out_of_the_folder(tmp_path: Path, manifest: Manifest) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "weights").symlink_to(tmp_path)
    with pytest.raises(UserError, match="'weights' is a link out of the bundle"):
        seal(inside, manifest)


def test_a_stage_that_is_not_there_names_those_that_are(folder: Path, cache: Path) -> None:
    bundle = open_bundle(folder, cache=cache)
    assert bundle.stage("transformer").file == "transformer.onnx"
    with pytest.raises(UserError, match="has no stage 'vae_encoder', only transformer; export"):
        bundle.stage("vae_encoder")


def test_a_file_that_is_not_the_bundles_is_a_programmers_mistake(
    folder: Path, manifest: Manifest
) -> None:
    bundle = Bundle(folder, manifest.model_copy(update={"files": {"a.onnx": None}}))
    with pytest.raises(ValueError, match=r"'b.onnx' is not a file of .*; did you mean 'a.onnx'\?"):
        bundle.file("b.onnx")


def test_defaults_are_the_original_base_configs() -> None:
    assert Defaults().model_dump() == {
        "width": 1216,
        "height": 704,
        "num_frames": 121,
        "frame_rate": 30.0,
        "num_inference_steps": 40,
        "timesteps": None,
        "skip_initial_inference_steps": 0,
        "skip_final_inference_steps": 0,
        "guidance_scale": 3.0,
        "stg_scale": 1.0,
        "rescaling_scale": 0.7,
        "skip_block_list": (19,),
        "guidance_timesteps": None,
        "cfg_star_rescale": False,
        "stochastic_sampling": False,
        "decode_timestep": 0.05,
        "decode_noise_scale": 0.025,
        "negative_prompt": "worst quality, inconsistent motion, blurry, jittery, distorted",
        "tone_map_compression_ratio": 0.0,
        "second": None,
        "downscale_factor": 0.6666666,
    }


def test_large_files_are_remembered_in_the_users_cache_unless_said_otherwise(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ltx_engines.bundle.user_cache_dir", lambda name: str(cache / name))
    monkeypatch.setattr(hashes, "STAMP_FROM", 7)
    open_bundle(folder)
    assert len(list((cache / "ltx-trt" / "verified").iterdir())) == 1
    open_bundle(folder, cache=cache / "mine")
    assert len(list((cache / "mine" / "verified").iterdir())) == 1


WEIGHTS = "ltx.safetensors"


def rooms(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[Path]:
    """Files of this many bytes are large; returns the list of all that are read for a hash."""
    read: list[Path] = []
    real = hashes.sha256

    def sha256(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(hashes, "STAMP_FROM", limit)
    monkeypatch.setattr(hashes, "sha256", sha256)
    return read


def test_a_large_file_is_sealed_by_its_time_and_not_read(
    folder: Path, cache: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = rooms(monkeypatch, limit=len(b"weights"))
    entry = seal(folder, manifest).files[WEIGHTS]
    time = (folder / WEIGHTS).stat().st_mtime_ns
    assert (entry.bytes, entry.sha256, entry.modified_ns) == (7, None, time)
    open_bundle(folder, cache=cache)
    assert folder / WEIGHTS not in read
    assert len(read) == 4, "the two small ones, by seal and by open_bundle"


def test_a_hash_that_is_known_or_wished_is_in_the_manifest(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, content: dict[str, bytes]
) -> None:
    read = rooms(monkeypatch, limit=len(b"weights"))
    known = seal(folder, manifest, hashing=Hashing({WEIGHTS: "a" * 64})).files[WEIGHTS]
    assert (known.sha256, known.modified_ns) == ("a" * 64, None)
    assert folder / WEIGHTS not in read
    wished = seal(folder, manifest, hashing=Hashing(everything=True)).files[WEIGHTS]
    assert wished.sha256 == hashlib.sha256(content[WEIGHTS]).hexdigest()


def test_resealing_hashes_what_only_has_a_time(
    folder: Path, cache: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms(monkeypatch, limit=len(b"weights"))
    before = seal(folder, manifest)
    assert reseal(folder) == (WEIGHTS,)
    after = open_bundle(folder, cache=cache).manifest
    assert after.files[WEIGHTS].sha256 == hashlib.sha256(b"weights").hexdigest()
    assert after.files[WEIGHTS].modified_ns is None
    assert after.files[WEIGHTS].is_same(before.files[WEIGHTS])  # engines stay up to date
    assert after.model_copy(update={"files": before.files}) == before
    text = (folder / MANIFEST).read_bytes()
    assert reseal(folder) == ()
    assert (folder / MANIFEST).read_bytes() == text
    assert not list(folder.glob(".*"))


def test_sealing_again_does_not_bless_a_changed_file(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms(monkeypatch, limit=len(b"weights"))
    seal(folder, manifest)
    (folder / WEIGHTS).write_bytes(b"WEIGHTS")
    with pytest.raises(UserError, match="has other contents than when it was exported"):
        reseal(folder)
    (folder / WEIGHTS).write_bytes(b"weights")
    (folder / "transformer.onnx").write_bytes(b"GRAPH")
    with pytest.raises(UserError, match=r"transformer.onnx has sha256"):
        reseal(folder, accept_changed=True)


def test_a_resealed_bundle_opens_after_a_copy_that_lost_the_times(
    folder: Path, cache: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms(monkeypatch, limit=len(b"weights"))
    seal(folder, manifest)
    os.utime(folder / WEIGHTS, (0, 0))
    for look in (reseal, lambda path: open_bundle(path, cache=cache)):
        with pytest.raises(UserError, match=f"seal --accept-changed {folder}"):
            look(folder)
    reseal(folder, accept_changed=True)
    open_bundle(folder, cache=cache)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_reseal_that_fails_leaves_the_manifest_as_it_was(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    rooms(monkeypatch, limit=len(b"weights"))
    seal(folder, manifest)
    before = sorted(folder.rglob("*")), (folder / MANIFEST).read_bytes()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((KeyboardInterrupt, UserError)):
        reseal(folder)
    assert (sorted(folder.rglob("*")), (folder / MANIFEST).read_bytes()) == before


def staying(folder: Path, manifest: Manifest) -> tuple[Path, Manifest]:
    """A bundle whose weights are elsewhere, under an absolute key."""
    hub = folder.parent / "hub" / "blob"
    hub.parent.mkdir()
    (folder / WEIGHTS).rename(hub)
    stage = manifest.stages["transformer"].model_copy(update={"weights": (str(hub),)})
    changes = {"checkpoint": str(hub), "stages": {"transformer": stage}}
    return hub, seal(folder, manifest.model_copy(update=changes), elsewhere={str(hub)})


def test_weights_elsewhere_have_an_absolute_key_and_are_found(
    folder: Path, cache: Path, manifest: Manifest, tmp_path: Path
) -> None:
    hub, sealed = staying(folder, manifest)
    assert sealed.files[str(hub)].sha256 == hashlib.sha256(b"weights").hexdigest()
    folder.rename(tmp_path / "moved")
    bundle = open_bundle(tmp_path / "moved", cache=cache)
    assert bundle.file(str(hub)) == hub
    assert bundle.file(bundle.manifest.checkpoint).read_bytes() == b"weights"


def test_replacing_a_bundle_leaves_weights_that_are_elsewhere(
    folder: Path, manifest: Manifest, fill: Fill
) -> None:
    hub, _ = staying(folder, manifest)
    with create(folder, overwrite=True) as temporary:
        fill(temporary)
    assert hub.read_bytes() == b"weights"


def test_sealing_refuses_a_file_elsewhere_that_is_not_there(
    folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    absent = str(tmp_path / "none")
    changed = manifest.model_copy(update={"checkpoint": absent})
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(UserError, match="none is missing"):
        seal(folder, changed, elsewhere={absent})
    assert (folder / MANIFEST).read_bytes() == before
