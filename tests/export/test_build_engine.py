"""ltx-export build-engine, with a builder that needs no GPU."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")

import torch

from ltx_engines import bundle
from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.errors import UserError
from ltx_export import build_process, cli, engine_bundle, layer_table
from ltx_export.build import Job
from ltx_ref.quantization import Format
from tests.export import quantized_files

SHAPE = ("--shape", "64x64x9")
USUAL = ("--gpu", "sm89", *SHAPE, "--branches", "1")
NAME = "tiny.safetensors"


def checkpoint(folder: Path, form: Format = "fp8", name: str = NAME) -> Path:
    """One block of ltx-tiny."""
    return quantized_files.write(folder / name, form, dtype=torch.bfloat16, blocks=1)


def exported(file: Path, out: Path, *options: str) -> Path:
    arguments = ["onnx", str(file), "--stages", "transformer", "--out", str(out), *options]
    assert cli.main(arguments) == 0
    return out


def built(source: Path, *options: str) -> int:
    return cli.main(["build-engine", str(source), "--stages", "transformer", *USUAL, *options])


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine; tests take `copy`."""
    folder = tmp_path_factory.mktemp("engines")
    out = exported(checkpoint(folder), folder / "bundle")
    assert built(out) == 0
    return out


@pytest.fixture
def copy(engines: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engines, tmp_path / "bundle"))


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job, what: str) -> None:
        raise AssertionError(f"{what} is built: {job}")

    monkeypatch.setattr(build_process, "run", run)


def test_an_engine_is_in_the_manifest_with_all_that_it_was_made_of(engines: Path) -> None:
    opened = open_bundle(engines)
    (engine,) = opened.manifest.engines
    assert engine.key.targets == (89,)
    assert engine.key.recipe == "without a name (10 fp8)"
    assert engine.key.graph == opened.manifest.files["transformer.onnx"].sha256
    assert engine.key.profiles[0]["tokens"] == (8, 8, 8)
    assert opened.manifest.files[engine.file].sha256 is not None
    assert engine.counts["products in FP8"] == 10
    assert engine.counts["fused attentions"] == 2
    table = layer_table.read(opened.file(engine.layers))
    assert engine.counts["kernels"] == len(table) > 0


def test_what_has_not_changed_is_up_to_date_and_no_builder_is_started(
    copy: Path, nothing_is_built: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built(copy) == 0
    assert capsys.readouterr().out == f"{copy}: up to date (transformer)\n"


def test_nothing_heavy_is_loaded_to_see_that_all_is_up_to_date(copy: Path) -> None:
    """It answers in less than a second, half of which onnx alone would take."""
    code = (
        "import sys; from ltx_export import cli\n"
        f"cli.main({['build-engine', str(copy), *USUAL]!r})\n"
        "print(*({'onnx', 'onnx_ir', 'torch', 'tensorrt_rtx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{copy}: up to date (transformer)\n\n", done.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--gpu", "sm120"), "it is not for SM120, only for SM89"),
        (("--shape", "96x64x9"), "it has 1 profiles, now there are 2"),
        (("--branches", "2"), "profile 0 has batch 1, now it is 1 to 2 for 2"),
        (("--optimization-level", "2"), "optimization level was the builder's, now it is 2"),
    ],
)
def test_what_changed_is_said_and_built(
    copy: Path, options: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built(copy, *options) == 0
    assert f"transformer: {reason}\n" in capsys.readouterr().out
    after = open_bundle(copy).manifest.engines
    assert len(after) == 1
    named = {name for engine in after for name in (engine.file, engine.layers)}
    assert {file.name for end in ("engine", "json") for file in copy.glob(f"*.{end}")} == {
        "manifest.json",
        *named,
    }
    assert built(copy, *options) == 0
    assert "up to date" in capsys.readouterr().out


def test_an_engine_for_more_gpus_takes_the_place_of_those_for_fewer(copy: Path) -> None:
    assert built(copy, "--gpu", "sm120") == 0
    (engine,) = open_bundle(copy).manifest.engines
    assert engine.key.targets == (89, 120)
    assert [file.name for file in copy.glob("*.engine")] == [engine.file]


def test_an_engine_for_another_gpu_stands_beside_the_one_that_is_there(copy: Path) -> None:
    arguments = ["build-engine", str(copy), *SHAPE, "--branches", "1", "--gpu", "sm120"]
    assert cli.main(arguments) == 0
    assert [e.key.targets for e in open_bundle(copy).manifest.engines] == [(89,), (120,)]


def flip(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([byte ^ 1]))


def requantize(file: Path) -> None:
    checkpoint(file.parent, "int8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (flip, f"transformer: the weights in {NAME} changed\n"),
        (
            requantize,
            "transformer: the recipe was without a name (10 fp8), now it is without a name "
            "(10 int8)\n",
        ),
    ],
)
def test_a_checkpoint_is_exported_on_the_way_and_again_when_it_changed(
    tmp_path: Path,
    change: Callable[[Path], None],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = checkpoint(tmp_path), tmp_path / "bundle"
    assert built(file, "--out", str(out)) == 0
    assert "there is no engine yet" in capsys.readouterr().out
    assert built(file, "--out", str(out)) == 0
    assert "up to date" in capsys.readouterr().out
    change(file)
    assert built(file, "--out", str(out)) == 0
    assert capsys.readouterr().out.startswith(reason)
    assert len(open_bundle(out).manifest.engines) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_bundle_without_engines_can_be_left_as_it_is(tmp_path: Path, engines: Path) -> None:
    graphs = exported(checkpoint(tmp_path), tmp_path / "graphs")
    out = tmp_path / "out"
    assert built(graphs, "--out", str(out)) == 0
    assert not open_bundle(graphs).manifest.engines
    assert len(open_bundle(out).manifest.engines) == 1
    assert (out / NAME).samefile(graphs / NAME)


def test_weights_may_lie_anywhere(tmp_path: Path) -> None:
    """Where no parser would look for them."""
    (tmp_path / "far").mkdir()
    far = checkpoint(tmp_path / "far")
    (tmp_path / "hub").symlink_to(tmp_path / "far")
    out = exported(tmp_path / "hub" / NAME, tmp_path / "bundle", "--weights", "refer")
    assert not (out / far.name).exists()
    assert built(out) == 0
    assert open_bundle(out).manifest.engines[0].counts["products in FP8"] == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpu", "sm86"), "transformer: fp8 needs SM89 or newer, RTX 3070 is SM86"),
        (("--gpu", "h200", "--backend", "tensorrt-rtx"), "does not build for H200 (SM90)"),
        (("--gpu", "rtx9999"), "unknown GPU 'rtx9999'"),
        (("--shape", "64x64x10"), "frames must be 8k + 1"),
        (("--backend", "tensorrt"), "tensorrt is not installed, which builds for tensorrt; pip"),
        (("--stages", "vae_decoder"), "has no stage 'vae_decoder'"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is(
    copy: Path,
    options: tuple[str, ...],
    said: str,
    nothing_is_built: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert built(copy, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "options", "said"),
    [
        ("int8", ("--opset", "20"), "is quantized for ONNX Runtime (opset 20); export it with"),
        (None, ("--precision", "float32", "--opset", "23"), "is float32, for which no attention"),
    ],
)
def test_a_graph_that_no_builder_takes_is_refused(
    tmp_path: Path,
    form: Format | None,
    options: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = quantized_files.write(
        tmp_path / NAME, form or (lambda _: None), dtype=torch.float32, blocks=1
    )
    assert built(exported(file, tmp_path / "bundle", *options)) == 2
    assert said in capsys.readouterr().err


def test_kernels_that_are_not_the_recipes_are_accepted_only_when_that_is_said(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layer_table, "problems", lambda *_: ["2 of 10 layers are bfloat16"])
    before = open_bundle(copy).manifest
    assert built(copy, "--gpu", "sm120") == 2
    assert "2 of 10 layers are bfloat16; --allow-fallback accepts it" in capsys.readouterr().err
    assert open_bundle(copy).manifest == before
    assert not list(copy.glob("*sm120*"))
    assert built(copy, "--gpu", "sm120", "--allow-fallback") == 0


def test_a_flipped_byte_in_an_engine_is_found_before_anyone_runs_it(copy: Path) -> None:
    flip(copy / open_bundle(copy).manifest.engines[0].file)
    with pytest.raises(UserError, match=r"\.engine has sha256"):
        open_bundle(copy)


def test_an_engine_without_a_hash_is_not_accepted(copy: Path) -> None:
    manifest = open_bundle(copy).manifest
    engine = manifest.engines[0].file
    unread = manifest.files[engine].model_copy(update={"sha256": None})
    files = {**manifest.files, engine: unread}
    with pytest.raises(ValueError, match="is an engine and has no sha256"):
        bundle.update(copy, manifest.model_copy(update={"files": files}))


def test_two_do_not_build_in_one_bundle(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handle = os.open(copy, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert built(copy, "--gpu", "sm120") == 2
    finally:
        os.close(handle)
    assert "is being built by another process" in capsys.readouterr().err
    assert built(copy, "--gpu", "sm120") == 0


@pytest.mark.parametrize("where", ["read", "update"])
def test_whoever_stops_between_two_files_leaves_a_bundle_that_opens(
    copy: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = open_bundle(copy).manifest
    with monkeypatch.context() as patch:
        patch.setattr(*((layer_table, "read") if where == "read" else (bundle, "update")), stop)
        assert built(copy, "--branches", "2") == 130
    assert open_bundle(copy).manifest == before
    assert not list(copy.parent.glob(".*"))
    assert built(copy, "--branches", "2") == 0
    assert len(list(copy.glob("*.engine"))) == 1


@pytest.mark.parametrize("seconds", [0.4, 0.8, 1.2])
def test_after_a_kill_the_next_run_completes(copy: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "ltx_export.cli", "build-engine", str(copy), *USUAL]
    with subprocess.Popen([*command, "--gpu", "sm120"], stderr=subprocess.DEVNULL) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    assert isinstance(open_bundle(copy), Bundle)
    assert built(copy, "--gpu", "sm120") == 0
    assert len(open_bundle(copy).manifest.engines) == 1
    assert not list(copy.parent.glob(f".*{engine_bundle.BUILDING}"))


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_stopped_command_takes_its_builder_along(copy: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "ltx_export.cli", "build-engine", str(copy), *USUAL]
    with subprocess.Popen(
        [*command, "--gpu", "sm120", *("--shape", "96x96x17", "--shape", "128x96x17")],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (builders := children.read_text().split()):
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.endswith("ltx-export: interrupted; nothing is half-written\n")
    deadline = time.monotonic() + 20  # one that is still starting ends when it reads its job
    while [pid for pid in builders if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"{builders} live on"
        time.sleep(0.01)
    assert not list(copy.parent.glob(".*"))
    assert len(open_bundle(copy).manifest.engines) == 1
