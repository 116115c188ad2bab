"""ltx-export build-engine, with a builder that needs no GPU."""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")

import torch

from ltx_engines import bundle, host
from ltx_engines.bundle import EngineEntry, open_bundle
from ltx_engines.errors import UserError
from ltx_export import (
    build,
    build_process,
    cli,
    engine_bundle,
    engine_work,
    known_bad,
    layer_table,
)
from ltx_export.build_job import Job
from ltx_export.engine_order import Order
from ltx_ref.quantization import Format
from tests.export import quantized_files
from tests.waiting import HANG, until

SHIPPED = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
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
    """A bundle with an engine, which is kept in `cache` beside it; tests take `copy`."""
    folder = tmp_path_factory.mktemp("engines")
    out = exported(checkpoint(folder), folder / "bundle")
    assert built(out, "--cache", str(folder / "cache")) == 0
    return out


def of_transformer(folder: Path) -> list[EngineEntry]:
    """Without the sampler's step, which goes with it."""
    engines = open_bundle(folder).manifest.engines
    return [engine for engine in engines if engine.key.stage == "transformer"]


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
    (engine,) = of_transformer(engines)
    assert engine.key.targets == (89,)
    assert engine.key.recipe == "without a name (10 fp8)"
    assert engine.key.graph == opened.manifest.files["transformer.onnx"].sha256
    assert engine.key.profiles[0]["tokens"] == (8, 8, 8)
    assert opened.manifest.files[engine.file].sha256 is not None
    assert engine.counts["products in FP8"] == 10
    assert engine.counts["fused attentions"] == 2
    table = layer_table.read(opened.file(engine.layers))
    assert engine.counts["kernels"] == sum(layer.is_kernel for layer in table) > 0


def test_what_has_not_changed_is_up_to_date_and_no_builder_is_started(
    copy: Path, nothing_is_built: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built(copy) == 0
    assert capsys.readouterr().out == f"{copy}: up to date (transformer)\n"


def test_it_can_be_built_for_given_images_too(copy: Path) -> None:
    """A timestep for each token, in room for a keyframe: with the same kernels as without."""
    assert built(copy, "--conditioning", "1") == 0
    (engine,) = of_transformer(copy)
    plain, given = engine.key.profiles
    assert (plain["tokens"], plain["timesteps"]) == ((8, 8, 8), (1, 1, 1))
    assert given["tokens"] == given["timesteps"] == (8, 12, 12)
    assert engine.counts["products in FP8"] == 2 * 10, "of two profiles"
    assert engine.counts["fused attentions"] == 2 * 2
    (work, *_) = engine_bundle.check(copy, order()).work
    assert work.sentence() == "transformer: it has 2 profiles, now there is 1"


def test_nothing_heavy_is_loaded_to_see_that_all_is_up_to_date(copy: Path) -> None:
    """It answers in less than a second, half of which onnx alone would take."""
    code = (
        "import sys; from ltx_export import cli\n"
        f"cli.main({['build-engine', str(copy), *USUAL]!r})\n"
        "print(*({'onnx', 'onnx_ir', 'torch', 'tensorrt_rtx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{copy}: up to date (transformer)\n\n", done.stderr


def order(**changes: Any) -> Order:
    usual: dict[str, Any] = {"gpus": ("sm89",), "shapes": ("64x64x9",), "branches": 1}
    return Order(**usual | {"stages": ("transformer",)} | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpus": ("sm89", "sm120")}, "it is not for SM120, only for SM89"),
        ({"shapes": ("64x64x9", "96x64x9")}, "it has 1 profile, now there are 2"),
        ({"branches": 2}, "profile 0 has batch 1, now it is 1 to 2 for 2"),
        ({"optimization_level": 2}, "optimization level was the builder's, now it is 2"),
        ({"weight_streaming": True}, "weight streaming was the builder's, now it is 1"),
    ],
)
def test_what_changed_is_said(copy: Path, changes: dict[str, Any], reason: str) -> None:
    work = engine_bundle.check(copy, order(**changes)).work
    assert work[0].sentence() == f"transformer: {reason}"
    assert not engine_bundle.check(copy, order()).work


def test_another_version_of_the_builder_is_said(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build.version("tensorrt-rtx")
    monkeypatch.setattr(build, "version", lambda _: "99.1")
    work = engine_bundle.check(copy, order()).work
    reason = f"it was built by tensorrt-rtx {before}, now by 99.1"
    assert work[0].sentence() == f"transformer: {reason}"


def test_what_changed_is_built_and_takes_the_place_of_what_was(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built(copy, "--branches", "2", "--weight-streaming") == 0
    said = capsys.readouterr().out
    assert "transformer: profile 0 has batch 1, now it is 1 to 2 for 2; weight streaming" in said
    after = open_bundle(copy).manifest.engines
    named = {name for engine in after for name in (engine.file, engine.layers)}
    assert {e.key.stage for e in after} == {"transformer", "sampler_step"}
    assert {file.name for end in ("engine", "json") for file in copy.glob(f"*.{end}")} == {
        "manifest.json",
        *named,
    }
    assert built(copy, "--branches", "2", "--weight-streaming") == 0
    assert "up to date" in capsys.readouterr().out


def test_an_engine_for_more_gpus_takes_the_place_of_those_for_fewer(copy: Path) -> None:
    assert built(copy, "--gpu", "sm120") == 0
    (engine,) = of_transformer(copy)
    assert engine.key.targets == (89, 120)
    assert [file.name for file in copy.glob("transformer*.engine")] == [engine.file]


def test_an_engine_for_another_gpu_stands_beside_the_one_that_is_there(copy: Path) -> None:
    arguments = ["build-engine", str(copy), *SHAPE, "--branches", "1", "--gpu", "sm120"]
    assert cli.main(arguments) == 0
    assert [engine.key.targets for engine in of_transformer(copy)] == [(89,), (120,)]


def beside(folder: Path, engine: EngineEntry, name: str, **of_key: Any) -> None:
    """Another engine in the manifest, whose plan is that of this one."""
    manifest = open_bundle(folder).manifest
    new = engine.model_copy(
        update={
            "file": f"{name}.engine",
            "layers": f"{name}.layers.json",
            "key": engine.key.model_copy(update=of_key),
        }
    )
    files = {}
    for old, other in ((engine.file, new.file), (engine.layers, new.layers)):
        shutil.copy(folder / old, folder / other)
        files[other] = manifest.files[old]
    changes = {"engines": (*manifest.engines, new), "files": manifest.files | files}
    bundle.update(folder, manifest.model_copy(update=changes))


def widened(engine: EngineEntry, targets: tuple[int, ...]) -> EngineEntry:
    return engine.model_copy(update={"key": engine.key.model_copy(update={"targets": targets})})


def test_what_is_up_to_date_is_what_the_runtime_finds(copy: Path) -> None:
    """Engines for two GPUs, and later one of another clip for one of these, which runs that."""
    (engine,) = of_transformer(copy)
    manifest = open_bundle(copy).manifest
    wide = tuple(widened(e, (89, 120)) for e in manifest.engines)
    bundle.update(copy, manifest.model_copy(update={"engines": wide}))
    assert not engine_bundle.check(copy, order()).work
    other = [{**profile, "tokens": (99, 99, 99)} for profile in engine.key.profiles]
    beside(copy, engine, "narrow", profiles=tuple(other))
    (run,) = open_bundle(copy).engines("transformer", 89)
    assert run.file == "narrow.engine"
    (work,) = engine_bundle.check(copy, order()).work
    assert work.sentence() == "transformer: SM89 has an engine of its own, which is another"
    assert (work.key.targets, [e.file for e in work.old]) == ((89,), ["narrow.engine"])
    (work,) = engine_bundle.check(copy, order(gpus=("sm89", "sm120"))).work
    assert work.key.targets == (89,)
    assert not engine_bundle.check(copy, order(gpus=("sm120",))).work


def test_engines_that_embed_weights_take_the_place_of_those_that_do_not(copy: Path) -> None:
    (engine,) = of_transformer(copy)
    bare = engine.model_copy(update={"weights": "inputs", "key": engine.key})
    beside(copy, bare, "bare", options=engine.key.options | {"weights as inputs": 1})
    (run,) = open_bundle(copy).engines("transformer", 89)
    assert run.weights == "inputs"
    (work,) = engine_bundle.check(copy, order(branches=2)).work[:1]
    assert {e.file for e in work.old} == {engine.file, "bare.engine"}


def test_sizes_that_follow_from_a_clip_are_not_among_the_reasons(copy: Path) -> None:
    old = {"frames": (9, 9, 9), "latent_frames": (2, 2, 2), "height_3": (8, 8, 8)}
    old |= {"latent_height": (2, 2, 2), "timesteps": (1, 1, 1)}
    new = {axis: (2 * size, 2 * size, 2 * size) for axis, (size, _, _) in old.items()}
    (engine,) = of_transformer(copy)
    before = engine.key.model_copy(update={"profiles": (old,)})
    after = engine.key.model_copy(update={"profiles": (new,)})
    assert engine_work._difference(before, after) == [
        "profile 0 has latent_frames 2, now it is 4",
        "profile 0 has latent_height 2, now it is 4",
        "profile 0 has timesteps 1, now it is 2",
    ]
    odd = engine.key.model_copy(update={"profiles": (old | {"frames": (1, 1, 1)},)})
    assert engine_work._difference(before, odd) == ["profile 0 has frames 9, now it is 1"]


@pytest.mark.parametrize("amount", ["inf", "1e30"])
def test_a_workspace_that_is_no_amount_costs_one_line(
    copy: Path, amount: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built(copy, "--workspace", amount) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--workspace {float(amount)}: give GiB, at most 1,048,576" in line


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
    assert len(of_transformer(out)) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_bundle_without_engines_can_be_left_as_it_is(tmp_path: Path, engines: Path) -> None:
    graphs = exported(checkpoint(tmp_path), tmp_path / "graphs")
    out = tmp_path / "out"
    assert built(graphs, "--out", str(out)) == 0
    assert not open_bundle(graphs).manifest.engines
    assert len(of_transformer(out)) == 1
    assert (out / NAME).samefile(graphs / NAME)


def test_another_bundle_takes_the_engine_from_the_cache(
    engines: Path, copy: Path, nothing_is_built: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = open_bundle(copy).manifest
    files = {name: file for name, file in before.files.items() if ".sm89." not in name}
    bundle.update(copy, before.model_copy(update={"files": files, "engines": ()}))
    assert built(copy, "--cache", str(engines.parent / "cache")) == 0
    assert "there is no engine yet" in capsys.readouterr().out
    assert open_bundle(copy).manifest.engines == before.engines
    for engine in before.engines:
        assert (copy / engine.file).samefile(engines / engine.file)


def test_the_vae_is_built_for_a_tile_in_the_place_of_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build-engine", str(SHIPPED / "vae_decoder.onnx"), "--out", str(tmp_path / "out")]
    options = ["--gpu", "sm89", "--shape", "1216x704x121", "--vae-tile", "64x96x9"]
    assert cli.main([*arguments, *options]) == 0
    (engine,) = open_bundle(tmp_path / "out").manifest.engines
    (profile,) = engine.key.profiles
    assert engine.key.stage == "vae_decoder"
    sides = [profile[f"latent_{side}"] for side in ("frames", "height", "width")]
    assert sides == [(2, 2, 2), (3, 3, 3), (2, 2, 2)]


def test_weights_may_lie_anywhere(tmp_path: Path) -> None:
    """Where no parser would look for them."""
    (tmp_path / "far").mkdir()
    far = checkpoint(tmp_path / "far")
    (tmp_path / "hub").symlink_to(tmp_path / "far")
    out = exported(tmp_path / "hub" / NAME, tmp_path / "bundle", "--weights", "refer")
    assert not (out / far.name).exists()
    assert built(out) == 0
    assert of_transformer(out)[0].counts["products in FP8"] == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpu", "sm86"), "transformer: fp8 needs SM89 or newer, RTX 3070 is SM86"),
        (("--gpu", "h200", "--backend", "tensorrt-rtx"), "does not build for H200 (SM90)"),
        (("--gpu", "rtx9999"), "unknown GPU 'rtx9999'"),
        (("--shape", "64x64x10"), "frames must be 8k + 1"),
        (("--vae-tile", "65x64x9"), "width must be a multiple of 32"),
        (("--vae-tile", "64x64x9"), "--vae-tile is for the VAE, which is not among the stages"),
        (
            ("--precision", "int8"),
            "transformer in {0} is quantized already: without a name (10 fp8",
        ),
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
    assert said.format(copy) in capsys.readouterr().err


def test_a_machine_that_is_too_small_is_refused_unless_that_is_to_be_ignored(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "free_memory", lambda: 1000)
    monkeypatch.setattr(build_process, "run", refuse)
    assert built(copy, "--gpu", "sm120") == 2
    assert "bytes of memory to build, 1,000 are free" in capsys.readouterr().err
    assert built(copy, "--gpu", "sm120", "--ignore-limits") == 2
    assert "the builder was asked" in capsys.readouterr().err


def refuse(*_: object) -> None:
    raise UserError("the builder was asked")


def test_a_builder_that_is_known_to_be_bad_is_named_before_it_builds(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fault = known_bad.Fault(("tensorrt-rtx", build.version("tensorrt-rtx")), "makes bad ones")
    monkeypatch.setattr(known_bad, "FAULTS", (fault,))
    monkeypatch.setattr(build_process, "run", refuse)
    assert built(copy, "--gpu", "sm120") == 2
    assert "transformer for SM89, SM120: tensorrt-rtx" in caplog.text


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
    assert "0 score kernels (listed for SM120 only)\n" in capsys.readouterr().out
    assert {engine.counted for engine in of_transformer(copy)} == {120}
    assert built(copy, "--gpu", "sm120") == 2
    said = capsys.readouterr().err
    assert "transformer is not what was asked for: 2 of 10 layers are bfloat16; --allow-" in said
    assert built(copy, "--gpu", "sm120", "--allow-fallback") == 0
    assert "up to date" in capsys.readouterr().out


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
    lock = copy.with_name(f".{copy.name}.lock")
    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
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
    assert len(list(copy.glob("transformer*.engine"))) == 1


HELD = f"""
import sys
from ltx_export import build_process, cli

builder = '''
import sys, time
from ltx_export import build, layer_table

layer_table.layers = lambda *_: time.sleep({HANG})
sys.exit(build.main())
'''
build_process.COMMAND = (sys.executable, "-c", builder)
sys.exit(cli.main(sys.argv[1:]))
"""
"""A command whose builder does all its work and then waits to be ended: whoever is in time to end
it on a slow machine is on every one."""


def killed(command: list[str], folder: Path, seconds: float) -> bool:
    """So long after it began to build, SIGKILL; whether it was still building then."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        until(lambda: process.poll() is not None or folder.exists(), "the beginning")
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode == -signal.SIGKILL and folder.exists()


def test_after_kills_at_any_moments_of_a_build_the_next_run_completes(
    engines: Path, copy: Path
) -> None:
    before = open_bundle(copy).manifest.engines
    words = ("build-engine", str(copy), *USUAL, "--gpu", "sm120")
    folder = copy.with_name(f".{copy.name}{engine_bundle.BUILDING}")
    assert killed([sys.executable, "-c", HELD, *words], folder, 0.0)
    seed = time.time_ns()
    moments = [random.Random(seed + index).uniform(0, 0.8) for index in range(4)]
    for seconds in moments:
        hit = killed([sys.executable, "-m", "ltx_export.cli", *words], folder, seconds)
        now = open_bundle(copy).manifest.engines  # every hash is as it was
        assert {e.key.stage for e in now} >= {e.key.stage for e in before}, (seed, moments)
        if not hit:  # it was faster, and nothing would be left to build
            shutil.rmtree(copy)
            shutil.copytree(engines, copy)
    assert built(copy, "--gpu", "sm120") == 0
    now = open_bundle(copy).manifest.engines
    assert [e.key.targets for e in now] == [(89, 120)] * len(before), (seed, moments)
    files = {name for engine in now for name in (engine.file, engine.layers)}
    assert {file.name for file in copy.glob("*sm*")} == files
    assert not folder.exists()


def test_a_builder_of_a_killed_command_finds_its_folder_gone(copy: Path) -> None:
    """It had the name of the next one's, and what was late wrote into what the next one built."""
    with engine_bundle._scratch(copy) as first:
        (first / "a.onnx").touch()
    with engine_bundle._scratch(copy) as second:
        assert second.parent == first.parent
        assert not first.exists()
        assert not list(second.iterdir())
    assert not second.parent.exists()


def has_loaded(pid: str, library: str) -> bool:
    """Whether it lives, and has."""
    with suppress(OSError):
        return library in Path(f"/proc/{pid}/maps").read_text()
    return False


@pytest.mark.parametrize("library", ["", "libtensorrt_rtx"])
def test_a_stopped_command_takes_its_builder_along(copy: Path, library: str) -> None:
    """One that has just begun to be a process, and one that is a builder by now."""
    command = [sys.executable, "-c", HELD, "build-engine", str(copy), *USUAL]
    with subprocess.Popen(
        [*command, "--gpu", "sm120", *("--shape", "96x96x17", "--shape", "128x96x17")],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: any(has_loaded(pid, library) for pid in children.read_text().split()), "it")
        builders = children.read_text().split()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert said.endswith("ltx-export: interrupted; nothing is half-written\n")
    # one that is still starting ends when it reads its job
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in builders), f"{builders} gone")
    assert not list(copy.parent.glob(".*"))
    assert len(of_transformer(copy)) == 1
