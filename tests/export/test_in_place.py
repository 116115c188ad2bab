"""`--weights refer`: a bundle without weights, which stay in a model hub's cache or wherever."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ltx_engines import hashes
from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.errors import UserError
from ltx_engines.stages import STAGES
from ltx_export import cli
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from make_templates import TINY
from tests.export.by_hand import Array

CHECKPOINT = "ltx-tiny.safetensors"


def hub(root: Path) -> Path:
    """ltx-tiny as `huggingface_hub` keeps it: links in a snapshot to blobs named by their hash."""
    snapshot, blobs = root / "snapshots" / "main", root / "blobs"
    (snapshot / "text_encoder").mkdir(parents=True)
    blobs.mkdir()
    names = (CHECKPOINT, *(f"text_encoder/{n.name}" for n in (TINY / "text_encoder").iterdir()))
    for index, name in enumerate(names):
        blob = blobs / f"{index:064x}"
        blob.write_bytes((TINY / name).read_bytes())
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def export(snapshot: Path, out: Path, *options: str) -> Bundle:
    arguments = [str(snapshot / CHECKPOINT), "--text-encoder", str(snapshot / "text_encoder")]
    assert cli.main(["onnx", *arguments, "--out", str(out), "--weights", "refer", *options]) == 0
    return open_bundle(out, cache=out.parent / "notes")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return hub(tmp_path / "hub")


@pytest.fixture
def bundle(snapshot: Path, tmp_path: Path) -> Bundle:
    return export(snapshot, tmp_path / "bundle")


def feeds() -> dict[str, Array]:
    generator = np.random.default_rng(0)
    return {
        "latents": generator.normal(size=(1, 6, 32)).astype(np.float32),
        "coords": 9 * generator.random(size=(1, 3, 6)).astype(np.float32),
        "timestep": np.full((1, 1), 0.5, np.float32),
        "prompt_embeds": generator.normal(size=(1, 4, 128)).astype(np.float32),
        "prompt_mask": np.ones((1, 4), np.float32),
        "skip_layer_mask": np.ones((6, 1), np.float32),
    }


def velocity(bundle: Bundle) -> Array:
    with OnnxRuntimeSession.open(bundle, "transformer", threads=1) as session:
        return session(feeds())["velocity"]


def shipped() -> Bundle:
    return open_bundle(TINY)


def test_nothing_was_copied_and_every_key_is_the_real_file(bundle: Bundle, snapshot: Path) -> None:
    assert not list(bundle.path.rglob("*.safetensors"))
    assert sum(p.stat().st_size for p in bundle.path.rglob("*.onnx")) < 1_000_000
    checkpoint = Path(bundle.manifest.checkpoint)
    assert checkpoint == (snapshot / CHECKPOINT).resolve()
    assert bundle.stage("transformer").weights == (str(checkpoint),)
    encoder = (snapshot / "text_encoder/model.safetensors").resolve()
    assert bundle.stage("text_encoder").weights == (str(encoder),)


def test_it_computes_what_the_bundle_with_its_own_weights_does(bundle: Bundle) -> None:
    assert np.array_equal(velocity(bundle), velocity(shipped()))
    for stage in STAGES:
        with OnnxRuntimeSession.open(bundle, stage, threads=1):
            pass


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    place = shm / f"ltx-{os.getpid()}.safetensors"
    place.write_bytes((TINY / CHECKPOINT).read_bytes())
    yield place
    place.unlink()


def test_another_file_system_is_no_hindrance(other_file_system: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    arguments = ["onnx", str(other_file_system), "--stages", "transformer", "--out", str(out)]
    assert cli.main([*arguments, "--weights", "refer"]) == 0
    assert np.array_equal(velocity(open_bundle(out, cache=tmp_path)), velocity(shipped()))


def refusal(bundle: Bundle) -> str:
    with pytest.raises(UserError) as told:
        open_bundle(bundle.path, cache=bundle.path.parent / "notes")
    assert str(told.value).isprintable(), "more than one line"
    return str(told.value)


def flip(path: Path) -> None:
    """The last bit of the last weight."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_a_checkpoint_that_was_modified_after_the_export_is_refused(bundle: Bundle) -> None:
    checkpoint = Path(bundle.manifest.checkpoint)
    flip(checkpoint)
    assert refusal(bundle).startswith(f"{checkpoint} has sha256 ")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    assert refusal(bundle).startswith(f"{checkpoint} has 13781927 bytes, the manifest says 1378192")
    checkpoint.unlink()
    assert refusal(bundle).startswith(f"{checkpoint} is missing")


@pytest.fixture
def large(snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """As if the checkpoint were too large to be hashed by the way."""
    monkeypatch.setattr(hashes, "STAMP_FROM", 10_000_000)
    return export(snapshot, tmp_path / "bundle")


def test_a_large_checkpoint_is_known_by_its_time_and_a_sample(large: Bundle) -> None:
    entry = large.manifest.files[large.manifest.checkpoint]
    checkpoint = Path(large.manifest.checkpoint)
    assert entry.sha256 is None
    assert entry.modified_ns == checkpoint.stat().st_mtime_ns
    others = [e for name, e in large.manifest.files.items() if name != str(checkpoint)]
    assert all(e.sha256 for e in others)
    os.utime(checkpoint, (0, 0))
    said = refusal(large)
    assert said.startswith(f"{checkpoint} was changed ")
    assert said.endswith(f"ltx-export seal --accept-changed {large.path}")
    flip(checkpoint)
    assert refusal(large).startswith(f"{checkpoint} has other contents than when")


def test_sealing_gives_a_large_checkpoint_its_hash(
    large: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = large.manifest.checkpoint
    capsys.readouterr()
    assert cli.main(["seal", str(large.path)]) == 0
    assert capsys.readouterr().out == f"{large.path}: 1 hashed, {checkpoint}\n"
    os.utime(checkpoint, (0, 0))
    again = open_bundle(large.path, cache=large.path.parent / "notes")
    assert again.manifest.files[checkpoint].sha256 == hashes.sha256(TINY / CHECKPOINT)
    assert cli.main(["seal", str(large.path)]) == 0
    assert capsys.readouterr().out == f"{large.path}: 0 hashed\n"
    flip(Path(checkpoint))
    assert "has sha256" in refusal(large)


def test_sealing_what_is_no_bundle_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["seal", str(tmp_path)]) == 2
    assert "is not a bundle" in capsys.readouterr().err


def test_whoever_wishes_has_every_hash_at_once(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "STAMP_FROM", 10_000_000)
    bundle = export(snapshot, tmp_path / "bundle", "--hash")
    assert all(entry.sha256 for entry in bundle.manifest.files.values())


def test_converted_weights_are_in_the_bundle(snapshot: Path, tmp_path: Path) -> None:
    bundle = export(snapshot, tmp_path / "half", "--precision", "float16")
    assert (bundle.path / bundle.manifest.checkpoint).is_file()
    assert not Path(bundle.manifest.checkpoint).is_absolute()
    as_it_is = export(snapshot, tmp_path / "same", "--precision", "float32")
    assert as_it_is.manifest.checkpoint == str((snapshot / CHECKPOINT).resolve())


def test_a_bundle_of_text_alone_knows_its_checkpoint_too(snapshot: Path, tmp_path: Path) -> None:
    bundle = export(snapshot, tmp_path / "bundle", "--stages", "text_encoder")
    assert bundle.manifest.checkpoint == str((snapshot / CHECKPOINT).resolve())
    assert bundle.manifest.checkpoint in bundle.manifest.files
